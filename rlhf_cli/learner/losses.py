"""What the votes say about scores: pure functions that a reader can check by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def win_matrix_nll(scores_BG: Tensor, wins_BGG: Tensor) -> Tensor:
    """Negative log-likelihood of the votes under Bradley-Terry, averaged over groups that have any, in nats per vote.

    Args:
        scores_BG: One score per completion, shape (B, G): beta * (logp - reference logp) for DPO, the reward for a
            reward model. Groups smaller than G are padded; padding has no votes and so no weight.
        wins_BGG: `wins[b, i, j]` votes preferred i over j; fractional, diagonal 0.

    Returns:
        A scalar; 0 with a gradient of 0 where no group has a vote.

    Source: Bradley and Terry (1952); with the scores of DPO, the loss of Rafailov et al. (2023), eq. 7, over all votes.
    """
    votes_B = wins_BGG.sum((1, 2))
    nll_B = votes_nll(scores_BG, wins_BGG) / votes_B.clamp(min=1e-9)
    return nll_B.sum() / (votes_B > 0).sum().clamp(min=1)


def votes_nll(scores_BG: Tensor, wins_BGG: Tensor, losing_BG: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of all votes of each group, in nats: `win_matrix_nll` before any averaging.

    Dimensions may come before B, as with several heads that score the same completions. `losing_BG`: scores of the same
    completions where they lose, if those are others; see `segments`.
    """
    return (wins_BGG * F.softplus(-_margins(scores_BG, losing_BG))).sum((-2, -1))


def votes_ipo(scores_BG: Tensor, wins_BGG: Tensor, beta: float, losing_BG: Tensor | None = None) -> Tensor:
    """Squared distance of the margin of every vote from 1 / (2 beta), added up per group: how far IPO lets it grow.

    Args:
        scores_BG: Log-ratio to the reference, in nats a token: the mean over a completion, as TRL and the paper's
            authors have it, so that one beta serves all lengths.
        wins_BGG: As for `win_matrix_nll`.
        losing_BG: As for `votes_nll`.

    Source: Azar et al. (2023), "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17.
    """
    return (wins_BGG * (_margins(scores_BG, losing_BG) - 1 / (2 * beta)).square()).sum((-2, -1))


def _margins(winning_BG: Tensor, losing_BG: Tensor | None) -> Tensor:
    return winning_BG[..., :, None] - (winning_BG if losing_BG is None else losing_BG)[..., None, :]


def smoothed(wins_BGG: Tensor, share: float) -> Tensor:
    """Count `share` of every vote for the other side; the number of votes stays."""
    return (1 - share) * wins_BGG + share * wins_BGG.transpose(-2, -1)


def votes_offset(scores_BG: Tensor, wins_BGG: Tensor) -> Tensor:
    """Squared sum of the two scores of each vote, added up per group: what Bradley-Terry leaves free.

    Source: `center_rewards_coefficient` of TRL's RewardTrainer, after Eisenstein et al. (2023), over all votes.
    """
    sums_BGG = scores_BG[..., :, None] + scores_BG[..., None, :]
    return (wins_BGG * sums_BGG.square()).sum((-2, -1))


def best_worst(wins_BGG: Tensor) -> Tensor:
    """Keep one pair per group: the completion with the highest share of won votes against the one with the lowest.

    Args:
        wins_BGG: Win matrices, shape (B, G, G).

    Returns:
        Matrices of the same shape with a single 1 each, or all 0 where every completion has the same share.
    """
    won_BG, lost_BG = wins_BGG.sum(2), wins_BGG.sum(1)
    voted_BG = won_BG + lost_BG > 0
    share_BG = won_BG / (won_BG + lost_BG).clamp(min=1e-9)
    best_B = share_BG.masked_fill(~voted_BG, -1).argmax(1)
    worst_B = share_BG.masked_fill(~voted_BG, 2).argmin(1)
    rows = torch.arange(len(wins_BGG), device=wins_BGG.device)
    pair_BGG = torch.zeros_like(wins_BGG)
    pair_BGG[rows, best_B, worst_B] = (share_BG[rows, best_B] > share_BG[rows, worst_B]).to(wins_BGG.dtype)
    return pair_BGG


def only_best_worst(wins_BGG: Tensor) -> Tensor:
    """Keep what was said of the pair of `best_worst`, both ways; all 0 where every completion has the same share."""
    pair_BGG = best_worst(wins_BGG)
    return wins_BGG * (pair_BGG + pair_BGG.transpose(-2, -1))


def vote_agreement(scores_BG: Tensor, wins_BGG: Tensor) -> Tensor:
    """Share of all votes whose winner has the higher score; equal scores count half."""
    margins_BGG = scores_BG[:, :, None] - scores_BG[:, None, :]
    agrees_BGG = (margins_BGG > 0).to(wins_BGG.dtype) + 0.5 * (margins_BGG == 0)
    return (wins_BGG * agrees_BGG).sum() / wins_BGG.sum().clamp(min=1e-9)


def vote_margin(scores_BG: Tensor, wins_BGG: Tensor) -> Tensor:
    """Mean score of a vote's winner above its loser."""
    margins_BGG = scores_BG[:, :, None] - scores_BG[:, None, :]
    return (wins_BGG * margins_BGG).sum() / wins_BGG.sum().clamp(min=1e-9)


@torch.no_grad()
def entropy_by_rows(logits_RTV: Tensor) -> Tensor:
    """Entropy of every next-token distribution in nats, shape (R, T), for display: without a gradient.

    A second tensor of the size of the logits is what memory is short of, so only one row's is held at a time.
    """
    rows = [torch.distributions.Categorical(logits=row_TV, validate_args=False).entropy() for row_TV in logits_RTV]
    return torch.stack(rows)
