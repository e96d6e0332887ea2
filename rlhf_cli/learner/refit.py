"""Refitting the heads of a reward model to people's votes, on features that stay as they are: seconds, not hours.

For each head, with D its change from the first one and x the features of a completion:

    minimise  sum over votes of -log sigmoid((s_winner - s_loser) / T)  +  |D|^2 / (2 sigma^2)

where s is the reward and sigma is such that, before any vote, the log-odds of a typical pair may change by `TAU`: what
was learned from many votes is given up only for many votes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_cli.learner.losses import votes_nll
from rlhf_cli.policy.heads import Array, Heads, VotedFeatures

TAU = 1.0
"""Standard deviation, in log-odds, of what may change about a typical pair before any vote is looked at."""
ITERATIONS = 200


def refit_heads(first: Heads, voted: Sequence[VotedFeatures], temperature: float, seed: int) -> Heads:
    """The heads that the votes ask for, pulled towards `first`; the same for the same input.

    Each head of an ensemble sees the groups with bootstrap weights of its own, which follow from `seed` and the index
    of a group. The biases stay: votes say nothing about them.

    Source: Rubin (1981), "The Bayesian Bootstrap"; the rest is MAP of logistic regression with a Gaussian prior.
    """
    # From the mean of its group, which no difference sees: smaller numbers, same margins.
    centred = [(v.features - v.features.mean(0)) / temperature for v in voted]
    squares = sum(len(c) * float(np.square(c).sum()) for c in centred)  # of all differences of all pairs
    if not squares:  # no group, or all completions look the same: there is nothing to learn
        return first
    sigma = TAU / np.sqrt(squares / sum(len(c) * (len(c) - 1) / 2 for c in centred))
    widest = max(len(c) for c in centred)
    features_BGH = torch.zeros(len(voted), widest, first.weight.shape[1], dtype=torch.float64)
    wins_BGG = torch.zeros(len(voted), widest, widest, dtype=torch.float64)
    for b, (v, c) in enumerate(zip(voted, centred, strict=True)):
        features_BGH[b, : len(c)] = torch.from_numpy(c)
        wins_BGG[b, : len(c), : len(c)] = torch.tensor(v.wins.wins)
    weights_KB = torch.tensor(np.array([_weights(v, len(first.weight), seed) for v in voted]).T)
    start_KBG = torch.einsum("kh,bgh->kbg", torch.from_numpy(first.weight), features_BGH)
    change_KH = torch.zeros(first.weight.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([change_KH], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores_KBG = start_KBG + sigma * torch.einsum("kh,bgh->kbg", change_KH, features_BGH)
        total = (weights_KB * votes_nll(scores_KBG, wins_BGG)).sum() + change_KH.square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return Heads(first.weight + sigma * change_KH.detach().numpy(), first.bias)


def _weights(voted: VotedFeatures, heads: int, seed: int) -> Array:
    """Exponential of mean 1 for each head of an ensemble; 1 for a head alone."""
    return np.random.default_rng([seed, voted.index]).exponential(size=heads) if heads > 1 else np.ones(1)
