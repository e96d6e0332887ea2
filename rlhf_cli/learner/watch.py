"""What whoever watches a supervised stage is told of every step, and the step that no trainer may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_cli.errors import Diverged

OnStep = Callable[[int, int], None]
"""Called with steps done and steps in all."""
OnRow = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its metrics."""


def check_gradients(model: nn.Module, step: int, advice: str) -> None:
    """Stop before a step whose gradient is no number.

    Raises:
        Diverged: It is not; ends with `advice`.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not torch.isfinite(torch.stack([g.abs().max() for g in gradients])).all():
        raise Diverged(f"the gradient of step {step} is not finite; no weight was changed by it. {advice}")


class Watch(TrainerCallback):
    """Progress and metrics of every step, and a stop at the first gradient that is no number.

    Args:
        section: Of the recipe; names metrics and keys.
        figures: Takes the trainer's log and the seconds of the step; returns metrics that only this trainer has.
        heldout_loss: In nats; `look` shows it in the row of its step.
    """

    def __init__(
        self,
        section: str,
        figures: Callable[[Mapping[str, float], float], Mapping[str, float]],
        heldout_loss: Callable[[], float],
        on_step: OnStep,
        on_row: OnRow,
    ) -> None:
        self.section, self.figures, self.heldout_loss = section, figures, heldout_loss
        self.on_step, self.on_row = on_step, on_row
        self._heldout: dict[str, float] = {}

    def look(self) -> float:
        loss = self.heldout_loss()
        self._heldout = {f"{self.section}/heldout_loss": loss}
        return loss

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        check_gradients(given["model"], state.global_step + 1, f"Lower {self.section}.learning_rate and run it again.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._started
        self.on_step(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # the summary after the last step is no step
            return
        own = {**{name: logs[name] for name in ("loss", "grad_norm", "learning_rate")}, "step_s": self._seconds}
        own |= self.figures(logs, self._seconds)
        self.on_row(state.global_step, {**{f"{self.section}/{name}": x for name, x in own.items()}, **self._heldout})
        self._heldout = {}
