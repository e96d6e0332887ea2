"""What is said about raters can be worked out by hand, and is None where there is nothing to say."""

from __future__ import annotations

import math

import krippendorff
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ranking.agreement import (
    PairVote,
    Share,
    gold_accuracy,
    krippendorff_alpha,
    pair_agreement,
    rater_reliability,
    response_floor_s,
    side_bias,
)

Floats = npt.NDArray[np.float64]


def test_alpha_of_three_questions_worked_out_by_hand() -> None:
    """Answers aa, ab, bb: 1 of 3 questions disagrees, 2 ordered pairs; 3 a and 3 b make 18: 1 - 5 * 2 / 18 = 4/9."""
    assert krippendorff_alpha(["aa", "ab", "bb"]) == pytest.approx(4 / 9)
    assert krippendorff_alpha(["aa", "ab", "bb", "a", ""]) == pytest.approx(4 / 9)  # single answers say nothing


def test_alpha_is_1_for_agreement_and_negative_for_opposition() -> None:
    assert krippendorff_alpha(["aa", "bbb", "aaaa"]) == 1
    assert krippendorff_alpha(["ab", "ab"]) == pytest.approx(1 - 3 * 4 / 8)


@pytest.mark.parametrize("answers", [[], ["a", "b"], ["aa", "aaa"], ["aa", "b"]])
def test_alpha_is_undefined_without_overlap_or_variety(answers: list[str]) -> None:
    assert krippendorff_alpha(answers) is None


@given(st.lists(st.text("abc", max_size=6), min_size=1, max_size=12))
@settings(deadline=None)
def test_alpha_is_that_of_the_reference_package_wherever_that_has_one(answers: list[str]) -> None:
    alpha = krippendorff_alpha(answers)
    counts = np.array([[unit.count(letter) for letter in "abc"] for unit in answers])
    paired = counts[counts.sum(1) > 1]
    if alpha is None:
        assert (paired.sum(0) > 0).sum() < 2
        return
    assert alpha == pytest.approx(
        krippendorff.alpha(value_counts=counts, value_domain=[0, 1, 2], level_of_measurement="nominal")
    )


def test_observed_agreement_counts_pairs_of_raters() -> None:
    """3 to 1: 3 of 6 pairs of raters agree; 2 to 0: the one pair does. Weights 3 and 1: (1.5 + 1) / 4."""
    wins = np.array([[[0.0, 3, 1], [1, 0, 2], [0, 0, 0]]])
    agreement = pair_agreement(wins)

    assert agreement is not None
    assert agreement.observed == pytest.approx(2.5 / 4)
    assert agreement.pairs == 2
    assert pair_agreement(wins.clip(max=1) * np.triu(np.ones((3, 3)))) is None


def test_expected_agreement_of_one_pair_is_the_integral_over_its_posterior() -> None:
    """Votes 10^6 : 3 * 10^6 leave no doubt: p = 1/4, and 1/16 + 9/16 = 5/8."""
    agreement = pair_agreement(np.array([[[0.0, 1e6], [3e6, 0]]]), tau=10)

    assert agreement is not None
    assert agreement.expected == pytest.approx(5 / 8, abs=1e-4)
    assert agreement.observed == pytest.approx(5 / 8, abs=1e-4)


def simulate(spammers: int, seed: int = 0) -> tuple[Floats, list[PairVote]]:
    """100 groups of 8 with 40 votes each from 20 raters, the first few of whom click at random."""
    rng = np.random.default_rng(seed)
    wins_BGG, votes = np.zeros((100, 8, 8)), []
    truth_BG = rng.normal(0, 1.5, (100, 8))
    for b in range(100):
        for _ in range(40):
            i, j = (int(k) for k in rng.choice(8, 2, replace=False))
            rater = int(rng.integers(20))
            p = 0.5 if rater < spammers else 1 / (1 + math.exp(truth_BG[b, j] - truth_BG[b, i]))
            winner, loser = (i, j) if rng.random() < p else (j, i)
            wins_BGG[b, winner, loser] += 1
            votes.append(PairVote(f"r{rater:02}", b, winner, loser))
    return wins_BGG, votes


def test_honest_raters_agree_as_often_as_the_ranking_expects() -> None:
    agreement = pair_agreement(simulate(spammers=0)[0], tau=1.5)

    assert agreement is not None
    assert agreement.observed == pytest.approx(agreement.expected, abs=0.03)


def test_who_clicks_at_random_has_the_lowest_reliability() -> None:
    reliability = rater_reliability(simulate(spammers=4)[1])
    spammers = {f"r{k:02}" for k in range(4)}

    assert set(sorted(reliability, key=reliability.__getitem__)[:4]) == spammers
    assert max(reliability[name] for name in spammers) < 0.8
    assert min(reliability[name] for name in reliability.keys() - spammers) > 0.85


def test_who_votes_against_everybody_is_below_a_half() -> None:
    votes = [PairVote(rater, group, 0, 1) for rater in "abcde" for group in range(30)]
    reliability = rater_reliability([*votes, *(PairVote("contrary", group, 1, 0) for group in range(30))])

    assert reliability["contrary"] < 0.3
    assert min(reliability[rater] for rater in "abcde") > 0.9


def test_reliability_needs_votes_and_does_not_mind_few() -> None:
    assert rater_reliability([]) == {}
    assert rater_reliability([PairVote("a", 7, 0, 1)]) == {"a": pytest.approx(0.82, abs=0.03)}


def test_gold_accuracy_is_per_rater() -> None:
    accuracy = gold_accuracy([("a", True), ("a", False), ("b", True), ("a", True)])

    assert accuracy == {"a": Share(2, 3), "b": Share(1, 1)}
    assert accuracy["b"].value == 1
    assert gold_accuracy([]) == {}


@pytest.mark.parametrize(
    ("left", "right", "p_value"),
    [(5, 5, 1.0), (6, 0, 2 / 64), (1, 5, 2 * 7 / 64), (3, 4, 1.0), (0, 0, 1.0), (60, 40, 0.0568879)],
)
def test_side_bias_is_the_exact_binomial_test(left: int, right: int, p_value: float) -> None:
    assert side_bias(left, right).p_value == pytest.approx(p_value, abs=1e-6)
    assert side_bias(right, left).p_value == side_bias(left, right).p_value
    assert side_bias(left, right).left == Share(left, left + right)


def test_side_bias_of_many_votes_is_finite_and_of_none_unknown() -> None:
    assert side_bias(5_000, 5_200).p_value == pytest.approx(0.0486, abs=2e-3)  # z = 199 / sqrt(10200), two-sided
    assert side_bias(9_000, 10).p_value == 0
    assert side_bias(0, 0).left.value is None
    with pytest.raises(ValueError, match="from 0"):
        side_bias(-1, 3)


def test_the_response_floor_grows_with_the_words_to_read() -> None:
    assert response_floor_s(0) == pytest.approx(0.3)
    assert response_floor_s(120) == pytest.approx(10.3)
