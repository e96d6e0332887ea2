"""Does a model that says 80 % turn out right in 80 of 100 votes? Measured, and put right by one number.

Arrays end in `_P` where they run over pairs of completions.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.ranking.intervals import Estimate, clustered_share, t_quantile_975

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PAIRS_A_BIN = 25
MOST_BINS = 10
_WIDEST = 1e3


class Pairs(NamedTuple):
    """Arrays over P."""

    margins: Floats
    """The model's log-odds that the first completion is preferred."""
    won: Floats
    """Votes for the first; a tie is half a vote each way."""
    lost: Floats
    """Votes for the second."""
    clusters: Ints
    """Number of the pair's prompt."""

    def at(self, chosen: Any) -> Pairs:
        """Some of the pairs."""
        return Pairs(*(values[chosen] for values in self))


class Temperature(NamedTuple):
    """What log-odds are divided by; above 1 they promised too much."""

    value: float
    low: float | None
    """Bounds of the 95 % interval; None where there is none."""
    high: float | None
    problem: str | None
    """Why the votes do not settle it, in words."""


class Bin(NamedTuple):
    """Pairs about which the model is about equally sure."""

    low: float
    """Probability of the preferred completion, from .5 up."""
    high: float
    said: float
    """Mean probability, over votes."""
    was: Estimate
    """Share of the votes that went the model's way, with its 95 % interval, clustered by prompt."""
    votes: float
    pairs: int


class Reliability(NamedTuple):
    bins: list[Bin]
    ece: float
    ece_by_chance: float
    """What `ece` would be on average if every probability were right, from the noise of so many votes alone."""
    excess: Estimate
    """By how much the model is surer than right, over all votes, with its 95 % interval."""
    nll_nats: float
    """Mean surprise of a vote; a coin has 0.693."""


def is_fitting_half(key: str) -> bool:
    """Whether the group of this key fits the temperature (or is one that figures are reported on)."""
    return hashlib.sha256(f"calibration {key}".encode()).digest()[0] < 128


def fit_temperature(pairs: Pairs) -> Temperature:
    """The temperature T at which sigmoid(margin / T) makes the votes likeliest.

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2, for soft outcomes. By b = 1 / T
    it is a logistic regression through the origin, solved by bisection of its monotone derivative. The interval is
    the sandwich of Liang and Zeger (1986) on log T, clustered by prompt.
    """
    margins, won, lost, clusters = pairs.at(pairs.margins != 0)
    size = float(np.sqrt(np.mean(margins**2))) if len(margins) else 0.0
    if not size:
        return Temperature(1.0, None, None, "no pair of the fitting half has two different scores and a vote")
    low, high = 1 / (size * _WIDEST), _WIDEST / size
    if _slope(low, margins, won, lost) >= 0:
        return Temperature(1 / low, None, None, "in the fitting half the model does no better than chance")
    if _slope(high, margins, won, lost) <= 0:
        return Temperature(1.0, None, None, "in the fitting half every vote goes the model's way, so it has no limit")
    while high / low > 1 + 1e-10:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if _slope(middle, margins, won, lost) < 0 else (low, middle)
    b = float(np.sqrt(low * high))
    p = sigmoid(b * margins)
    pulls = np.bincount(np.unique(clusters, return_inverse=True)[1], margins * (won - (won + lost) * p))
    if len(pulls) < 2:
        return Temperature(1 / b, None, None, None)
    information = float(np.sum((won + lost) * margins**2 * p * (1 - p)))
    spread = float(np.sqrt(np.sum(pulls**2) * len(pulls) / (len(pulls) - 1))) / information / b
    factor = float(np.exp(min(t_quantile_975(len(pulls) - 1) * spread, 50.0)))
    return Temperature(1 / b, 1 / b / factor, factor / b, None)


def reliability(pairs: Pairs, temperature: float) -> Reliability:
    """How often the model is right where it says how sure it is.

    Each pair is looked at from the completion that the model prefers, so it does not matter which one came first. Bins
    hold about the same number of votes: ten, or fewer so that a bin has 25 pairs. ECE is the mean over votes of
    |said - was| of the bins; with few pairs it is too large, because bins also differ by chance: `ece_by_chance`.

    Raises:
        ValueError: No votes.

    Source: Naeini, Cooper and Hauskrecht (2015), with the equal-mass bins of Nguyen and O'Connor (2015). By chance:
    E|x| = sd * sqrt(2 / pi) of a normal x, with the variance of independent votes.
    """
    votes_P = pairs.won + pairs.lost
    if not votes_P.sum():
        raise ValueError("no votes, so there is nothing to compare the probabilities with")
    said_P = sigmoid(np.abs(pairs.margins) / temperature)
    right_P = np.where(pairs.margins > 0, pairs.won, pairs.lost)
    right_P = np.where(pairs.margins == 0, votes_P / 2, right_P)
    bins, ece, by_chance = [], 0.0, 0.0
    for inside in _equal_mass(said_P, votes_P, int(np.clip(len(votes_P) // PAIRS_A_BIN, 2, MOST_BINS))):
        n, said = votes_P[inside], said_P[inside]
        total = float(n.sum())
        mean = float(np.sum(n * said)) / total
        was = clustered(right_P[inside], n, pairs.clusters[inside])
        bins.append(Bin(float(said.min()), float(said.max()), mean, was, total, len(n)))
        ece += total * abs(mean - was.mean)
        by_chance += float(np.sqrt(2 / np.pi * np.sum(n * said * (1 - said))))
    total = float(votes_P.sum())
    right = clustered(right_P, votes_P, pairs.clusters)
    return Reliability(
        bins=bins,
        ece=ece / total,
        ece_by_chance=by_chance / total,
        excess=_excess(said_P, right_P, votes_P, pairs.clusters, right.mean),
        nll_nats=float(
            np.sum(
                pairs.won * np.logaddexp(0, -pairs.margins / temperature)
                + pairs.lost * np.logaddexp(0, pairs.margins / temperature)
            )
            / total
        ),
    )


def clustered(part_P: Floats, total_P: Floats, clusters_P: Ints) -> Estimate:
    """`clustered_share` of arrays."""
    _, place_P = np.unique(clusters_P, return_inverse=True)
    parts, totals = np.bincount(place_P, part_P), np.bincount(place_P, total_P)
    return clustered_share(list(zip(parts.tolist(), totals.tolist(), strict=True)))


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _slope(b: float, margins: Floats, won: Floats, lost: Floats) -> float:
    """Derivative of the negative log-likelihood by b = 1 / T."""
    p = sigmoid(b * margins)
    return float(np.sum(margins * ((won + lost) * p - won)))


def _equal_mass(said_P: Floats, votes_P: Floats, bins: int) -> list[Ints]:
    """Indices of the pairs of each bin; pairs with the same probability stay together."""
    levels, level_P = np.unique(said_P, return_inverse=True)
    mass = np.bincount(level_P, votes_P, len(levels))
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    bin_P = np.minimum((middle * bins).astype(int), bins - 1)[level_P]
    return [found for k in range(bins) if votes_P[found := np.flatnonzero(bin_P == k)].sum() > 0]


def _excess(said_P: Floats, right_P: Floats, votes_P: Floats, clusters_P: Ints, right: float) -> Estimate:
    total = float(votes_P.sum())
    excess = float(np.sum(votes_P * said_P)) / total - right
    pulls = np.bincount(np.unique(clusters_P, return_inverse=True)[1], votes_P * said_P - right_P - excess * votes_P)
    if len(pulls) < 2:
        return Estimate(excess, -1.0, 1.0)
    half = float(np.sqrt(np.sum(pulls**2) * len(pulls) / (len(pulls) - 1))) / total * t_quantile_975(len(pulls) - 1)
    return Estimate(excess, max(-1.0, excess - half), min(1.0, excess + half))
