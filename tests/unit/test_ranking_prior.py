"""The width of the prior follows the votes, and with it 95 % intervals hold what they say."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from rlhf_cli.ranking.bradley_terry import TAU, Z95, difference_spread, fit
from rlhf_cli.ranking.prior import GRID, MIN_GROUPS, fit_tau, log_evidence

Floats = npt.NDArray[np.float64]


def crowd(rng: np.random.Generator, groups: int, votes: int, spread: float) -> tuple[Floats, Floats]:
    """True scores and the win matrices of random pairs of 8."""
    truth_BG, wins_BGG = rng.normal(0, spread, (groups, 8)), np.zeros((groups, 8, 8))
    b_BV = np.repeat(np.arange(groups)[:, None], votes, 1)
    i_BV = rng.integers(8, size=(groups, votes))
    j_BV = (i_BV + rng.integers(1, 8, size=(groups, votes))) % 8
    won_BV = rng.random((groups, votes)) < 1 / (1 + np.exp(truth_BG[b_BV, j_BV] - truth_BG[b_BV, i_BV]))
    np.add.at(wins_BGG, (b_BV, np.where(won_BV, i_BV, j_BV), np.where(won_BV, j_BV, i_BV)), 1)
    return truth_BG, wins_BGG


def share_covered(truth_BG: Floats, wins_BGG: Floats, tau: float) -> float:
    """How many of the 95 % intervals on differences hold the true difference."""
    scores_BG, covariance_BGG = fit(wins_BGG, tau)
    i_P, j_P = np.triu_indices(8, 1)
    error_BP = scores_BG[:, i_P] - scores_BG[:, j_P] - truth_BG[:, i_P] + truth_BG[:, j_P]
    return float((abs(error_BP) < Z95 * difference_spread(covariance_BGG)[:, i_P, j_P]).mean())


@pytest.mark.parametrize("wins", [[[0, 1], [0, 0]], [[0, 5], [1, 0]]])
def test_the_evidence_is_the_integral_over_the_scores(wins: list[list[float]]) -> None:
    """Two completions: the difference is N(0, 2 tau^2), so the evidence is one integral, taken here on a fine grid."""
    tau = 1.5
    d, step = np.linspace(-30, 30, 60_001, retstep=True)
    density = np.exp(-(d**2) / (4 * tau**2)) / math.sqrt(4 * math.pi * tau**2)
    p = 1 / (1 + np.exp(-d))
    exact = math.log((density * p ** wins[0][1] * (1 - p) ** wins[1][0]).sum() * step)

    assert log_evidence(np.array([wins] * 50, dtype=float), tau).mean() == pytest.approx(exact, abs=0.03)


def test_groups_without_votes_and_padding_say_nothing() -> None:
    _, wins_BGG = crowd(np.random.default_rng(1), 10, 12, 1.0)
    padded_BGG = np.zeros((13, 9, 9))
    padded_BGG[:10, :8, :8] = wins_BGG

    assert log_evidence(np.zeros((2, 8, 8)), 0.7) == pytest.approx([0, 0], abs=0.1)
    assert fit_tau(np.concatenate([wins_BGG, np.zeros((3, 8, 8))])) == fit_tau(wins_BGG)
    assert fit_tau(padded_BGG) == pytest.approx(fit_tau(wins_BGG), rel=0.1)


def test_the_default_stands_until_enough_groups_have_votes() -> None:
    _, wins_BGG = crowd(np.random.default_rng(2), 2 * MIN_GROUPS, 30, 0.3)
    wins_BGG[MIN_GROUPS - 1 :] = 0

    assert fit_tau(np.zeros((0, 8, 8))) == TAU
    assert fit_tau(wins_BGG) == TAU
    assert fit_tau(crowd(np.random.default_rng(2), MIN_GROUPS, 200, 0.3)[1]) < TAU / 2


@pytest.mark.parametrize("wins", [[[0, 9], [0, 0]], [[0, 4.5], [4.5, 0]], [[0, 1e6], [1, 0]], [[0, 1e-3], [0, 0]]])
def test_one_sided_tied_huge_and_tiny_votes_give_a_width_on_the_grid(wins: list[list[float]]) -> None:
    assert GRID[0] <= fit_tau(np.array([wins] * 20)) <= GRID[-1]


@pytest.mark.parametrize("spread", [0.7, 1.5, 2.5])
@pytest.mark.parametrize(("groups", "votes"), [(120, 12), (20, 40)])
def test_the_width_is_found_and_intervals_cover_nine_in_ten_and_more(spread: float, groups: int, votes: int) -> None:
    """12 votes a group is what training spends; there, Laplace's approximation alone covers 82 to 86 %."""
    taus, covered = [], []
    for seed in range(-(-100 // groups)):
        truth_BG, wins_BGG = crowd(np.random.default_rng(100 + seed), groups, votes, spread)
        taus.append(fit_tau(wins_BGG))
        covered.append(share_covered(truth_BG, wins_BGG, taus[-1]))

    assert np.mean(taus) == pytest.approx(spread, rel=0.15)
    assert 0.9 <= np.mean(covered) < 0.99
