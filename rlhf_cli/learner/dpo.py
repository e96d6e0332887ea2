"""Online DPO on win matrices: TRL's DPOTrainer as the engine, with our stream of ranked groups and our loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from rlhf_cli.errors import Diverged
from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.groups import by_group, stack_wins
from rlhf_cli.learner.losses import best_worst, vote_agreement, vote_margin, win_matrix_nll
from rlhf_cli.learner.settings import trainer_settings
from rlhf_cli.policy.generate import completion_logps, pack
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe


class GroupDPOTrainer(DPOTrainer):
    """Takes one step on each batch of ranked groups that `batches` yields, until `max_steps`.

    TRL gives the optimizer, the schedule, clipping and checkpoints. Overridden are only the places where data comes in
    and the loss itself: each completion goes through the model once, whatever the number of its pairs, and the
    reference log-probabilities were stored when the group was sampled.
    """

    def __init__(
        self,
        policy: Policy,
        batches: Iterable[Batch],
        recipe: Recipe,
        output_dir: Path,
        callbacks: list[TrainerCallback],
    ) -> None:
        online = recipe.run_online
        assert online is not None
        self.policy = policy
        self.batches = batches
        self.learner = online.learner
        self.step_metrics: dict[str, float] = {}
        config = DPOConfig(
            **trainer_settings(recipe, output_dir),
            max_steps=online.steps,
            per_device_train_batch_size=online.prompts_per_step,
            gradient_accumulation_steps=1,
            beta=online.learner.beta,
            learning_rate=online.learner.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=online.learner.max_grad_norm,
            weight_decay=online.learner.weight_decay,
            save_strategy="steps",
            save_steps=online.checkpoint_every,
            ignore_data_skip=True,  # skipping would draw, and so burn, groups that people have voted on
            remove_unused_columns=False,
            dataloader_num_workers=0,
        )
        # TRL insists on a dataset; this row only satisfies its constructor, the data come from `batches`.
        placeholder = Dataset.from_list([{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}])
        super().__init__(
            model=policy.model,
            ref_model=policy.reference,
            args=config,
            train_dataset=placeholder,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def get_train_dataloader(self) -> Iterable[dict[str, Any]]:
        return _Collated(self)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Loss of one batch of groups; leaves its figures in `step_metrics`.

        Raises:
            Diverged: The loss is not finite; no weight has changed.
        """
        with self.policy.autocast():
            logp_R = completion_logps(model, inputs["ids_BT"], inputs["mask_BT"], inputs["lengths_B"]).sum(1)
        beta, wins_BGG = inputs["beta"], inputs["wins_BGG"]
        scores_BG = by_group(beta * (logp_R - inputs["ref_logp_R"]), inputs["is_completion_BG"])
        loss = win_matrix_nll(scores_BG, best_worst(wins_BGG) if self.learner.pairs == "best_worst" else wins_BGG)
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}; no weight was changed by it. "
                "Lower run_online.learner.learning_rate or raise beta, and start over with --fresh."
            )
        with torch.no_grad():
            self.step_metrics = {
                "train/accuracy": float(vote_agreement(scores_BG, wins_BGG)),
                "train/margin": float(vote_margin(scores_BG, wins_BGG)),
                "train/beta": beta,
            }
        return loss

    def collate(self, batch: Batch) -> dict[str, Any]:
        """Tensors of a batch; R counts the completions of all groups."""
        device = self.accelerator.device
        completions = [c for g in batch.groups for c in g.group.completions]
        prompts = [g.group.prompt_ids for g in batch.groups for _ in g.group.completions]
        wins_BGG, is_completion_BG = stack_wins([g.wins for g in batch.groups], device)
        return {
            **pack(prompts, [c.token_ids for c in completions], self.policy.pad_id, device),
            "ref_logp_R": torch.tensor([math.fsum(c.ref_logps) for c in completions], device=device),
            "is_completion_BG": is_completion_BG,
            "wins_BGG": wins_BGG,
            "beta": batch.beta,
        }


class _Collated:
    """The stream as the dataloader: nothing is fetched ahead, so a step starts as soon as its groups are ranked."""

    def __init__(self, trainer: GroupDPOTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.trainer.batches:
            yield self.trainer.collate(batch)
