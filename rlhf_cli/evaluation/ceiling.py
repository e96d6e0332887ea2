"""How well raters predict each other: what a reward model can be measured against, and no better than."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np

from rlhf_cli.evaluation.calibration import Floats
from rlhf_cli.recipe.votes import VotedGroup, rated_wins

SPLITS = 20


class Halves(NamedTuple):
    """One half of the raters against the other, pair by pair; 0 where a pair cannot be split."""

    agreed: Floats
    """Expected share of splits in which the halves prefer the same completion, a half without a majority counting half;
    times `decided`."""
    decided: Floats
    """Expected share of splits in which the half that is predicted has a majority."""


def split_half(group: VotedGroup) -> Halves | None:
    """Split the raters of each pair in halves; None where nobody is known to have voted twice on anything.

    Votes are split in all ways at once, exactly; ratings of texts in 20 random ways that follow from the texts alone.
    Halves of an odd number differ by one, and each half predicts the other.
    """
    size = len(group.completions)
    agreed_GG, decided_GG = np.zeros((size, size)), np.zeros((size, size))
    if group.ratings:
        for n in range(SPLITS):
            first, second = _split_ratings(group, n)
            for said, truth in ((first, second), (second, first)):
                decided_GG += (truth != 0) / (2 * SPLITS)
                agreed_GG += np.where(truth == 0, 0, (1 + said * truth) / 2) / (2 * SPLITS)
        once = [k for k, ratings in enumerate(group.ratings) if len(ratings) < 2]
        agreed_GG[once, :] = agreed_GG[:, once] = decided_GG[once, :] = decided_GG[:, once] = 0
    else:
        for i in range(size):
            for j in range(i + 1, size):
                counts = _counts(group, i, j)
                if counts is not None and sum(counts) > 1:
                    agreed, decided = _exactly(*counts)
                    agreed_GG[i, j] = agreed_GG[j, i] = agreed
                    decided_GG[i, j] = decided_GG[j, i] = decided
    return Halves(agreed_GG, decided_GG) if decided_GG.any() else None


def corrected(agreement: float) -> float:
    """From the agreement of two halves to that of all raters with somebody who knows what they think on average.

    Assumes that differences between completions and the raters' errors are normal: then signs agree as
    1/2 + asin(r) / pi (Sheppard 1899), the reliability r of a half becomes 2 r / (1 + r) for all (Spearman 1910, Brown
    1910), and its root is the correlation of all raters with the truth.
    """
    half = max(0.0, math.sin(math.pi * (agreement - 0.5)))
    return 0.5 + math.asin(math.sqrt(2 * half / (1 + half))) / math.pi


def _split_ratings(group: VotedGroup, n: int) -> tuple[Floats, Floats]:
    """Who is preferred, 1, -1 or 0 for no majority, by the n-th two halves of each text's raters."""
    halves: tuple[list[list[float]], list[list[float]]] = ([], [])
    for text, ratings in zip(group.completions, group.ratings, strict=True):
        rng = np.random.default_rng([n, *hashlib.sha256(text.encode()).digest()])
        shuffled = rng.permutation(np.sort(ratings)).tolist()
        middle = (len(shuffled) + int(rng.integers(2))) // 2 if len(shuffled) > 1 else 1
        halves[0].append(shuffled[:middle])
        halves[1].append(shuffled[middle:] or shuffled)
    first, second = (rated_wins(half).wins for half in halves)
    return np.sign(first - first.T), np.sign(second - second.T)


def _counts(group: VotedGroup, i: int, j: int) -> tuple[int, int, int] | None:
    """Raters for i, for j and for a tie; None where weighted votes do not say.

    A matrix alone shows a tie only as half a vote each way, so two ties look like one vote each way there.
    """
    if group.rater_wins:
        signs = [np.sign(w.wins[i, j] - w.wins[j, i]) for w in group.rater_wins if w.wins[i, j] + w.wins[j, i] > 0]
        return signs.count(1), signs.count(-1), signs.count(0)
    won, lost = group.wins.wins[i, j], group.wins.wins[j, i]
    part, other = won % 1, lost % 1
    if part != other or part not in (0, 0.5):
        return None
    return int(won), int(lost), int(part * 2)


@lru_cache(maxsize=4096)
def _exactly(won: int, lost: int, tied: int) -> tuple[float, float]:
    """`agreed` and `decided` over all ways of splitting so many votes, each half predicting the other."""
    votes = won + lost + tied
    size = votes // 2
    agreed = decided = 0.0
    for a in range(won + 1):
        for b in range(max(0, size - a - tied), min(lost, size - a) + 1):
            share = comb(won, a) * comb(lost, b) * comb(tied, size - a - b) / comb(votes, size)
            one, other = a - b, (won - a) - (lost - b)
            decided += share * ((one != 0) + (other != 0)) / 2
            same = 0.0 if not one and not other else 0.5 if not one or not other else 2.0 * (one * other > 0)
            agreed += share * same / 2
    return agreed, decided
