"""The likelihood of the votes, checked by hand and against others' formulas."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.learner.groups import by_group, stack_wins
from rlhf_cli.learner.losses import (
    best_worst,
    entropy_by_rows,
    only_best_worst,
    smoothed,
    vote_agreement,
    vote_margin,
    votes_ipo,
    votes_nll,
    win_matrix_nll,
)
from rlhf_cli.types import WinMatrix


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@st.composite
def voted_groups(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores and whole votes of one to three groups of the same size."""
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wins = numbers.integers(0, 4, (groups, size, size)).astype(float)
    wins[:, range(size), range(size)] = 0
    return f64(numbers.normal(0, 2, (groups, size)).tolist()), f64(wins.tolist())


def test_the_loss_of_one_group_by_hand() -> None:
    scores = f64([[1.0, 0.5, -1.0]])
    wins = f64([[[0, 2, 1], [1, 0, 0], [0.5, 0, 0]]])
    # 2 votes 0>1 at margin 0.5, 1 vote 0>2 at 2, 1 vote 1>0 at -0.5, half a vote 2>0 at -2; 4.5 votes
    expected = (2 * softplus(-0.5) + softplus(-2) + softplus(0.5) + 0.5 * softplus(2)) / 4.5
    assert float(win_matrix_nll(scores, wins)) == pytest.approx(expected, abs=1e-15)


def test_every_group_counts_the_same_however_many_votes_it_has() -> None:
    scores = f64([[1.0, 0.0], [0.0, 2.0]])
    wins = f64([[[0, 10], [0, 0]], [[0, 1], [0, 0]]])
    assert float(win_matrix_nll(scores, wins)) == pytest.approx((softplus(-1) + softplus(2)) / 2, abs=1e-15)


def test_groups_without_votes_do_not_dilute_the_others() -> None:
    scores, wins = f64([[1.0, 0.0], [5.0, 2.0]]), f64([[[0, 1], [0, 0]], [[0, 0], [0, 0]]])
    assert float(win_matrix_nll(scores, wins)) == pytest.approx(softplus(-1), abs=1e-15)


def test_no_votes_at_all_are_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    scores = f64([[3.0, -1.0, 40.0]]).requires_grad_()
    loss = win_matrix_nll(scores, torch.zeros(1, 3, 3, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 0, 0]]


def test_the_gradient_by_hand() -> None:
    """d nll / d s_i = sum_j (expected - observed wins of i over j) / votes, the residual of Bradley-Terry."""
    scores = f64([[0.3, -0.2, 1.1]]).requires_grad_()
    wins = f64([[[0, 3, 1], [1, 0, 2], [0, 1, 0]]])
    win_matrix_nll(scores, wins).backward()
    s = scores.detach()[0]
    probability = torch.sigmoid(s[:, None] - s[None, :])
    compared = wins[0] + wins[0].T
    expected = (compared * probability - wins[0]).sum(1) / wins.sum()
    assert scores.grad is not None
    assert torch.allclose(scores.grad[0], expected, atol=1e-15, rtol=0)


def test_a_single_pair_with_scores_of_dpo_is_the_loss_of_dpo() -> None:
    """Rafailov et al. (2023), eq. 7; against TRL's own code in tests/contract/test_trl.py."""
    beta = 0.3
    logp, ref_logp = f64([[-10.0, -12.5], [-3.0, -1.0]]), f64([[-11.0, -11.0], [-2.5, -2.0]])
    ours = win_matrix_nll(beta * (logp - ref_logp), f64([[[0, 1], [0, 0]], [[0, 1], [0, 0]]]))
    ratio = logp - ref_logp
    dpo = -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).mean()
    assert float(ours) == pytest.approx(float(dpo), abs=1e-15)


@given(voted_groups(), st.floats(-50, 50))
@settings(deadline=None)
def test_only_differences_of_scores_matter(group: tuple[Tensor, Tensor], shift: float) -> None:
    scores, wins = group
    assert torch.allclose(win_matrix_nll(scores + shift, wins), win_matrix_nll(scores, wins), atol=1e-9)


@given(voted_groups(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_completions_does_not_matter(group: tuple[Tensor, Tensor], shuffler: random.Random) -> None:
    scores, wins = group
    order = list(range(scores.shape[1]))
    shuffler.shuffle(order)
    permuted = win_matrix_nll(scores[:, order], wins[:, order][:, :, order])
    assert torch.allclose(permuted, win_matrix_nll(scores, wins), atol=1e-12)


@given(voted_groups(), st.sampled_from([0.25, 2.0, 100.0]))
@settings(deadline=None)
def test_the_same_votes_more_often_are_the_same_loss(group: tuple[Tensor, Tensor], times: float) -> None:
    scores, wins = group
    assert torch.allclose(win_matrix_nll(scores, times * wins), win_matrix_nll(scores, wins), atol=1e-9)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_groups_of_different_sizes_together_are_the_mean_of_each_alone(sizes: list[int], seed: int) -> None:
    numbers = np.random.default_rng(seed)
    matrices = []
    for size in sizes:
        wins = numbers.integers(1, 4, (size, size)).astype(float)
        np.fill_diagonal(wins, 0)
        matrices.append(WinMatrix(wins))
    score_R = torch.tensor(numbers.normal(size=sum(sizes)), dtype=torch.float32)
    wins_BGG, is_completion_BG = stack_wins(matrices, torch.device("cpu"))

    together = win_matrix_nll(by_group(score_R, is_completion_BG), wins_BGG)

    alone = [
        win_matrix_nll(scores[None], torch.tensor(matrix.wins, dtype=torch.float32)[None])
        for scores, matrix in zip(score_R.split(sizes), matrices, strict=True)
    ]
    assert float(together) == pytest.approx(float(torch.stack(alone).mean()), abs=1e-5)


def test_extreme_scores_stay_finite() -> None:
    scores = f64([[1e6, -1e6]]).requires_grad_()
    loss = win_matrix_nll(scores, f64([[[0, 1], [1, 0]]]))
    loss.backward()
    assert loss.item() == pytest.approx(1e6)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_best_and_worst_are_by_share_of_votes_won() -> None:
    # won 4 of 6, 3 of 4, 1 of 6
    wins = f64([[[0, 1, 3], [1, 0, 2], [1, 0, 0]]])
    assert best_worst(wins).tolist() == [[[0, 0, 0], [0, 0, 1], [0, 0, 0]]]


def test_completions_without_votes_are_neither_best_nor_worst() -> None:
    wins = f64([[[0, 0, 0, 0], [0, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0]]])
    assert best_worst(wins).nonzero().tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("wins", [[[0, 1], [1, 0]], [[0, 0], [0, 0]], [[0, 1, 0], [0, 0, 1], [1, 0, 0]]])
def test_where_all_won_the_same_share_no_pair_is_made_up(wins: list[list[float]]) -> None:
    assert best_worst(f64([wins])).sum() == 0


def test_a_tie_for_best_takes_the_first() -> None:
    wins = f64([[[0, 1, 2], [1, 0, 2], [1, 1, 0]]])
    assert best_worst(wins).nonzero().tolist() == [[0, 0, 2]]


def test_agreement_and_margin_by_hand() -> None:
    scores, wins = f64([[2.0, 1.0, 1.0]]), f64([[[0, 3, 0], [1, 0, 2], [0, 0, 0]]])
    # right: 3 of 0>1; wrong: 1 of 1>0; level: 2 of 1>2, half right
    assert float(vote_agreement(scores, wins)) == pytest.approx(4 / 6)
    assert float(vote_margin(scores, wins)) == pytest.approx((3 * 1 - 1 + 0) / 6)
    none = torch.zeros(1, 3, 3, dtype=torch.float64)
    assert float(vote_agreement(scores, none)) == 0
    assert float(vote_margin(scores, none)) == 0


def test_ipo_by_hand() -> None:
    """Azar et al. (2023), eq. 17: each vote's margin against 1 / (2 beta)."""
    scores, wins, beta = f64([[0.75, -0.25, 0.5]]).requires_grad_(), f64([[[0, 2, 0], [1, 0, 0], [0, 3, 0]]]), 0.25
    loss = votes_ipo(scores, wins, beta)
    loss.sum().backward()
    # margins 1, -1 and 0.75, and 1 / (2 beta) = 2
    assert loss.tolist() == pytest.approx([2 * (1 - 2) ** 2 + 1 * (-1 - 2) ** 2 + 3 * (0.75 - 2) ** 2], abs=1e-12)
    pulls = {(0, 1): 2 * 2 * (1 - 2), (1, 0): 1 * 2 * (-1 - 2), (2, 1): 3 * 2 * (0.75 - 2)}
    expected = [
        sum(p for (i, _), p in pulls.items() if i == k) - sum(p for (_, j), p in pulls.items() if j == k)
        for k in range(3)
    ]
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx(expected, abs=1e-12)


@given(voted_groups(), st.floats(-50, 50), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_ipo_knows_neither_a_shift_nor_an_order(
    group: tuple[Tensor, Tensor], shift: float, shuffler: random.Random
) -> None:
    scores, wins = group
    order = list(range(scores.shape[1]))
    shuffler.shuffle(order)
    whole = votes_ipo(scores, wins, 0.3)
    assert torch.allclose(votes_ipo(scores + shift, wins, 0.3), whole, atol=1e-8)
    assert torch.allclose(votes_ipo(scores[:, order], wins[:, order][:, :, order], 0.3), whole, atol=1e-10)


@given(voted_groups())
@settings(deadline=None)
def test_a_vote_that_is_there_twice_weighs_twice(group: tuple[Tensor, Tensor]) -> None:
    scores, wins = group
    assert torch.allclose(votes_nll(scores, 2 * wins), 2 * votes_nll(scores, wins))
    assert torch.allclose(votes_ipo(scores, 2 * wins, 0.3), 2 * votes_ipo(scores, wins, 0.3))


@given(voted_groups(), st.floats(0, 0.49))
@settings(deadline=None)
def test_smoothing_moves_votes_to_the_other_side_and_makes_none(group: tuple[Tensor, Tensor], share: float) -> None:
    _, wins = group
    moved = smoothed(wins, share)
    assert torch.allclose(moved.sum((1, 2)), wins.sum((1, 2)))
    assert torch.allclose(moved + moved.transpose(1, 2), wins + wins.transpose(1, 2))
    assert torch.equal(smoothed(wins, 0.0), wins)


def test_smoothing_by_hand() -> None:
    assert torch.allclose(smoothed(f64([[[0, 4], [1, 0]]]), 0.1), f64([[[0, 3.7], [1.3, 0]]]))


def test_soft_labels_of_the_best_and_worst_pair_stay_soft() -> None:
    labels = f64([[[0, 0.6, 0.9], [0.4, 0, 0.7], [0.1, 0.3, 0]]])
    assert only_best_worst(labels).tolist() == [[[0, 0, 0.9], [0, 0, 0], [0.1, 0, 0]]]


def test_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]]))
    assert entropy_by_rows(logits)[0].tolist() == pytest.approx([1.5 * math.log(2), math.log(3)])
