"""What all online trainers share: a stream as their data, and several updates inside one step of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_cli.errors import Diverged
from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.settings import trainer_settings
from rlhf_cli.policy.heads import set_dropout
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import RankedGroup


def online_settings(recipe: Recipe, output_dir: Path) -> dict[str, Any]:
    """Arguments that the configurations of all online trainers share."""
    online = recipe.run_online
    assert online is not None
    return {
        **trainer_settings(recipe, output_dir),
        "max_steps": online.steps,
        "gradient_accumulation_steps": 1,
        "learning_rate": online.learner.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": online.learner.max_grad_norm,
        "weight_decay": online.learner.weight_decay,
        "save_strategy": "steps",
        "save_steps": online.checkpoint_every,
        "ignore_data_skip": True,  # skipping would draw, and so burn, groups that people have voted on
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
    }


class StreamTrainer(Trainer):
    """To be mixed into a trainer, before it: takes one step on each batch that `batches` yields, until `max_steps`.

    A step is `epochs` passes over the groups of its batch with `minibatches` updates each, every update computed in
    `accumulate` parts. To the trainer all of them are one step, so its counter, schedule, log and checkpoints are those
    of the recipe: the last update is left to its own loop, the others are made here in the same way.

    A learner says what `part_loss` is.
    """

    def __init__(self, policy: Policy, batches: Iterable[Batch], recipe: Recipe, **given: Any) -> None:
        assert recipe.run_online is not None
        self.policy, self.batches, self.recipe = policy, batches, recipe
        self.online, self.learner = recipe.run_online, recipe.run_online.learner
        self.figures = Means()
        set_dropout(policy.model, 0.0)  # what is learned compares with probabilities that were taken without it
        super().__init__(model=policy.model, processing_class=policy.tokenizer, **given)
        self.remove_callback(PrinterCallback)
        if self.learner.reference_every is not None:
            self.add_callback(_Renewal(policy.renew_reference, self.learner.reference_every))
        self.add_callback(_Renewal(policy.renew_previous, self.online.checkpoint_every))

    @property
    def step_metrics(self) -> dict[str, float]:
        """What the latest step measured, under the names of metrics.jsonl."""
        return self.figures.means()

    def part_loss(self, model: Any, part: Sequence[RankedGroup], whole: Sequence[RankedGroup], beta: float) -> Tensor:
        """What `part` adds to the loss of an update on `whole`; the losses of all parts add up to it.

        Puts what it measures into `figures`.
        """
        raise NotImplementedError

    def begin_step(self, groups: Sequence[RankedGroup], beta: float) -> None:
        """Work out what stays the same in all updates of a step; nothing unless a learner needs it."""

    def save_extra(self, folder: Path) -> None:
        """Write what the trainer does not know of into the folder of a checkpoint."""
        self.policy.save_copies(folder)

    def load_extra(self, folder: Path) -> None:
        """Read what `save_extra` wrote."""
        self.policy.load_copies(folder)

    def resume(self, checkpoint: Path | None) -> None:
        """Take all steps, or those after `checkpoint`."""
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def load(self, checkpoint: Path) -> None:
        """Take over the weights of a checkpoint without training."""
        self._load_from_checkpoint(str(checkpoint))

    def save(self) -> None:
        """Write a checkpoint of the latest step, and tell the callbacks."""
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def get_train_dataloader(self) -> Iterable[dict[str, Batch]]:
        return _Wrapped(self.batches)

    def training_step(self, model: Any, inputs: dict[str, Batch], num_items_in_batch: Any = None) -> Tensor:
        """All updates of a step but for the optimizer's part in the last; returns their mean loss."""
        batch = inputs["batch"]
        model.train()
        self.figures.clear()
        self.figures.add(1, {"train/beta": batch.beta})
        self.begin_step(batch.groups, batch.beta)
        order = plan_updates(
            len(batch.groups), self.learner.epochs, self.learner.minibatches, (self.recipe.seed, self.state.global_step)
        )
        total = torch.zeros((), device=self.accelerator.device)
        for number, places in enumerate(order, start=1):
            self.optimizer.zero_grad()
            groups = [batch.groups[place] for place in places]
            for part in np.array_split(np.arange(len(groups)), min(self.learner.accumulate, len(groups))):
                loss = self.part_loss(model, [groups[k] for k in part], groups, batch.beta)
                if not torch.isfinite(loss):
                    raise Diverged(
                        f"the loss of step {self.state.global_step + 1} is {loss.item()}; no weight was changed by it. "
                        "Lower run_online.learner.learning_rate or raise beta, and start over with --fresh."
                    )
                self.accelerator.backward(loss)
                total += loss.detach()
            if number < len(order):
                self._clip_grad_norm(model)
                self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
                self.optimizer.step()
        return total / len(order)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.save_extra(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_extra(Path(resume_from_checkpoint))


class Means:
    """Weighted means of figures that come in parts."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def clear(self) -> None:
        self._sums = {}

    def add(self, weight: float, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + weight * value, weights + weight

    def means(self) -> dict[str, float]:
        """Those that any weight came for."""
        return {name: total / weights for name, (total, weights) in self._sums.items() if weights > 0}


def plan_updates(groups: int, epochs: int, minibatches: int, seed: Sequence[int]) -> list[list[int]]:
    """Which groups each update of a step is on.

    Every pass takes every group once; with several minibatches it deals them out in an order of its own, which follows
    from `seed` and the pass alone. With fewer groups than minibatches there are fewer updates.
    """
    updates: list[list[int]] = []
    for epoch in range(epochs):
        order = np.arange(groups)
        if minibatches > 1:
            order = np.random.default_rng([*seed, epoch]).permutation(groups)
        updates += [part.tolist() for part in np.array_split(order, min(minibatches, groups))]
    return updates


def placeholder(**columns: Any) -> Dataset:
    """TRL insists on a dataset; this row only satisfies its constructors, the data come from the stream."""
    return Dataset.from_list([columns])


class _Wrapped:
    """The stream as the dataloader: nothing is fetched ahead, so a step starts as soon as its groups are ranked."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for batch in self.batches:
            yield {"batch": batch}


class _Renewal(TrainerCallback):
    """Renews a copy of the policy every so many steps, before the checkpoint of that step is written."""

    def __init__(self, renew: Callable[[], None], every: int) -> None:
        self.renew, self.every = renew, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.renew()
