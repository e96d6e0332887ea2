"""How score and length go together: within groups, because longer prompts have longer answers and other scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Scored = tuple[Sequence[float], Sequence[int]]
"""Scores of the completions of a group, NaN where there is none, and their lengths in characters."""


def correlation_within(groups: Iterable[Scored]) -> float | None:
    """Correlation of score and length, both as deviations from the mean of their group, all groups pooled.

    None where either does not vary within any group: then nothing can be said.
    """
    scores, chars = _deviations(groups)
    spread = float(np.sqrt((scores**2).sum() * (chars**2).sum()))
    return float((scores * chars).sum()) / spread if spread > 0 else None


def slope_within(groups: Iterable[Scored]) -> float:
    """Score that one more character goes with inside a group, by least squares; 0 where lengths do not vary."""
    scores, chars = _deviations(groups)
    spread = float((chars**2).sum())
    return float((scores * chars).sum()) / spread if spread > 0 else 0.0


def _deviations(groups: Iterable[Scored]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scores, chars = [np.empty(0)], [np.empty(0)]
    for score_G, chars_G in groups:
        s, c = np.asarray(score_G, dtype=float), np.asarray(chars_G, dtype=float)
        known = np.isfinite(s)
        if known.any():
            scores.append(s[known] - s[known].mean())
            chars.append(c[known] - c[known].mean())
    return np.concatenate(scores), np.concatenate(chars)
