"""Fitting a pairwise preference model: one classifier that reads a prompt and both completions.

Its logit l(A, B) is the log-odds that A, which stands first, is better. Both orders are read, always, and averaged:
P(A over B) = sigmoid((l(A, B) - l(B, A)) / 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.learner.groups import Example
from rlhf_cli.policy.encoding import encode_comparison
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.types import WinMatrix


def comparisons(tokenizer: PreTrainedTokenizerBase, groups: Sequence[VotedGroup], max_length: int) -> list[Example]:
    """One example per pair of completions that has votes: its two orders, and the votes either way."""
    examples = []
    for group in groups:
        for i, j in combinations(range(group.wins.size), 2):
            for_i, for_j = group.wins.wins[i, j], group.wins.wins[j, i]
            if for_i + for_j > 0:
                orders = [(group.completions[i], group.completions[j]), (group.completions[j], group.completions[i])]
                rows = tuple(encode_comparison(tokenizer, group.prompt, *order, max_length) for order in orders)
                examples.append(Example(rows, WinMatrix([[0, for_i], [for_j, 0]]), (1.0, 1.0)))
    return examples


def order_scores(logits_R1: Tensor, is_completion_BG: Tensor) -> Tensor:
    """Scores of the two completions of each pair, once for each order of reading, shape (2, B, 2).

    In the first order the score of A above B is l(A, B), in the second it is -l(B, A). Each order answers for itself in
    the loss, which also teaches them to agree; their mean is the model's verdict.
    """
    first_B, second_B = logits_R1.view(-1, 2).unbind(1)
    zero_B = torch.zeros_like(first_B)
    return torch.stack([torch.stack([first_B, zero_B], 1), torch.stack([zero_B, second_B], 1)])


def orders_agree(scores_2BG: Tensor) -> Tensor:
    """For each pair, whether both orders of reading find the same completion better; shape (B,)."""
    margins_2B = scores_2BG[..., 0] - scores_2BG[..., 1]
    return (margins_2B[0] > 0) == (margins_2B[1] > 0)
