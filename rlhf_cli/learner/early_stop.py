"""Stopping where held-out data no longer get better; what a resume needs for it goes into the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_cli.errors import Diverged
from rlhf_cli.recipe.schema import StopEarly

BEST = "best.safetensors"
LOOKS = "held_out.json"


class EarlyStop(TrainerCallback):
    """Looks at the held-out loss every so many steps, and keeps the trained weights with which it was lowest.

    Args:
        section: How often, and for how long without a gain.
        model: The one in training; only weights that are trained are kept.
        heldout_loss: What is to become small. Draws no random numbers, so that looking changes nothing.
    """

    def __init__(self, section: StopEarly, model: nn.Module, heldout_loss: Callable[[], float]) -> None:
        self.section, self.model, self.heldout_loss = section, model, heldout_loss
        self.looks: list[tuple[int, float]] = []
        """Step and held-out loss of each look."""
        self._best: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int:
        """The step after which the held-out loss was lowest."""
        return min(self.looks, key=lambda look: look[1])[0]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step % self.section.every and state.global_step < state.max_steps:
            return
        loss = self.heldout_loss()
        if not math.isfinite(loss):  # nothing is ever lower than NaN: it would stay the best
            raise Diverged(f"the held-out loss after step {state.global_step} is {loss}; lower the learning rate")
        self.looks.append((state.global_step, loss))
        self.model.train()
        if self.best_step == state.global_step:
            self._best = {name: weight.detach().clone() for name, weight in self._trained()}
        since_best = [step for step, _ in self.looks].index(self.best_step)
        if len(self.looks) - 1 - since_best >= self.section.patience:
            control.should_training_stop = True

    def keep_best(self) -> None:
        """Put the weights of the best look back into the model."""
        with torch.no_grad():
            for name, weight in self._trained():
                weight.copy_(self._best[name])

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what `load` reads."""
        (folder / LOOKS).write_text(json.dumps(self.looks))
        if self._best:
            save_file({name: weight.cpu().contiguous() for name, weight in self._best.items()}, folder / BEST)

    def load(self, folder: Path) -> None:
        self.looks = [(int(step), float(loss)) for step, loss in json.loads((folder / LOOKS).read_bytes())]
        device = next(self.model.parameters()).device
        self._best = load_file(folder / BEST, device=str(device)) if self.looks else {}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
