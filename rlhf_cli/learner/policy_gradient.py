"""GRPO and RLOO on ranked groups: TRL's GRPOTrainer as the engine, with our stream and scores made of votes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.groups import by_group, right_aligned, stack_wins
from rlhf_cli.learner.losses import entropy_by_rows, vote_agreement
from rlhf_cli.learner.scores import group_advantages, group_scores
from rlhf_cli.learner.stream_trainer import StreamTrainer, online_settings, placeholder
from rlhf_cli.policy.generate import chosen_logps, completion_logits, pack
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.online import Learner
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, RankedGroup

_FIGURES = {
    "kl": "train/kl_token_nats",
    "clip_ratio/region_mean": "train/clip_frac",
    "cispo_clip_ratio": "train/clip_frac",
}
"""What TRL's loss measures, by its names and ours."""


class GroupGradientTrainer(StreamTrainer, GRPOTrainer):
    """Makes completions likelier by how far they scored above their group, and holds every token to the reference.

    The arithmetic of the loss is TRL's. Ours are the advantages, the log-probabilities of sampling and of the
    reference, which were stored with the group, and the forward pass, which is the one that these were taken with: the
    ratio of a policy that has not moved is 1, and where votes are old it says how far it has.
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
            args=_config(recipe, output_dir),
            reward_funcs=_scores_come_with_the_groups,
            train_dataset=placeholder(prompt=""),
            callbacks=callbacks,
        )
        self.current_gradient_accumulation_steps = 1  # parts of an update are added up here, not by the trainer's loop

    def part_loss(self, model: Any, part: Sequence[RankedGroup], whole: Sequence[RankedGroup], beta: float) -> Tensor:
        device, completions = self.accelerator.device, _completions(part)
        prompts = [g.group.prompt_ids for g in part for _ in g.group.completions]
        inputs = pack(prompts, [c.token_ids for c in completions], self.policy.pad_id, device)
        with self.policy.autocast():
            logits_RTV, mask_RT = completion_logits(model, **inputs)
        logp_RT = chosen_logps(logits_RTV, inputs["ids_BT"]) * mask_RT
        entropy_RT = entropy_by_rows(logits_RTV)
        old_logp_RT, ref_logp_RT = (
            right_aligned(rows, device) for rows in ([c.logps for c in completions], [c.ref_logps for c in completions])
        )
        self._forward = logp_RT, entropy_RT, None
        self.beta = beta  # TRL reads it in the loss; ours may change from step to step
        tokens, all_tokens = _tokens(completions), _tokens(_completions(whole))
        loss = self._compute_loss(
            model,
            {
                "prompt_ids": inputs["ids_BT"][:, :0],
                "prompt_mask": inputs["mask_BT"][:, :0],
                "completion_ids": inputs["ids_BT"][:, -logp_RT.shape[1] :],
                "completion_mask": mask_RT.long(),
                "advantages": torch.tensor(self._advantages(part), dtype=torch.float32, device=device),
                "old_per_token_logps": old_logp_RT,
                "ref_per_token_logps": ref_logp_RT,
                "num_items_in_batch": torch.tensor(float(all_tokens), device=device),
            },
        )
        theirs = self._metrics["train"]
        measured = {ours: theirs[name][-1] for name, ours in _FIGURES.items() if name in theirs}
        theirs.clear()
        with torch.no_grad():
            measured["train/entropy_nats"] = float(entropy_RT[mask_RT].mean())
            measured["train/ratio_mean"] = float((logp_RT - old_logp_RT).exp()[mask_RT].mean())
            self.figures.add(tokens, measured)
            wins_BGG, is_completion_BG = stack_wins([g.wins for g in part], device)
            ahead_BG = by_group((logp_RT - ref_logp_RT).sum(1), is_completion_BG)
            agreed = float(vote_agreement(ahead_BG, wins_BGG))
            self.figures.add(float(wins_BGG.sum()), {"train/accuracy": agreed})
        return loss * self._share(len(completions) / len(_completions(whole)), tokens / all_tokens)

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return self._forward

    def _advantages(self, groups: Sequence[RankedGroup]) -> list[float]:
        per_char = self.online.length.penalty if self.online.length else 0.0
        leave_one_out, by_deviation = self.learner.algorithm == "rloo", self.learner.scale == "group"
        return [
            advantage
            for g in groups
            for advantage in group_advantages(
                group_scores(g, per_char), leave_one_out=leave_one_out, by_deviation=by_deviation
            ).tolist()
        ]

    def _share(self, of_completions: float, of_tokens: float) -> float:
        """What a part weighs in its update: TRL averages over what it is given, in the way of the loss type."""
        if self.loss_type in ("grpo", "dr_grpo"):
            return of_completions
        return of_tokens if self.loss_type == "bnpo" else 1.0


def _scores_come_with_the_groups(**_: Any) -> list[float]:
    """TRL insists on a reward function; this one is never called."""
    raise NotImplementedError


def _completions(groups: Sequence[RankedGroup]) -> list[Completion]:
    return [c for g in groups for c in g.group.completions]


def _tokens(completions: Sequence[Completion]) -> int:
    return sum(len(c.token_ids) for c in completions)


def _config(recipe: Recipe, output_dir: Path) -> GRPOConfig:
    online = recipe.run_online
    assert online is not None
    return GRPOConfig(
        **online_settings(recipe, output_dir),
        beta=0.0,  # above 0 TRL would load a reference of its own; `part_loss` sets it
        loss_type=online.learner.loss_name,
        epsilon=online.learner.clip,
        epsilon_high=_highest(online.learner),
        importance_sampling_level=online.learner.ratio,
        # Weighing the KL of old tokens by their ratio makes its gradient unbiased, token by token only.
        use_bias_correction_kl=online.learner.ratio == "token",
        scale_rewards="none",  # advantages are ours
        max_completion_length=online.sampling.max_new_tokens,
        # TRL samples nothing here, but its configuration insists that the groups fill whole batches.
        num_generations=online.group_size,
        per_device_train_batch_size=online.group_size,
        steps_per_generation=1,
    )


def _highest(learner: Learner) -> float:
    """How far a ratio may rise; CISPO bounds the ratio itself, the others its distance from 1."""
    high = learner.clip_high or learner.clip
    return 1 + high if learner.loss_name == "cispo" else high
