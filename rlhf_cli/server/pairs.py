"""Which pair of a group to show next. Pure: what was shown goes in, a pair comes out."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from itertools import combinations

Pair = tuple[int, int]
"""Two places in a group, the smaller one first."""


def choose_pair(size: int, shown: Mapping[Pair, int], seen: Collection[Pair], rng: random.Random) -> Pair | None:
    """The next pair for a rater; None when the rater has seen all of them.

    First a random perfect matching, then a chain that connects the group, then whatever was shown least: the comparison
    graph is connected after size - 1 votes, and no candidate is left behind.

    Args:
        size: Candidates in the group.
        shown: How often each pair was judged or is being judged.
        seen: Pairs that this rater was given before.
    """
    times = [0] * size
    component = list(range(size))
    for (i, j), count in shown.items():
        if count > 0:
            times[i] += count
            times[j] += count
            merged, gone = component[i], component[j]
            component = [merged if c == gone else c for c in component]

    def rank(pair: Pair) -> tuple[bool, int, int]:
        # A pair that joins two components comes first, two candidates nobody has seen before all; the ends of a chain
        # have the lowest counts, so chains grow at their ends.
        i, j = pair
        joins = component[i] != component[j]
        return not joins, 0 if joins else shown.get(pair, 0), times[i] + times[j]

    open_pairs = [pair for pair in combinations(range(size), 2) if pair not in seen]
    if not open_pairs:
        return None
    best = min(map(rank, open_pairs))
    return rng.choice([pair for pair in open_pairs if rank(pair) == best])
