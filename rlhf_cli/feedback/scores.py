"""What a reward model says of a group: log-odds and scores on one calibrated scale, length taken off where asked."""

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


def by_rewards(
    version: str, rewards_GK: Array, temperature: float, completions: Sequence[str], penalty: float = 0.0
) -> Scored:
    """Scores from rewards: divided by the model's temperature, less `penalty` for every character.

    Differences of such scores are log-odds, so the penalty is in log-odds a character, whatever scale the rewards have.

    Source: Dong et al. (2024), "RLHF Workflow": the reward less a length penalty, there on the raw scale.
    """
    heads_KG = rewards_GK.T / temperature - penalty * _characters(completions)
    scores_G = heads_KG.mean(0)
    return Scored(version, scores_G[:, None] - scores_G[None, :], heads_KG)


def by_log_odds(
    version: str, logits_GG: Array, temperature: float, completions: Sequence[str], penalty: float = 0.0
) -> Scored:
    """The same for a model that only compares."""
    taken_G = penalty * _characters(completions)
    return Scored(version, logits_GG / temperature - (taken_G[:, None] - taken_G[None, :]))


def score_groups(
    model: RewardModel | PairwiseModel, groups: Sequence[Group], penalty: float = 0.0, version: str = TRAINED
) -> list[Scored]:
    """What `model` says of each of `groups`."""
    texts = [(group.prompt.messages, [c.text for c in group.completions]) for group in groups]
    temperature = model.about.temperature
    if isinstance(model, RewardModel):
        return [
            by_rewards(version, rewards_GK, temperature, completions, penalty)
            for rewards_GK, (_, completions) in zip(model.rewards(texts), texts, strict=True)
        ]
    return [
        by_log_odds(version, logits_GG, temperature, completions, penalty)
        for logits_GG, (_, completions) in zip(model.logits(texts), texts, strict=True)
    ]


def _characters(completions: Sequence[str]) -> Array:
    return np.array([len(text) for text in completions], dtype=np.float64)
