"""Which pair of a group to show next. Pure: votes, pairs in flight and randomness go in, a pair comes out.

Every goal begins alike: a random perfect matching, then a chain through what the matching left apart, so that the
comparison graph is connected after G - 1 votes and no score rests on the prior alone.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from rlhf_cli.ranking.bradley_terry import NODES, TAU, WEIGHTS, Flags, Floats, components, difference_spread, fit
from rlhf_cli.types import WinMatrix

Pair = tuple[int, int]
"""Two places in a group, the smaller one first."""

Goal = Literal["ranking", "best", "balanced"]
"""`ranking` orders the whole group, `best` finds its winner, `balanced` compares every pair equally often."""


def choose_pair(
    wins: WinMatrix,
    in_flight: Mapping[Pair, int],
    forbidden: Collection[Pair],
    rng: random.Random,
    goal: Goal = "ranking",
    tau: float = TAU,
) -> Pair | None:
    """The next pair for a rater; None when there is none that the rater may get.

    Args:
        wins: The votes so far.
        in_flight: How many raters each pair is with at this moment.
        forbidden: Pairs that this rater must not get, usually those judged before.
        rng: Breaks ties, and draws what `best` compares.
        tau: Prior standard deviation of a score in logits.
    """
    size = wins.size
    flying_GG, allowed_GG = np.zeros((size, size)), np.ones((size, size), dtype=bool)
    for (i, j), raters in in_flight.items():
        flying_GG[i, j] = flying_GG[j, i] = raters
    for i, j in forbidden:
        allowed_GG[i, j] = allowed_GG[j, i] = False
    i_P, j_P = _pairs(size)
    allowed_P = allowed_GG[i_P, j_P]
    if not allowed_P.any():
        return None

    shown_GG = wins.wins + wins.wins.T + flying_GG
    times_G, island_G = shown_GG.sum(1), components(shown_GG > 0)
    joining_P = allowed_P & (island_G[i_P] != island_G[j_P])
    if joining_P.any():
        # Two that nobody has seen come before all; the ends of a chain were shown least, so it grows at its ends.
        best_P = _least(joining_P, times_G[i_P] + times_G[j_P])
    elif goal == "balanced":
        best_P = _least(_least(allowed_P, shown_GG[i_P, j_P]), times_G[i_P] + times_G[j_P])
    elif goal == "ranking":
        best_P = _least(allowed_P, -_information_gain(wins.wins, flying_GG, tau))
    else:
        np.fill_diagonal(allowed_GG, False)
        return _thompson(wins.wins, allowed_GG, rng, tau)
    chosen = rng.choice(np.flatnonzero(best_P).tolist())
    return int(i_P[chosen]), int(j_P[chosen])


@lru_cache(maxsize=32)
def _pairs(size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    return np.triu_indices(size, 1)


def _least(among_P: Flags, value_P: Floats) -> Flags:
    least_P: Flags = among_P & (value_P == value_P[among_P].min())
    return least_P


def _information_gain(wins_GG: Floats, flying_GG: Floats, tau: float) -> Floats:
    """How many nats one more vote on each pair is expected to say about the scores, after the votes in flight.

    Source: Lindley (1956); as in Mikhailiuk et al. (2021), but exact for one pair, since a vote depends on the scores
    through one difference alone.
    """
    scores_G, covariance_GG = fit(wins_GG, tau)
    if flying_GG.any():
        # What they will say is unknown, so the scores stay; that they will say something narrows the posterior.
        p_GG = _logistic(scores_G[:, None] - scores_G[None, :])
        weight_GG = flying_GG * p_GG * (1 - p_GG)
        precision_GG = np.linalg.inv(covariance_GG) + np.diag(weight_GG.sum(1)) - weight_GG
        covariance_GG = np.asarray(np.linalg.inv(precision_GG), dtype=np.float64)
    i_P, j_P = _pairs(len(scores_G))
    spread_P = difference_spread(covariance_GG)[i_P, j_P]
    ahead_PN = (scores_G[i_P] - scores_G[j_P])[:, None] + spread_P[:, None] * NODES
    p_PN = _logistic(ahead_PN)
    entropy_PN = np.logaddexp(0, ahead_PN) - ahead_PN * p_PN
    p_P = (p_PN @ WEIGHTS).clip(1e-12, 1 - 1e-12)
    gain_P: Floats = -p_P * np.log(p_P) - (1 - p_P) * np.log1p(-p_P) - entropy_PN @ WEIGHTS
    return gain_P


def _thompson(wins_GG: Floats, allowed_GG: Flags, rng: random.Random, tau: float) -> Pair:
    """Two draws of the scores: the best of the first meets the best of the second.

    Votes in flight need no care here: every rater's pair comes from draws of its own.

    Source: double Thompson sampling, Wu and Liu (2016), with Bradley-Terry's posterior.
    """
    scores_G, covariance_GG = fit(wins_GG, tau)
    standard_G2 = np.random.default_rng(rng.getrandbits(64)).standard_normal((len(scores_G), 2))
    drawn_G2 = scores_G[:, None] + np.linalg.cholesky(covariance_GG) @ standard_G2
    first = int(np.where(allowed_GG.any(1), drawn_G2[:, 0], -np.inf).argmax())
    second = int(np.where(allowed_GG[first], drawn_G2[:, 1], -np.inf).argmax())
    return min(first, second), max(first, second)


def _logistic(logit: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(0.5 * logit)
