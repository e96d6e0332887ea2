"""What a reward model says of a group: log-odds and scores on one calibrated scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cli.policy.scoring import Array, PairwiseModel, RewardModel
from rlhf_cli.types import Group

TRAINED = "train_rm"
"""Version of the model that `train-rm` left."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A model's opinion of the completions of one group, before anybody else is asked."""

    version: str
    """Of the model."""
    log_odds: Array
    """Shape (G, G), antisymmetric: that i is better than j."""
    heads: Array | None = None
    """Shape (K, G), a row for each head of an ensemble, one where there is none; differences in a row are log-odds.
    None where the model only compares."""

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.log_odds).all())

    @property
    def scores(self) -> Array | None:
        """Shape (G,): the mean over the heads, whose differences are `log_odds`."""
        return None if self.heads is None else np.asarray(self.heads.mean(0))

    @property
    def spread(self) -> Array | None:
        """Shape (G,): standard deviation over the heads; None with fewer than two."""
        return None if self.heads is None or len(self.heads) < 2 else np.asarray(self.heads.std(0, ddof=1))

    @property
    def probabilities(self) -> Array:
        """Shape (G, G): that i is better than j; 1/2 against itself."""
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * self.log_odds))  # logistic, without overflow


def by_rewards(version: str, rewards_GK: Array, temperature: float) -> Scored:
    """Rewards divided by the model's temperature, so that differences are log-odds."""
    heads_KG = rewards_GK.T / temperature
    scores_G = heads_KG.mean(0)
    return Scored(version, scores_G[:, None] - scores_G[None, :], heads_KG)


def less_length(scored: Scored, completions: Sequence[str], penalty: float) -> Scored:
    """The same without `penalty` for every character, in log-odds: whatever scale the rewards have, it means the same.

    Source: Dong et al. (2024), "RLHF Workflow": the reward less a length penalty, there on the raw scale.
    """
    taken_G = penalty * np.array([len(text) for text in completions], dtype=np.float64)
    log_odds_GG = scored.log_odds - (taken_G[:, None] - taken_G[None, :])
    return Scored(scored.version, log_odds_GG, None if scored.heads is None else scored.heads - taken_G)


def score_groups(model: RewardModel | PairwiseModel, groups: Sequence[Group], version: str = TRAINED) -> list[Scored]:
    """What `model` says of each of `groups`."""
    texts = [(group.prompt.messages, [c.text for c in group.completions]) for group in groups]
    temperature = model.about.temperature
    if isinstance(model, RewardModel):
        return [by_rewards(version, rewards_GK, temperature) for rewards_GK in model.rewards(texts)]
    return [Scored(version, logits_GG / temperature) for logits_GG in model.logits(texts)]
