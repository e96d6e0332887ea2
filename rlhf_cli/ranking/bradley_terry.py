"""From the votes of a group to a ranking with honest uncertainty: Bradley-Terry with a Gaussian prior.

P(i beats j) = logistic(s_i - s_j) and s ~ N(0, tau^2), so few, one-sided or disconnected votes give finite scores and
wide intervals, where the plain maximum likelihood does not exist.

Source: Bradley and Terry (1952); Laplace approximation of the posterior at its mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rlhf_cli.types import WinMatrix

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

TAU = 1.5
"""Spread of true scores in logits at which two raters agree on a random pair about 69 % of the time."""

ELO_PER_LOGIT = 400 / math.log(10)
Z95 = 1.959963984540054
_DRAWS = 4096
_LONGEST_STEP = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The posterior over the scores of one group of G completions, in logits; the scores sum to 0."""

    scores: Floats
    covariance: Floats
    """Shape (G, G)."""
    interval95: Floats
    """Lower and upper bound of each score relative to the group's mean, shape (G, 2)."""
    p_best: Floats
    """Probability that a completion is the best of its group; from seeded draws, to about 0.01."""
    votes: Floats
    """Votes that each completion took part in."""
    never_lost: Flags
    never_won: Flags
    no_votes: Flags
    component: npt.NDArray[np.int64]
    """Completions joined by votes, directly or not, share a number; across numbers the prior alone speaks."""

    @property
    def order(self) -> list[int]:
        """Indices of the completions, best first; equal scores keep their order."""
        return [int(i) for i in np.argsort(-self.scores, kind="stable")]

    @property
    def disconnected(self) -> bool:
        """Some completions were never compared, not even through others."""
        return len(set(self.component.tolist())) > 1

    @property
    def elo(self) -> Floats:
        """The scores on the scale that chess made familiar, with mean 1200."""
        return 1200 + ELO_PER_LOGIT * self.scores


def rank(wins: WinMatrix, tau: float = TAU) -> Ranking:
    """Rank one group; `tau` is the prior standard deviation of a score in logits."""
    wins_GG = wins.wins
    scores_G, covariance_GG = fit(wins_GG, tau)
    centre_GG = np.eye(wins.size) - 1 / wins.size
    half_G = Z95 * np.sqrt(np.diagonal(centre_GG @ covariance_GG @ centre_GG).clip(min=0))
    won_G, lost_G = wins_GG.sum(1), wins_GG.sum(0)
    return Ranking(
        scores=scores_G,
        covariance=covariance_GG,
        interval95=np.stack([scores_G - half_G, scores_G + half_G], axis=1),
        p_best=_p_best(scores_G, covariance_GG),
        votes=won_G + lost_G,
        never_lost=(lost_G == 0) & (won_G > 0),
        never_won=(won_G == 0) & (lost_G > 0),
        no_votes=won_G + lost_G == 0,
        component=_components(wins_GG + wins_GG.T > 0),
    )


def fit(wins: Floats, tau: float = TAU) -> tuple[Floats, Floats]:
    """Most probable scores and their covariance, for one group or many at once.

    Args:
        wins: `wins[..., i, j]` votes for i over j, fractional allowed, diagonal 0; shape (G, G) or (B, G, G).
        tau: Prior standard deviation of a score, in logits.

    Returns:
        Scores of shape (..., G), each group's sum is 0, and covariances of shape (..., G, G).

    Raises:
        ValueError: `tau` is not positive, or Newton's method did not settle (counts beyond about 1e12).
    """
    if not tau > 0:
        raise ValueError(f"tau is a standard deviation and must be positive, not {tau}")
    size = wins.shape[-1]
    pairs = wins + np.swapaxes(wins, -1, -2)
    won = wins.sum(-1)
    prior = np.eye(size) / tau**2
    diagonal = np.arange(size)
    scores = np.zeros(wins.shape[:-1])
    for _ in range(100):
        p = 0.5 + 0.5 * np.tanh(0.5 * (scores[..., :, None] - scores[..., None, :]))
        expected = pairs * p
        gradient = won - expected.sum(-1) - scores / tau**2
        precision = prior - expected * (1 - p)
        precision[..., diagonal, diagonal] -= precision.sum(-1) - 1 / tau**2
        covariance = np.linalg.inv(precision)
        step = (covariance @ gradient[..., None])[..., 0]
        # Far from the mode the curvature vanishes and a full step would jump past it.
        longest = np.abs(step).max(-1, keepdims=True, initial=0)
        scores = scores + step * (_LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))
        if longest.max(initial=0) < 1e-7:  # the step was taken, and Newton's error is now the square of this
            return scores, np.asarray(covariance, dtype=np.float64)
    raise ValueError("the fit did not settle: are the vote counts astronomically large?")


@lru_cache(maxsize=32)
def _draws(size: int) -> Floats:
    half = np.random.default_rng(0).standard_normal((_DRAWS // 2, size))
    return np.concatenate([half, -half])


def _p_best(scores_G: Floats, covariance_GG: Floats) -> Floats:
    posterior_NG = scores_G + _draws(len(scores_G)) @ np.linalg.cholesky(covariance_GG).T
    return np.bincount(posterior_NG.argmax(1), minlength=len(scores_G)) / _DRAWS


def _components(met_GG: Flags) -> npt.NDArray[np.int64]:
    size = len(met_GG)
    met_GG = met_GG | np.eye(size, dtype=bool)
    label_G = np.arange(size)
    while True:
        lowest_G = np.where(met_GG, label_G, size).min(1)
        if (lowest_G == label_G).all():
            return np.unique(label_G, return_inverse=True)[1].astype(np.int64)
        label_G = lowest_G
