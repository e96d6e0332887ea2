"""PPO with a critic: climbs the scores of whole completions, each token held to the reference by a penalty of its own.

TRL has no PPO any more, so the engine is the trainer that TRL's trainers share. What a step does, in order: the critic
values every token of the batch; scores and the KL penalty become advantages; then policy and critic take the updates
of the step, both measured against what they said before the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from rlhf_cli.errors import DataError
from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.critic import load_critic
from rlhf_cli.learner.groups import right_aligned
from rlhf_cli.learner.losses import entropy_by_rows
from rlhf_cli.learner.ppo_losses import (
    adapted,
    entropy,
    explained,
    gae,
    policy_loss,
    token_kl,
    token_rewards,
    value_loss,
    whitened,
)
from rlhf_cli.learner.stream_trainer import StreamTrainer, online_settings
from rlhf_cli.learner.watch import check_gradients
from rlhf_cli.policy.generate import chosen_logps, completion_logits, pack
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import RankedGroup

CRITIC = "critic.safetensors"
"""In a checkpoint: the critic's trained weights, and what beta is multiplied by; the optimizer of both is in one."""
_FACTOR = "beta_factor"
ROWS_AT_ONCE = 32
"""Completions that the critic values together before a step."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What stays the same in all updates of a step: shape (R, T) each, the completions of all its groups in rows."""

    rows: dict[str, range]
    """Of each group, by its id."""
    old_logps: Tensor
    ref_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


class PPOTrainer(StreamTrainer):
    """Takes steps on groups whose scores are there, with a critic that starts as the reward model in `reward_model`."""

    def __init__(
        self,
        policy: Policy,
        batches: Iterable[Batch],
        recipe: Recipe,
        output_dir: Path,
        callbacks: list[TrainerCallback],
        reward_model: Path,
    ) -> None:
        self.critic = load_critic(reward_model, policy.tokenizer, recipe.model, policy.model.device, recipe.seed)
        self.beta_factor = 1.0
        """What the recipe's beta is multiplied by, where it adapts to a target."""
        super().__init__(
            policy,
            batches,
            recipe,
            args=TrainingArguments(**online_settings(recipe, output_dir)),
            callbacks=callbacks,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """One optimizer for both, so that one checkpoint holds the state of both; the critic has its learning rate."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            decayed = set(self.get_decay_parameter_names(self.critic))
            named = [(name, p) for name, p in self.critic.named_parameters() if p.requires_grad]
            for weight_decay, params in [
                (self.args.weight_decay, [p for name, p in named if name in decayed]),
                (0.0, [p for name, p in named if name not in decayed]),
            ]:
                rate = self.learner.value_learning_rate or self.learner.learning_rate
                optimizer.add_param_group({"params": params, "lr": rate, "weight_decay": weight_decay})
        return self.optimizer

    def begin_step(self, groups: Sequence[RankedGroup], beta: float) -> None:
        completions = [c for g in groups for c in g.group.completions]
        inputs = self._pack(groups)
        device, longest = self.accelerator.device, int(inputs["lengths_B"].max())
        mask_RT = torch.arange(longest, device=device) >= longest - inputs["lengths_B"][:, None]
        logp_RT = right_aligned([c.logps for c in completions], device)
        ref_logp_RT = right_aligned([c.ref_logps for c in completions], device)
        score_R = torch.tensor([score for g in groups for score in self._scores(g)], device=device)
        values_RT = self._values(inputs, longest)
        self.beta = beta * self.beta_factor
        rewards_RT = token_rewards(score_R, logp_RT, ref_logp_RT, mask_RT, self.beta)
        advantages_RT = gae(rewards_RT, values_RT, mask_RT, self.learner.gamma, self.learner.gae_lambda)
        returns_RT = advantages_RT + values_RT
        rows, start = {}, 0
        for g in groups:
            rows[g.group.id] = range(start, start + len(g.group.completions))
            start += len(g.group.completions)
        self.targets = Targets(rows, logp_RT, ref_logp_RT, values_RT, whitened(advantages_RT, mask_RT), returns_RT)
        foresaw = explained(values_RT, returns_RT, mask_RT)
        self.figures.add(len(completions), {"train/score": float(score_R.mean())})
        if foresaw is not None:
            self.figures.add(1, {"train/value_explained": foresaw})
        if self.learner.kl_target_nats is not None:
            kl_nats = float((logp_RT - ref_logp_RT).sum(1).mean())
            self.beta_factor = adapted(self.beta_factor, kl_nats, self.learner.kl_target_nats)

    @property
    def step_metrics(self) -> dict[str, float]:
        return {**super().step_metrics, "train/beta": self.beta}

    def part_loss(self, model: Any, part: Sequence[RankedGroup], whole: Sequence[RankedGroup], beta: float) -> Tensor:
        learner, targets, inputs = self.learner, self.targets, self._pack(part)
        with self.policy.autocast():
            logits_RTV, mask_RT = completion_logits(model, **inputs)
            values_RT = self.critic(**inputs)
        logp_RT = chosen_logps(logits_RTV, inputs["ids_BT"])
        entropy_RT = entropy(logits_RTV) if learner.entropy > 0 else entropy_by_rows(logits_RTV)

        rows = [r for g in part for r in targets.rows[g.group.id]]
        width = logp_RT.shape[1]
        old_logp_RT, ref_logp_RT = targets.old_logps[rows, -width:], targets.ref_logps[rows, -width:]
        old_values_RT, returns_RT = targets.old_values[rows, -width:], targets.returns[rows, -width:]
        advantages_RT = targets.advantages[rows, -width:]
        climb_RT, held_RT = policy_loss(
            logp_RT, old_logp_RT, advantages_RT, learner.clip, learner.clip_high or learner.clip
        )
        miss_RT, value_held_RT = value_loss(values_RT, old_values_RT, returns_RT, learner.value_clip)
        loss_RT = climb_RT + learner.value_coefficient * miss_RT - learner.entropy * entropy_RT
        with torch.no_grad():
            figures = {
                "train/policy_loss": climb_RT,
                "train/value_loss": miss_RT,
                "train/entropy_nats": entropy_RT,
                "train/ratio_mean": (logp_RT - old_logp_RT).exp(),
                "train/clip_frac": held_RT.float(),
                "train/kl_token_nats": token_kl(logp_RT, ref_logp_RT),
                "train/value_clip_frac": value_held_RT.float(),
            }
            tokens = int(mask_RT.sum())
            self.figures.add(tokens, {name: float(x_RT[mask_RT].mean()) for name, x_RT in figures.items()})
        return loss_RT[mask_RT].sum() / sum(len(c.token_ids) for g in whole for c in g.group.completions)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Policy and critic are clipped each by its own norm: the errors of the one say nothing about the other."""
        advice = "Lower run_online.learner.value_learning_rate and start over with --fresh."
        check_gradients(self.critic, self.state.global_step + 1, advice)
        norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
        self.figures.add(1, {"train/value_grad_norm": float(norm)})
        return super()._clip_grad_norm(model)

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        weights = {name: p.detach().cpu().contiguous() for name, p in self._critic_weights().items()}
        save_file({**weights, _FACTOR: torch.tensor(self.beta_factor, dtype=torch.float64)}, folder / CRITIC)

    def load_extra(self, folder: Path) -> None:
        super().load_extra(folder)
        saved = load_file(folder / CRITIC)
        self.beta_factor = float(saved.pop(_FACTOR))
        with torch.no_grad():
            for name, parameter in self._critic_weights().items():
                parameter.copy_(saved[name])

    def _critic_weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.critic.named_parameters() if p.requires_grad}

    def _scores(self, ranked: RankedGroup) -> list[float]:
        if ranked.scores is None:
            raise DataError(
                f"group {ranked.group.id} came back from {ranked.source} without scores, which ppo climbs: "
                "use feedback that gives scores, reward_model (bradley_terry) or function"
            )
        unended = self.learner.unended_reward
        return [
            score if unended is None or c.ended else unended
            for score, c in zip(ranked.scores, ranked.group.completions, strict=True)
        ]

    @torch.no_grad()
    def _values(self, inputs: dict[str, Tensor], longest: int) -> Tensor:
        """What the critic expects as it is now, shape (R, longest)."""
        values_RT = torch.zeros(len(inputs["ids_BT"]), longest, device=self.accelerator.device)
        for start in range(0, len(values_RT), ROWS_AT_ONCE):
            some = {name: x[start : start + ROWS_AT_ONCE] for name, x in inputs.items()}
            with self.policy.autocast():
                part_RT = self.critic(**some)
            values_RT[start : start + ROWS_AT_ONCE, longest - part_RT.shape[1] :] = part_RT
        return values_RT

    def _pack(self, groups: Sequence[RankedGroup]) -> dict[str, Tensor]:
        prompts = [g.group.prompt_ids for g in groups for _ in g.group.completions]
        completions = [c.token_ids for g in groups for c in g.group.completions]
        return pack(prompts, completions, self.policy.pad_id, self.accelerator.device)
