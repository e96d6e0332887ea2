"""A ranking says what the votes say, how sure that is, and nothing more."""

from __future__ import annotations

import math
from typing import Any

import choix
import evalica
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_cli.ranking.bradley_terry import Z95, fit, rank
from rlhf_cli.types import WinMatrix

Floats = npt.NDArray[np.float64]


@st.composite
def win_matrices(draw: st.DrawFn, least: float = 0, most: float = 12) -> Floats:
    size = draw(st.integers(2, 9))
    wins: Floats = draw(arrays(np.float64, (size, size), elements=st.integers(int(least * 2), int(most * 2)))) / 2
    np.fill_diagonal(wins, 0)
    return wins


def chain(*rows: list[float]) -> WinMatrix:
    return WinMatrix(rows)


def test_one_vote_gives_the_score_that_was_worked_out_by_hand() -> None:
    """d/ds [log logistic(2 s) - s^2 / tau^2] = 0 for s = (s, -s), tau = 1: 1 - logistic(2 s) = s, so s = 0.33741..."""
    s = 0.3374158072
    assert 1 - 1 / (1 + math.exp(-2 * s)) == pytest.approx(s, abs=1e-9)

    scores_G, covariance_GG = fit(np.array([[0.0, 1], [0, 0]]), tau=1.0)

    assert scores_G == pytest.approx([s, -s], abs=1e-9)
    # Precision is I + h [[1, -1], [-1, 1]] with h = p (1 - p) = (1 - s) s; its inverse has 1 + h over 1 + 2 h.
    h = s * (1 - s)
    assert covariance_GG == pytest.approx(np.array([[1 + h, h], [h, 1 + h]]) / (1 + 2 * h), abs=1e-9)


def test_no_votes_leave_the_prior() -> None:
    ranking = rank(WinMatrix(np.zeros((4, 4))), tau=1.5)

    assert ranking.scores.tolist() == [0, 0, 0, 0]
    assert ranking.covariance == pytest.approx(1.5**2 * np.eye(4))
    assert ranking.interval95[:, 1] == pytest.approx(np.full(4, Z95 * 1.5 * math.sqrt(3 / 4)))
    assert ranking.p_best == pytest.approx(np.full(4, 0.25), abs=0.02)
    assert ranking.no_votes.all()
    assert not (ranking.never_lost | ranking.never_won).any()
    assert ranking.component.tolist() == [0, 1, 2, 3]


DEGENERATE = {
    "one vote": ([[0, 1], [0, 0]], [0, 1]),
    "a sweep in a row": ([[0, 20, 20], [0, 0, 20], [0, 0, 0]], [0, 1, 2]),
    "one that never loses": ([[0, 3, 2], [0, 0, 4], [0, 3, 0]], [0, 1, 2]),
    "a cycle": ([[0, 5, 0], [0, 0, 5], [5, 0, 0]], [0, 1, 2]),
    "all ties": ([[0, 2.5, 2.5], [2.5, 0, 2.5], [2.5, 2.5, 0]], [0, 1, 2]),
    "two islands": ([[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 4], [0, 0, 1, 0]], [2, 0, 1, 3]),
    "a million votes one way": ([[0, 1e6], [0, 0]], [0, 1]),
    "a thousandth of a vote": ([[0, 1e-3], [0, 0]], [0, 1]),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_votes_give_finite_ordered_results(case: str) -> None:
    wins, order = DEGENERATE[case]
    ranking = rank(WinMatrix(wins))

    assert ranking.order == order
    assert np.isfinite(ranking.scores).all()
    assert np.isfinite(ranking.interval95).all()
    assert (ranking.interval95[:, 0] < ranking.scores).all()
    assert ranking.p_best.sum() == pytest.approx(1)


def test_flags_name_what_makes_a_score_doubtful() -> None:
    ranking = rank(chain([0, 2, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0.5], [0, 0, 0, 0.5, 0]))

    assert ranking.never_lost.tolist() == [True, False, False, False, False]
    assert ranking.never_won.tolist() == [False] * 5
    assert ranking.component.tolist() == [0, 0, 0, 1, 1]
    assert ranking.disconnected
    assert ranking.votes.tolist() == [2, 4, 2, 1, 1]
    assert rank(chain([0, 1], [0, 0])).never_won.tolist() == [False, True]
    assert not rank(chain([0, 1], [0, 0])).disconnected


def test_a_group_below_its_minimum_of_votes_says_so() -> None:
    wins = chain([0, 1.5, 0], [0.5, 0, 1], [0, 0, 0])

    assert rank(wins, min_votes=4).below_min_votes
    assert not rank(wins, min_votes=3).below_min_votes
    assert rank(WinMatrix(np.zeros((3, 3)))).below_min_votes


def test_the_interval_of_a_difference_knows_that_both_scores_move_together() -> None:
    """One vote, tau 1: the sum of the scores is the prior's alone, their difference has variance 2 / (1 + 2 h)."""
    ranking = rank(WinMatrix([[0, 1], [0, 0]]), tau=1.0)
    s = ranking.scores[0]
    half = Z95 * math.sqrt(2 / (1 + 2 * s * (1 - s)))

    assert ranking.difference(0, 1) == pytest.approx((2 * s, 2 * s - half, 2 * s + half))
    assert ranking.difference(1, 0) == pytest.approx((-2 * s, -2 * s - half, -2 * s + half))
    assert ranking.difference(0, 0) == (0, 0, 0)


def test_islands_differ_by_the_prior_alone() -> None:
    """The difference between the middles of two islands stays at 0 +/- tau."""
    _, covariance_GG = fit(np.array([[0.0, 9, 0, 0], [1, 0, 0, 0], [0, 0, 0, 9], [0, 0, 1, 0]]), tau=1.5)
    between_G = np.array([0.5, 0.5, -0.5, -0.5])

    assert between_G @ covariance_GG @ between_G == pytest.approx(1.5**2)


def test_elo_display_is_400_for_ten_to_one() -> None:
    ranking = rank(WinMatrix([[0, 1000], [100, 0]]), tau=50)

    assert ranking.elo[0] - ranking.elo[1] == pytest.approx(400, abs=0.5)
    assert ranking.elo.mean() == pytest.approx(1200)


@given(win_matrices(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_naming_the_completions_otherwise_changes_nothing(wins: Floats, random: Any) -> None:
    order = list(range(len(wins)))
    random.shuffle(order)
    scores_G, covariance_GG = fit(wins)
    moved_G, moved_GG = fit(wins[np.ix_(order, order)])

    assert moved_G == pytest.approx(scores_G[order], abs=1e-8)
    assert moved_GG == pytest.approx(covariance_GG[np.ix_(order, order)], abs=1e-8)
    moved, ranking = rank(WinMatrix(wins[np.ix_(order, order)])), rank(WinMatrix(wins))
    assert moved.p_best == pytest.approx(ranking.p_best[order], abs=0.05)


@given(win_matrices(), st.floats(0.2, 20))
@settings(deadline=None)
def test_votes_and_prior_scaled_together_move_no_score(wins: Floats, factor: float) -> None:
    scores_G, covariance_GG = fit(wins, tau=1.5)
    scaled_G, scaled_GG = fit(wins * factor, tau=1.5 / math.sqrt(factor))

    assert scaled_G == pytest.approx(scores_G, abs=1e-7)
    assert scaled_GG * factor == pytest.approx(covariance_GG, abs=1e-7)


@given(win_matrices())
@settings(deadline=None)
def test_reversing_every_vote_reverses_every_score(wins: Floats) -> None:
    assert fit(wins.T)[0] == pytest.approx(-fit(wins)[0], abs=1e-8)


@given(win_matrices(most=1000), st.floats(0.05, 30))
@settings(deadline=None)
def test_the_fit_is_the_mode_and_is_centred(wins: Floats, tau: float) -> None:
    scores_G, covariance_GG = fit(wins, tau)
    p_GG = 1 / (1 + np.exp(scores_G[None, :] - scores_G[:, None]))
    gradient_G = wins.sum(1) - ((wins + wins.T) * p_GG).sum(1) - scores_G / tau**2

    assert gradient_G == pytest.approx(np.zeros(len(wins)), abs=1e-5 * max(1, wins.sum(), tau**-2))
    assert scores_G.sum() == pytest.approx(0, abs=1e-6)
    assert np.linalg.eigvalsh(covariance_GG).min() > 0


def test_a_batch_is_its_groups_one_by_one() -> None:
    wins_BGG = np.random.default_rng(1).poisson(1.5, (20, 5, 5)).astype(float)
    wins_BGG[:, range(5), range(5)] = 0
    wins_BGG[3] = 0
    scores_BG, covariance_BGG = fit(wins_BGG)

    for b in range(20):
        scores_G, covariance_GG = fit(wins_BGG[b])
        assert scores_BG[b] == pytest.approx(scores_G, abs=1e-8)
        assert covariance_BGG[b] == pytest.approx(covariance_GG, abs=1e-6)


def test_a_wide_prior_settles_although_nothing_holds_the_mean_of_the_scores() -> None:
    wins = np.full((7, 7), 10.5)
    np.fill_diagonal(wins, 0)
    wins[0, 5], wins[5, 3] = 1, 5
    scores_G, _ = fit(wins, tau=1e4)
    assert scores_G.sum() == pytest.approx(0, abs=1e-9)
    expected = (wins + wins.T) / (1 + np.exp(scores_G[None, :] - scores_G[:, None]))
    assert wins.sum(1) == pytest.approx(expected.sum(1), abs=1e-6)  # the mode: votes won are votes expected


@given(win_matrices(least=1))
@settings(deadline=None, max_examples=50)
def test_on_well_connected_votes_the_scores_are_those_of_an_independent_library(wins: Floats) -> None:
    """Every pair met and everybody won and lost, so the prior can be made so wide that the likelihood alone speaks."""
    theirs_G = choix.ilsr_pairwise_dense(wins, alpha=0.0, max_iter=1000, tol=1e-10)
    ours_G, _ = fit(wins, tau=1e4)

    assert ours_G == pytest.approx(theirs_G - theirs_G.mean(), abs=1e-4)


@given(win_matrices(least=1))
@settings(deadline=None, max_examples=50)
def test_on_well_connected_votes_the_order_is_that_of_a_second_library(wins: Floats) -> None:
    """Scores that differ by less than the other library's tolerance may stand either way."""
    size = len(wins)
    xs, ys = np.nonzero(wins)
    names = [str(k) for k in range(size)]
    theirs = evalica.bradley_terry(
        [names[x] for x in xs], [names[y] for y in ys], [evalica.Winner.X] * len(xs),
        weights=wins[xs, ys].tolist(), limit=1000, tolerance=1e-12,
    )  # fmt: skip
    theirs_G = np.log(theirs.scores[names].to_numpy())
    ours_G, _ = fit(wins, tau=1e4)

    ahead_GG = theirs_G[:, None] - theirs_G[None, :]
    assert ((ours_G[:, None] > ours_G[None, :]) | (ahead_GG < 1e-4)).all()


def test_intervals_cover_the_truth_where_the_prior_fits() -> None:
    rng = np.random.default_rng(5)
    truth_BG = rng.normal(0, 1.5, (400, 8))
    truth_BG -= truth_BG.mean(1, keepdims=True)
    wins_BGG = np.zeros((400, 8, 8))
    for b in range(400):
        for _ in range(40):
            i, j = rng.choice(8, 2, replace=False)
            first = rng.random() < 1 / (1 + math.exp(truth_BG[b, j] - truth_BG[b, i]))
            wins_BGG[b, i, j] += first
            wins_BGG[b, j, i] += not first
    bounds_BG2 = np.stack([rank(WinMatrix(wins)).interval95 for wins in wins_BGG])
    inside_BG = (bounds_BG2[..., 0] <= truth_BG) & (truth_BG <= bounds_BG2[..., 1])

    assert 0.93 < inside_BG.mean() < 0.975


def test_p_best_is_as_often_right_as_it_says() -> None:
    """Two completions, one vote, tau 1: exactly the probability that a Gaussian difference is positive."""
    ranking = rank(WinMatrix([[0, 1], [0, 0]]), tau=1.0)
    s = ranking.scores[0]
    spread = math.sqrt(2 / (1 + 2 * s * (1 - s)))

    assert ranking.p_best[0] == pytest.approx(0.5 + 0.5 * math.erf(2 * s / spread / math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_prior_without_width_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau"):
        fit(np.zeros((2, 2)), tau)
