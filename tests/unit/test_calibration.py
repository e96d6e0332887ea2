"""Probabilities of a reward model: put right where they are wrong, and measured without flattery."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.evaluation.calibration import Pairs, fit_temperature, is_fitting_half, reliability, sigmoid
from rlhf_cli.evaluation.verdict import confidence
from rlhf_cli.ranking.intervals import clustered_share, t_quantile_975


def pairs(*rows: tuple[float, float, float]) -> Pairs:
    """From margin, votes won and votes lost; every pair has a prompt of its own."""
    margins, won, lost = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    return Pairs(margins, won, lost, np.arange(len(rows)))


def simulated(seed: int, temperature: float, number: int, votes: int, a_prompt: int = 3) -> Pairs:
    """Votes drawn with known probabilities; the model knows them exactly, its margins are `temperature` too large."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, number)
    won = rng.binomial(votes, sigmoid(truth)).astype(float)
    return Pairs(temperature * truth, won, votes - won, np.arange(number) // a_prompt)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 2.5, 10.0])
@pytest.mark.parametrize(("number", "votes"), [(6000, 1), (2000, 5)])
def test_the_fitted_temperature_is_the_true_one_and_leaves_no_error(
    seed: int, temperature: float, number: int, votes: int
) -> None:
    everything = simulated(seed, temperature, number, votes)
    half = np.arange(number) < number // 2

    fitted = fit_temperature(everything.at(half))
    after = reliability(everything.at(~half), fitted.value)

    assert fitted.value == pytest.approx(temperature, rel=0.10)
    assert after.ece <= 0.03
    assert fitted.problem is None


def test_the_interval_of_the_temperature_holds_the_truth_about_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(200):
        fitted = fit_temperature(simulated(seed, 2.0, 300, 3))
        assert fitted.low is not None
        assert fitted.high is not None
        inside += fitted.low <= 2.0 <= fitted.high
    assert 180 <= inside <= 199


def test_the_temperature_by_hand() -> None:
    # One pair, margin 2, 3 of 4 votes: sigmoid(2 / T) = 3/4, so T = 2 / log 3. A mirrored pair changes nothing.
    assert fit_temperature(pairs((2, 3, 1))).value == pytest.approx(2 / math.log(3))
    assert fit_temperature(pairs((2, 3, 1), (-2, 1, 3), (0, 5, 1))).value == pytest.approx(2 / math.log(3))


@pytest.mark.parametrize(
    ("rows", "value", "said"),
    [
        ([(1.0, 1, 0), (-2.0, 0, 3)], 1.0, "every vote goes the model's way"),
        ([(1.0, 0, 1), (2.0, 1, 1)], None, "no better than chance"),
        ([(0.0, 1, 0)], 1.0, "no pair of the fitting half has two different scores"),
    ],
)
def test_votes_that_do_not_settle_the_temperature_say_so(
    rows: list[tuple[float, float, float]], value: float | None, said: str
) -> None:
    fitted = fit_temperature(pairs(*rows))
    assert fitted.problem is not None
    assert said in fitted.problem
    assert (fitted.low, fitted.high) == (None, None)
    if value is None:  # no better than chance: every probability becomes one half
        assert abs(float(sigmoid(np.array(2.0 / fitted.value))) - 0.5) < 1e-3
    else:
        assert fitted.value == value


def test_the_calibration_error_by_hand() -> None:
    # Two bins: margin 1 says .7311, 5 of 10 votes are right; margin 3 says .9526, 9 of 10 are right.
    measured = reliability(pairs((1, 3, 2), (-1, 3, 2), (3, 5, 0), (-3, 1, 4)), 1.0)
    low, high = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))

    assert [(b.pairs, b.votes, round(b.said, 4), b.was.mean) for b in measured.bins] == [
        (2, 10, 0.7311, 0.5),
        (2, 10, 0.9526, 0.9),
    ]
    assert measured.ece == pytest.approx(((low - 0.5) + (high - 0.9)) / 2)
    assert measured.excess.mean == pytest.approx((low + high) / 2 - 0.7)
    noise = math.sqrt(2 / math.pi) * (math.sqrt(10 * low * (1 - low)) + math.sqrt(10 * high * (1 - high))) / 20
    assert measured.ece_by_chance == pytest.approx(noise)
    nll = -(5 * math.log(low) + 5 * math.log(1 - low) + 9 * math.log(high) + math.log(1 - high)) / 20
    assert measured.nll_nats == pytest.approx(nll)


def test_right_probabilities_leave_the_error_that_chance_alone_makes() -> None:
    measured = [reliability(simulated(seed, 1.0, 500, 1, a_prompt=1), 1.0) for seed in range(60)]
    found = np.mean([m.ece for m in measured])
    expected = np.mean([m.ece_by_chance for m in measured])
    assert found == pytest.approx(expected, rel=0.1)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_neither_the_order_of_the_pairs_nor_of_their_sides_matters(seed: int, temperature: float) -> None:
    made = simulated(seed, temperature, 120, 3)
    rng = np.random.default_rng(seed)
    order = rng.permutation(120)
    swapped = rng.random(120) < 0.5
    other = Pairs(
        np.where(swapped, -made.margins, made.margins),
        np.where(swapped, made.lost, made.won),
        np.where(swapped, made.won, made.lost),
        made.clusters,
    ).at(order)

    assert fit_temperature(other).value == pytest.approx(fit_temperature(made).value, rel=1e-6)
    one, two = reliability(made, 1.3), reliability(other, 1.3)
    assert (two.ece, two.nll_nats) == (pytest.approx(one.ece), pytest.approx(one.nll_nats))
    assert [b.votes for b in two.bins] == [b.votes for b in one.bins]


def test_bins_hold_every_vote_once_and_keep_equal_probabilities_together() -> None:
    made = pairs(*[(0.5, 1, 0)] * 300, *[(2.0, 1, 1)] * 100, *[(-3.0, 0, 2)] * 100)
    bins = reliability(made, 1.0).bins
    assert sum(b.votes for b in bins) == 300 + 200 + 200
    assert len(bins) == 3
    assert all(b.low == b.high for b in bins)


def test_a_pair_that_is_scored_equal_says_one_half_and_is_right_half_of_the_time() -> None:
    measured = reliability(pairs((0, 4, 0), (0, 0, 1)), 1.0)
    assert [(b.said, b.was.mean, b.votes) for b in measured.bins] == [(0.5, 0.5, 5)]
    assert (measured.ece, measured.nll_nats) == (0, pytest.approx(math.log(2)))


def test_without_votes_there_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no votes"):
        reliability(pairs((1, 0, 0)), 1.0)


@pytest.mark.parametrize(("temperature", "said"), [(4.0, "over-confident"), (0.3, "under-confident"), (1.0, "neither")])
def test_confidence_is_said_in_words(temperature: float, said: str) -> None:
    measured = reliability(simulated(3, temperature, 3000, 3), 1.0)
    report = {
        "excess": {"value": measured.excess.mean, "low": measured.excess.low, "high": measured.excess.high},
        "votes": sum(b.votes for b in measured.bins),
        "bins": [{**b._asdict(), "was": {"value": b.was.mean}} for b in measured.bins],
    }
    assert said in confidence(report)
    if temperature != 1:
        says, right = map(float, re.findall(r"([\d.]+)%", confidence(report)))
        assert (says > right) is (temperature > 1)


def test_about_half_of_the_prompts_fit_and_always_the_same_ones() -> None:
    chosen = [is_fitting_half(f"prompt {n}") for n in range(1000)]
    assert 450 < sum(chosen) < 550
    assert chosen[:8] == [is_fitting_half(f"prompt {n}") for n in range(8)]
    assert [is_fitting_half(key) for key in "abcdefgh"] == [True, True, False, True, True, True, False, False]


def test_a_share_of_clustered_cases_by_hand() -> None:
    # Shares 1/2, 4/4 and 0/2 of 2, 4 and 2 cases: 5/8. Residuals -.25, 1.5 and -1.25: variance 3/2 * 3.875 / 64.
    share = clustered_share([(1, 2), (4, 4), (0, 2), (0, 0)])
    p = 5 / 8
    n = p * (1 - p) / (3 / 2 * 3.875 / 64)
    t2 = t_quantile_975(2) ** 2
    middle = (p + t2 / (2 * n)) / (1 + t2 / n)
    half = math.sqrt(t2 * (p * (1 - p) / n + t2 / (4 * n * n))) / (1 + t2 / n)
    assert share == pytest.approx((p, max(0.0, middle - half), min(1.0, middle + half)))
    assert clustered_share([(1, 3)]) == (pytest.approx(1 / 3), 0.0, 1.0)
    assert clustered_share([(2, 2)] * 10).low < 0.9
    with pytest.raises(ValueError, match="no cases"):
        clustered_share([(0, 0)])
