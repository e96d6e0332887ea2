"""The learners of the online loop behind one small protocol, and the one place that knows which there are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from transformers import TrainerCallback

from rlhf_cli.learner.batch import Batch
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe


class OnlineLearner(Protocol):
    """Takes steps on the batches that it was made with, and saves checkpoints that it can go on from."""

    @property
    def step_metrics(self) -> dict[str, float]:
        """What the latest step measured, under the names of metrics.jsonl."""

    def resume(self, checkpoint: Path | None) -> None:
        """Take all steps, or those after `checkpoint`.

        Raises:
            Diverged: A loss or a gradient is no number; no weight was changed by it.
        """

    def load(self, checkpoint: Path) -> None:
        """Take over the weights of a checkpoint without training."""

    def save(self) -> None:
        """Write a checkpoint of the latest step, and tell the callbacks."""


def online_learner(
    policy: Policy,
    batches: Iterable[Batch],
    recipe: Recipe,
    output_dir: Path,
    callbacks: list[TrainerCallback],
    reward_model: Path | None,
) -> OnlineLearner:
    """The learner that the recipe names.

    Args:
        output_dir: Where its checkpoints are written.
        callbacks: Told of every step and of what is saved.
        reward_model: Folder of the model that `train-rm` left, where there is one.
    """
    assert recipe.run_online is not None
    algorithm = recipe.run_online.learner.algorithm
    if algorithm == "ppo":
        from rlhf_cli.learner.ppo import PPOTrainer

        assert reward_model is not None  # a recipe with ppo is refused without
        return PPOTrainer(policy, batches, recipe, output_dir, callbacks, reward_model)
    if algorithm in ("grpo", "rloo"):
        from rlhf_cli.learner.policy_gradient import GroupGradientTrainer

        return GroupGradientTrainer(policy, batches, recipe, output_dir, callbacks)
    from rlhf_cli.learner.dpo import GroupDPOTrainer

    return GroupDPOTrainer(policy, batches, recipe, output_dir, callbacks)
