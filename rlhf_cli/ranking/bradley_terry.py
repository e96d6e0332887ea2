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

from rlhf_cli.ranking.intervals import Estimate
from rlhf_cli.types import WinMatrix

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

TAU = 1.5
"""Spread of true scores in logits at which two raters agree on a random pair about 69 % of the time."""

ELO_PER_LOGIT = 400 / math.log(10)
Z95 = 1.959963984540054
_DRAWS = 8192

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
"""Mean over a standard normal variable: the sum of `WEIGHTS` times a function's values at `NODES`."""
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
    below_min_votes: bool
    """The group has fewer votes than it was to get at least, so its order is not to be relied on."""
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

    def difference(self, i: int, j: int) -> Estimate:
        """How far completion i is ahead of j in logits, with its 95 % interval."""
        ahead = float(self.scores[i] - self.scores[j])
        half = Z95 * float(difference_spread(self.covariance)[i, j])
        return Estimate(ahead, ahead - half, ahead + half)

    def preferences(self, handicaps: Floats | float = 0.0) -> Floats:
        """Probability that the next vote prefers i over j, shape (G, G); 0.5 on the diagonal.

        The uncertainty of the scores is averaged over, so few votes give probabilities near 0.5.

        Args:
            handicaps: Taken from the scores before, shape (G,).
        """
        scores_G = self.scores - handicaps
        ahead_GGN = (scores_G[:, None] - scores_G[None, :])[..., None]
        ahead_GGN = ahead_GGN + difference_spread(self.covariance)[..., None] * NODES
        p_GG: Floats = (0.5 + 0.5 * np.tanh(0.5 * ahead_GGN)) @ WEIGHTS
        return p_GG

    @property
    def elo(self) -> Floats:
        """The scores on the scale that chess made familiar, with mean 1200."""
        return 1200 + ELO_PER_LOGIT * self.scores


def rank(wins: WinMatrix, tau: float = TAU, min_votes: float = 1) -> Ranking:
    """Rank one group.

    Args:
        tau: Prior standard deviation of a score in logits, from `prior.fit_tau` once there are groups to fit it to.
        min_votes: With fewer votes than this the group is flagged.
    """
    wins_GG = wins.wins
    scores_G, covariance_GG = fit(wins_GG, tau)
    centre_GG = np.eye(wins.size) - 1 / wins.size
    half_G = Z95 * np.sqrt(np.diagonal(centre_GG @ covariance_GG @ centre_GG).clip(min=0))
    won_G, lost_G = wins_GG.sum(1), wins_GG.sum(0)
    return Ranking(
        scores=scores_G,
        covariance=covariance_GG,
        interval95=np.stack([scores_G - half_G, scores_G + half_G], axis=1),
        p_best=p_best(scores_G, covariance_GG),
        votes=won_G + lost_G,
        never_lost=(lost_G == 0) & (won_G > 0),
        never_won=(won_G == 0) & (lost_G > 0),
        no_votes=won_G + lost_G == 0,
        below_min_votes=wins.votes < min_votes,
        component=components(wins_GG + wins_GG.T > 0),
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
        # Exactly, it sums to 0; with a wide prior nothing else would hold back what rounding adds to all scores alike.
        step = step - step.mean(-1, keepdims=True) if size else step
        # Far from the mode the curvature vanishes and a full step would jump past it.
        longest = np.abs(step).max(-1, keepdims=True, initial=0)
        scores = scores + step * (_LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))
        if longest.max(initial=0) < 1e-7:  # the step was taken, and Newton's error is now the square of this
            return scores, np.asarray(covariance, dtype=np.float64)
    raise ValueError("the fit did not settle: are the vote counts astronomically large?")


def difference_spread(covariance: Floats) -> Floats:
    """Standard deviation of `s_i - s_j` for all i and j, shape (..., G, G); 1.96 of them make a 95 % interval."""
    variance = np.diagonal(covariance, axis1=-2, axis2=-1)
    spread: Floats = np.sqrt((variance[..., :, None] + variance[..., None, :] - 2 * covariance).clip(min=0))
    return spread


def p_best(scores_G: Floats, covariance_GG: Floats) -> Floats:
    """Probability that each completion is the best of its group; the same draws every time, right to about 0.01."""
    posterior_GN = np.linalg.cholesky(covariance_GG) @ _draws(len(scores_G))
    posterior_GN += scores_G[:, None]  # in place: a second array of this size doubles the time
    share_G: Floats = (posterior_GN == posterior_GN.max(0)).mean(1)
    return share_G


@lru_cache(maxsize=32)
def _draws(size: int) -> Floats:
    half = np.random.default_rng(0).standard_normal((size, _DRAWS // 2))
    return np.concatenate([half, -half], axis=1)


def components(met_GG: Flags) -> npt.NDArray[np.int64]:
    """Number the islands of a group: completions joined by comparisons, directly or not, share a number."""
    size = len(met_GG)
    reached_GG = met_GG | np.eye(size, dtype=bool)
    for _ in range(size.bit_length()):  # every round doubles the length of the paths that are followed
        reached_GG = reached_GG @ reached_GG
    return np.unique(reached_GG.argmax(1), return_inverse=True)[1].astype(np.int64)
