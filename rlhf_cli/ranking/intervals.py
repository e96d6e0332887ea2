"""Intervals over prompts: answers to one prompt share its luck, so the prompt is the unit that counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean, variance
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def clustered_mean(values_by_cluster: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the clusters' means, every cluster counting alike; clusters without values are left out.

    With a single cluster nothing is known about the spread, and the bounds are infinite.

    Raises:
        ValueError: No cluster has a value.

    Source: Student (1908) on the cluster means; the small-sample case of Bell and McCaffrey (2002) for a mean.
    """
    means = [fmean(values) for values in values_by_cluster if len(values)]
    if not means:
        raise ValueError("no values, so there is no mean")
    mean = fmean(means)
    if len(means) == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = t_quantile_975(len(means) - 1) * math.sqrt(variance(means) / len(means))
    return Estimate(mean, mean - half, mean + half)


def win_rate(wins_losses_by_prompt: Sequence[tuple[float, float]]) -> Estimate:
    """Mean over prompts of the share of comparisons won, a tie being half a win and half a loss.

    The interval stays inside [0, 1] and keeps its width where every prompt went the same way.

    Raises:
        ValueError: No prompt has a comparison.

    Source: Wilson (1927), with the effective sample size and t quantile of Korn and Graubard (1998) for clusters.
    """
    compared = [(wins, wins + losses) for wins, losses in wins_losses_by_prompt if wins + losses > 0]
    if not compared:
        raise ValueError("no comparisons, so there is no win rate")
    shares = [wins / total for wins, total in compared]
    prompts, rate = len(shares), fmean(shares)
    if prompts == 1:
        return Estimate(rate, 0.0, 1.0)
    spread = variance(shares) / prompts
    comparisons = sum(total for _, total in compared)
    n = min(rate * (1 - rate) / spread, max(comparisons, prompts)) if spread > 1e-12 else prompts
    return _wilson(rate, n, prompts - 1)


def clustered_share(parts_totals_by_cluster: Sequence[tuple[float, float]]) -> Estimate:
    """Share of all cases, every case counting alike, where cases of one cluster share its luck.

    The interval stays inside [0, 1] and keeps its width where every case went the same way.

    Raises:
        ValueError: There are no cases.

    Source: the ratio estimate with its linearised variance, Cochran (1977), chapter 6; interval as in `win_rate`.
    """
    counted = [(part, total) for part, total in parts_totals_by_cluster if total > 0]
    if not counted:
        raise ValueError("no cases, so there is no share")
    cases, clusters = sum(total for _, total in counted), len(counted)
    share = min(1.0, sum(part for part, _ in counted) / cases)
    if clusters == 1:
        return Estimate(share, 0.0, 1.0)
    residuals = sum((part - share * total) ** 2 for part, total in counted)
    spread = residuals * clusters / (clusters - 1) / cases**2
    n = min(share * (1 - share) / spread, max(cases, clusters)) if spread > 1e-12 else clusters
    return _wilson(share, n, clusters - 1)


def _wilson(rate: float, n: float, freedom: int) -> Estimate:
    t2 = t_quantile_975(freedom) ** 2
    middle = (rate + t2 / (2 * n)) / (1 + t2 / n)
    half = math.sqrt(t2 * (rate * (1 - rate) / n + t2 / (4 * n * n))) / (1 + t2 / n)
    return Estimate(rate, max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half)))


@lru_cache(maxsize=256)
def t_quantile_975(freedom: int) -> float:
    """The value that Student's t with `freedom` degrees of freedom exceeds with probability 0.025.

    Source: the finite series for the distribution, Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, by bisection.
    """
    low, high = 1.9, 13.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """Probability that |T| <= t."""
    theta = math.atan(t / math.sqrt(freedom))
    cos2 = math.cos(theta) ** 2
    odd = freedom % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cos2 * k / (k + 1)
    if not odd:
        return math.sin(theta) * total
    return 2 / math.pi * (theta + math.sin(theta) * total)


def detectable_win_rate(prompts: int, votes_per_prompt: float, power_z: float = 0.8416) -> float | None:
    """The smallest true win rate above one half that a 95 % interval over so many prompts excludes with 80 % power.

    Votes on one prompt are taken as independent; `votes_per_prompt=1` is the other extreme, where they all agree. None
    where even a win rate of 1 would not be found.

    Source: the one-sample formula, p - 1/2 = (t * sqrt(1/4) + z * sqrt(p (1 - p))) / sqrt(n), of Fleiss, Levin and Paik
    (2003), chapter 2, with the t quantile of the prompts in place of the normal one; solved for p by bisection.
    """
    if prompts < 2:
        return None
    n = prompts * votes_per_prompt

    def found(p: float) -> bool:
        return (p - 0.5) * math.sqrt(n) >= t_quantile_975(prompts - 1) * 0.5 + power_z * math.sqrt(p * (1 - p))

    if not found(1.0):
        return None
    low, high = 0.5, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high
