"""Intervals over prompts hold what they promise, also for few prompts and for clean sweeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.ranking.intervals import clustered_mean, t_quantile_975, win_rate


@pytest.mark.parametrize(
    ("freedom", "table"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (30, 2.04227), (1000, 1.96234)]
)
def test_t_quantiles_are_those_of_the_printed_tables(freedom: int, table: float) -> None:
    assert t_quantile_975(freedom) == pytest.approx(table, abs=6e-5)


def test_a_mean_of_prompts_is_the_textbook_interval() -> None:
    """Means 1, 2, 3: mean 2, deviation 1, so 2 +/- 4.30265 / sqrt(3)."""
    estimate = clustered_mean([[1.0, 1.0, 1.0, 1.0], [1.0, 3.0], [3.0], []])

    assert estimate.mean == 2
    assert estimate.high - 2 == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert estimate.low == pytest.approx(4 - estimate.high)


def test_answers_of_one_prompt_do_not_count_as_independent() -> None:
    once = clustered_mean([[1.0], [0.0], [0.5]])

    assert clustered_mean([[1.0] * 50, [0.0] * 50, [0.5] * 50]) == once


def test_one_prompt_says_nothing_about_the_spread() -> None:
    assert clustered_mean([[1.0, 2.0]]) == (1.5, -math.inf, math.inf)
    assert win_rate([(3, 1)]) == (0.75, 0.0, 1.0)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([[], []])
    with pytest.raises(ValueError, match="no comparisons"):
        win_rate([(0, 0)])


def test_a_clean_sweep_is_not_certainty() -> None:
    """Wilson for 40 of 40 with t = 2.0227: the lower bound is 1 / (1 + t^2 / 40)."""
    estimate = win_rate([(1, 0)] * 40)

    assert estimate.mean == 1
    assert estimate.high == 1
    assert estimate.low == pytest.approx(1 / (1 + 2.02269**2 / 40), abs=1e-4)


def test_a_tie_is_half_a_win() -> None:
    assert win_rate([(0.5, 0.5), (1, 0), (0, 1)]).mean == 0.5


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda t: sum(t) > 0), min_size=1, max_size=40))
def test_a_win_rate_lies_in_its_interval_and_the_interval_in_0_to_1(votes: list[tuple[float, float]]) -> None:
    mean, low, high = win_rate(votes)

    assert 0 <= low <= mean <= high <= 1
    mirrored = win_rate([(losses, wins) for wins, losses in votes])
    assert mirrored.low == pytest.approx(1 - high, abs=1e-6)


@pytest.mark.parametrize("prompts", [6, 40])
def test_the_interval_covers_when_prompts_differ(prompts: int) -> None:
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(600):
        rate_P = rng.beta(3, 2, prompts)
        wins_P = rng.binomial(4, rate_P)
        estimate = win_rate([(float(w), 4.0 - w) for w in wins_P])
        covered.append(estimate.low <= 0.6 <= estimate.high)

    assert np.mean(covered) > 0.92
