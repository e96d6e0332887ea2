"""Online DPO on win matrices: TRL's DPOTrainer as the engine, with our stream of ranked groups and our loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from rlhf_cli.learner.segments import segment_weights
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
        logp_RT = chosen_logps(logits_RTV, inputs["ids_BT"]) * is_completion_RT
        ratio_R = logp_RT.sum(1) - inputs["ref_logp_R"]
        scores_BG = by_group(beta * ratio_R, inputs["is_completion_BG"])
        weights_BGG = inputs["weights_BGG"]
        # Where raters marked something, a completion that wins has another ratio than where it loses.
        marked = [(logp_RT * token_RT).sum(1) - ref_R for token_RT, ref_R in inputs["marked"]]
        ratios = marked or [ratio_R]
        if self.learner.loss_name == "ipo":
            lengths_R = inputs["lengths_B"].clamp(min=1)
            means = [by_group(r / lengths_R, inputs["is_completion_BG"]) for r in ratios]
            loss_B = votes_ipo(means[0], weights_BGG, beta, means[-1])
        else:
            scores = [by_group(beta * r, inputs["is_completion_BG"]) for r in ratios]
            loss_B = votes_nll(scores[0], weights_BGG, scores[-1])
        loss_B = loss_B / weights_BGG.sum((1, 2)).clamp(min=1e-9)
        with torch.no_grad():
            figures = {
                "train/accuracy": float(vote_agreement(scores_BG, inputs["wins_BGG"])),
                "train/margin": float(vote_margin(scores_BG, inputs["wins_BGG"])),
            }
            self.figures.add(float(inputs["wins_BGG"].sum()), figures)
            spread_RT = entropy_by_rows(logits_RTV)[is_completion_RT]
            self.figures.add(len(spread_RT), {"train/entropy_nats": float(spread_RT.mean())})
            if self.online.segments is not None:
                self.figures.add(len(logp_RT), {"train/marked_frac": _marked_completions(part) / len(logp_RT)})
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
            "marked": self.marked(groups, device),
        }

    def marked(self, groups: Sequence[RankedGroup], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """What raters marked: weights of tokens, right-aligned, shape (R, T), and the reference's log-probability so
        weighted, shape (R,); once for completions that win, once for those that lose. Empty where nothing is marked.
        """
        if self.online.segments is None or not _marked_completions(groups):
            return []
        weight = self.online.segments.weight

        def decode(token_ids: Sequence[int]) -> str:
            return str(self.policy.tokenizer.decode(token_ids, skip_special_tokens=True))

        completions = [
            (c, [s for s in g.segments if s.completion == i]) for g in groups for i, c in enumerate(g.group.completions)
        ]
        longest = max(1, *(len(c.token_ids) for c, _ in completions))
        weights = [segment_weights(c, marks, decode, weight) for c, marks in completions]
        both = []
        for side in (0, 1):
            rows = [np.pad(of[side], (longest - len(of[side]), 0)) for of in weights]
            ref = [float(of[side] @ c.ref_logps) for of, (c, _) in zip(weights, completions, strict=True)]
            both.append(
                (
                    torch.tensor(np.array(rows), dtype=torch.float32, device=device),
                    torch.tensor(ref, dtype=torch.float32, device=device),
                )
            )
        return both


def _marked_completions(groups: Sequence[RankedGroup]) -> int:
    return sum(len({segment.completion for segment in g.segments}) for g in groups)
