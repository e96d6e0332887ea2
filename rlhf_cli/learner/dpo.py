"""Online DPO on win matrices: TRL's DPOTrainer as the engine, with our stream of ranked groups and our loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.groups import by_group, stack_wins
from rlhf_cli.learner.losses import (
    best_worst,
    entropy_by_rows,
    only_best_worst,
    smoothed,
    vote_agreement,
    vote_margin,
    votes_ipo,
    votes_nll,
)
from rlhf_cli.learner.scores import posterior_wins
from rlhf_cli.learner.stream_trainer import StreamTrainer, online_settings, placeholder
from rlhf_cli.policy.generate import chosen_logps, completion_logits, pack
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import RankedGroup, WinMatrix


class GroupDPOTrainer(StreamTrainer, DPOTrainer):
    """Fits the votes, with beta times the log-ratio to the reference as the score of a completion.

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
        assert recipe.run_online is not None
        super().__init__(
            policy,
            batches,
            recipe,
            args=DPOConfig(**online_settings(recipe, output_dir), beta=recipe.run_online.learner.beta),
            ref_model=policy.reference,
            train_dataset=placeholder(prompt_ids=[0], chosen_ids=[0], rejected_ids=[0]),
            callbacks=callbacks,
        )

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def part_loss(self, model: Any, part: Sequence[RankedGroup], whole: Sequence[RankedGroup], beta: float) -> Tensor:
        inputs = self.collate(part)
        with self.policy.autocast():
            logits_RTV, is_completion_RT = completion_logits(
                model, inputs["ids_BT"], inputs["mask_BT"], inputs["lengths_B"]
            )
        logp_R = (chosen_logps(logits_RTV, inputs["ids_BT"]) * is_completion_RT).sum(1)
        ratio_R = logp_R - inputs["ref_logp_R"]
        scores_BG = by_group(beta * ratio_R, inputs["is_completion_BG"])
        weights_BGG = inputs["weights_BGG"]
        if self.learner.loss_name == "ipo":
            mean_BG = by_group(ratio_R / inputs["lengths_B"].clamp(min=1), inputs["is_completion_BG"])
            loss_B = votes_ipo(mean_BG, weights_BGG, beta)
        else:
            loss_B = votes_nll(scores_BG, weights_BGG)
        loss_B = loss_B / weights_BGG.sum((1, 2)).clamp(min=1e-9)
        with torch.no_grad():
            figures = {
                "train/accuracy": float(vote_agreement(scores_BG, inputs["wins_BGG"])),
                "train/margin": float(vote_margin(scores_BG, inputs["wins_BGG"])),
            }
            self.figures.add(float(inputs["wins_BGG"].sum()), figures)
            spread_RT = entropy_by_rows(logits_RTV)[is_completion_RT]
            self.figures.add(len(spread_RT), {"train/entropy_nats": float(spread_RT.mean())})
        learnable = self.labels(whole, torch.device("cpu")).sum((1, 2)) > 0
        return loss_B.sum() / max(1, int(learnable.sum()))

    def labels(self, groups: Sequence[RankedGroup], device: torch.device) -> Tensor:
        """How much every pair counts, and for which side, shape (B, G, G), as the recipe says."""
        learner, per_char = self.learner, self.online.length.penalty if self.online.length else 0.0
        if learner.labels == "posterior":
            labels_BGG, _ = stack_wins([WinMatrix(posterior_wins(g, per_char)) for g in groups], device)
            if learner.pairs == "best_worst":
                labels_BGG = only_best_worst(labels_BGG)
        else:
            labels_BGG, _ = stack_wins([g.wins for g in groups], device)
            if learner.pairs == "best_worst":
                labels_BGG = best_worst(labels_BGG)
        return smoothed(labels_BGG, learner.label_smoothing)

    def collate(self, groups: Sequence[RankedGroup]) -> dict[str, Any]:
        """Tensors of a batch; R counts the completions of all groups."""
        device = self.accelerator.device
        completions = [c for g in groups for c in g.group.completions]
        prompts = [g.group.prompt_ids for g in groups for _ in g.group.completions]
        wins_BGG, is_completion_BG = stack_wins([g.wins for g in groups], device)
        return {
            **pack(prompts, [c.token_ids for c in completions], self.policy.pad_id, device),
            "ref_logp_R": torch.tensor([math.fsum(c.ref_logps) for c in completions], device=device),
            "is_completion_BG": is_completion_BG,
            "wins_BGG": wins_BGG,
            "weights_BGG": self.labels(groups, device),
        }
