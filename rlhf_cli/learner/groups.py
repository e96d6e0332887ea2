"""Groups of different sizes as one batch: R counts completions, B groups, G the size of the largest group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.policy.encoding import Encoded
from rlhf_cli.types import WinMatrix


@dataclass(frozen=True, slots=True)
class Example:
    """What a reward model learns from at once: texts, the votes between them, and what these weigh for each head."""

    rows: tuple[Encoded, ...]
    wins: WinMatrix
    weights: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Of the longest text."""
        return max(len(row.ids) for row in self.rows)


def stack_wins(matrices: Sequence[WinMatrix], device: torch.device) -> tuple[Tensor, Tensor]:
    """Win matrices as one tensor, and which places of it are completions.

    Returns:
        wins_BGG, padded with 0, and is_completion_BG, False on padding.
    """
    sizes_B = torch.tensor([m.size for m in matrices], device=device)
    largest = int(sizes_B.max())
    wins_BGG = torch.zeros(len(matrices), largest, largest, device=device)
    for b, matrix in enumerate(matrices):
        wins_BGG[b, : matrix.size, : matrix.size] = torch.tensor(matrix.wins)
    return wins_BGG, torch.arange(largest, device=device) < sizes_B[:, None]


def by_group(score_R: Tensor, is_completion_BG: Tensor) -> Tensor:
    """Scores of completions in a row, group after group, as scores_BG; padding scores 0."""
    scores_BG = torch.zeros(is_completion_BG.shape, device=score_R.device, dtype=score_R.dtype)
    return scores_BG.masked_scatter(is_completion_BG, score_R)


def right_aligned(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Shape (R, T), each row ending in the last column, 0 before it."""
    longest = max(map(len, rows))
    return torch.tensor([[0.0] * (longest - len(row)) + list(row) for row in rows], device=device)
