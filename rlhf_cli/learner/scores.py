"""One number a completion, where a learner needs that instead of votes: pure functions of ranked groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rlhf_cli.ranking.bradley_terry import rank
from rlhf_cli.types import RankedGroup

Floats = npt.NDArray[np.float64]

_ROUNDING = 1e-6
"""Scores whose deviation is no larger than this share of them, or of 1, are the same."""


def group_scores(ranked: RankedGroup, per_char: float = 0.0) -> Floats:
    """Scores of the completions of a group, shape (G,): those of its source, else what the ranking of its votes gives.

    Args:
        per_char: Length penalty, taken from a ranking's score for every character. What comes from a model or function
            was penalised there, in scores and win matrix alike.

    Returns:
        NaN for a completion that nobody compared or scored: the ranking would say it is average, and nobody said that.
    """
    if ranked.scores is not None:
        return np.array(ranked.scores, dtype=np.float64)
    ranking = rank(ranked.wins)
    scores_G = ranking.scores - _taken(ranked, per_char)
    scores_G[ranking.no_votes] = np.nan
    return scores_G


def group_advantages(scores_G: Floats, *, leave_one_out: bool, by_deviation: bool) -> Floats:
    """How far each score is above its group, shape (G,); 0 where there is no score, or none to compare it with.

    Args:
        leave_one_out: Above the mean of the others, without its own share in it (RLOO), instead of that of all (GRPO).
        by_deviation: Divide by the standard deviation of the group's scores; 0 where that is 0.

    Source: Kool et al. (2019) and Ahmadian et al. (2024) for leaving one out; Shao et al. (2024) for the rest.
    """
    known_G = np.isfinite(scores_G)
    count = int(known_G.sum())
    advantages_G = np.zeros_like(scores_G)
    if count < 2:
        return advantages_G
    known = scores_G[known_G]
    advantages_G[known_G] = known - known.mean()
    if leave_one_out:
        advantages_G *= count / (count - 1)
    if by_deviation:
        deviation = known.std(ddof=1)
        # Equal scores differ by what rounding leaves of their mean, and dividing that by itself would make it a label.
        equal = deviation <= _ROUNDING * max(1.0, float(np.abs(known).max()))
        advantages_G = np.zeros_like(scores_G) if equal else advantages_G / deviation
    return advantages_G


def posterior_wins(ranked: RankedGroup, per_char: float = 0.0) -> Floats:
    """What one more vote on every pair would say, by the ranking fitted to all votes of the group; shape (G, G).

    `[i, j]` and `[j, i]` add up to 1 where the two were compared, directly or through others, and are 0 elsewhere:
    between completions that votes do not join, only the prior would speak.

    Args:
        per_char: As for `group_scores`.
    """
    ranking = rank(ranked.wins)
    p_GG = ranking.preferences(_taken(ranked, per_char))
    joined_GG = ranking.component[:, None] == ranking.component[None, :]
    return np.where(joined_GG & ~np.eye(len(p_GG), dtype=bool), p_GG, 0.0)


def _taken(ranked: RankedGroup, per_char: float) -> Floats | float:
    if ranked.scores is not None or ranked.source.startswith("reward_model:"):
        return 0.0
    return per_char * _characters([c.text for c in ranked.group.completions])


def _characters(texts: Sequence[str]) -> Floats:
    return np.array([len(text) for text in texts], dtype=np.float64)
