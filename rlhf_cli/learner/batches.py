"""Which examples go through the model together: planned before training, so that a resume only has to skip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 16
"""Batches whose examples are sorted by length together: little padding, and still as good as random."""


def plan_batches(
    lengths: Sequence[int], size: int, epochs: float, seed: int, max_batches: int | None = None
) -> list[list[int]]:
    """Indices of the examples of every batch of a training, in order.

    Each pass takes every example once, in an order that follows from `seed` and the pass alone; inside a window of
    batches, examples of like length stand together, and the batches are in random order again.

    Args:
        lengths: Tokens of each example.
        size: Examples in a batch; the last one of a pass may have fewer.
        epochs: Passes, of which the last may be a part.
        max_batches: Exactly so many, whatever `epochs` says.
    """
    per_pass = math.ceil(len(lengths) / size)
    total = max_batches or max(1, round(epochs * per_pass))
    plan: list[list[int]] = []
    while len(plan) < total:
        rng = np.random.default_rng([seed, len(plan) // per_pass])
        order = rng.permutation(len(lengths)).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), WINDOW * size):
            window = sorted(order[start : start + WINDOW * size], key=lambda k: lengths[k])
            batches += [window[k : k + size] for k in range(0, len(window), size)]
        plan += [batches[k] for k in rng.permutation(len(batches))]
    return plan[:total]
