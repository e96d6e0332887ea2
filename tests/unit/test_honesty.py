"""The honesty report: every figure as worked out by hand, and the same whichever way round the data come."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_files import write_rows

from rlhf_cli.evaluation.calibration import sigmoid
from rlhf_cli.evaluation.ceiling import corrected, split_half
from rlhf_cli.evaluation.honesty import Judged, honesty_report
from rlhf_cli.recipe.data import read_voted_groups
from rlhf_cli.recipe.votes import VotedGroup, rated_wins
from rlhf_cli.types import Message, WinMatrix


def group(prompt: str, texts: list[str], wins: list[list[float]], source: str = "made") -> VotedGroup:
    return VotedGroup((Message("user", prompt),), tuple(texts), WinMatrix(wins), source)


def duel(prompt: str, first: str, second: str, won: float, lost: float, source: str = "made") -> VotedGroup:
    return group(prompt, [first, second], [[0, won], [lost, 0]], source)


def scores(*rows: list[float]) -> list[np.ndarray[Any, Any]]:
    return [np.array(row, dtype=float) for row in rows]


SMALL = [
    duel("a", "long answer here", "short", 3, 1, "forum"),
    duel("b", "aa", "bbbb", 2, 0, "forum"),
    duel("b", "x", "yyy", 1, 1, "forum"),
    group("c", ["one", "three", "seven!!"], [[0, 0, 1], [1, 0, 0], [0, 2, 0]], "team"),
]
SAID = scores([1, 0], [0, 1], [5, 0], [0, 1, 2])


def test_a_small_example_by_hand() -> None:
    report = honesty_report(Judged(SMALL, SAID, truncated=2))

    # Majorities: a 0>1 (right), b 0>1 (wrong), c 1>0 (right), 0>2 (wrong), 2>1 (right); the second b has none.
    assert (report["accuracy"]["value"], report["accuracy"]["pairs"]) == (3 / 5, 5)
    # Longer: a right, b wrong, c 1>0 right, 0>2 wrong, 2>1 right. Pair by pair the same as the model.
    assert report["longer_wins"]["characters"]["value"] == 3 / 5
    assert report["longer_wins"]["advantage"]["value"] == 0
    assert report["longer_wins"]["tokens"] is None
    # Votes with the model: 3 of 4, 0 of 2, 1 of 2, and 1, 0 and 2 of 1, 1 and 2: 7 of 12; at best 3 + 2 + 1 + 4.
    assert report["vote_accuracy"]["value"] == pytest.approx(7 / 12)
    assert report["vote_accuracy"]["best_possible"] == pytest.approx(10 / 12)
    # Of 3 to 1, half of the splits decide, and then half of them agree; 2 to 0 and the 2 of c agree, 1 to 1 not.
    assert report["ceiling"]["value"] == pytest.approx((0.25 + 1 + 0 + 1) / (0.5 + 1 + 1 + 1))
    assert report["ceiling"]["accuracy_on_the_same"]["value"] == pytest.approx(2 / 3)
    assert {row["name"]: (row["value"], row["pairs"]) for row in report["by_source"]} == {
        "team": (pytest.approx(2 / 3), 3),
        "forum": (0.5, 2),
    }
    assert {row["name"]: (row["value"], row["pairs"]) for row in report["by_margin"]} == {
        "a single vote": (0.5, 2),
        "all votes one way": (0.5, 2),
        "two thirds or more": (1.0, 1),
    }
    assert {row["name"]: (row["value"], row["pairs"]) for row in report["by_length"]} == {
        "longer preferred": (1.0, 3),
        "shorter preferred": (0.0, 2),
    }
    assert report["sizes"] == {
        "groups": 4,
        "prompts": 3,
        "completions": 9,
        "pairs": 6,
        "pairs_without_majority": 1,
        "pairs_scored_equal": 0,
        "votes": 12,
        "truncated": 2,
    }


def test_reward_and_length_are_correlated_within_a_prompt_by_hand() -> None:
    # Centred lengths (-1, 0, 1) and (-1, 1), rewards (0, 1, -1) and (2, -2) around means that do not matter.
    judged = Judged(
        [
            group("a", ["x", "xx", "xxx"], [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
            duel("b", "y" * 10, "y" * 12, 3, 1),
        ],
        scores([100, 101, 99], [-50 + 2, -50 - 2]),
    )
    length = honesty_report(judged)["length"]
    assert length["correlation"] == pytest.approx((-1 - 2 - 2) / math.sqrt(4 * 10))
    # Shares won: 1/2 each, and 3/4 to 1/4.
    assert length["correlation_of_votes"] == pytest.approx((-0.25 - 0.25) / math.sqrt(4 * 0.125))


def test_equal_scores_are_right_half_of_the_time_and_say_nothing_about_length() -> None:
    report = honesty_report(Judged(SMALL, scores([0, 0], [0, 0], [0, 0], [0, 0, 0])))
    assert report["accuracy"]["value"] == 0.5
    assert report["length"]["correlation"] is None
    assert any("same score twice" in warning for warning in report["warnings"])


def test_lengths_in_tokens_make_a_baseline_of_their_own() -> None:
    report = honesty_report(Judged(SMALL[:2], SAID[:2], tokens=[[1, 2], [9, 3]]))
    assert report["longer_wins"]["characters"]["value"] == 0.5
    assert report["longer_wins"]["tokens"]["value"] == 0.5
    assert honesty_report(Judged(SMALL[:1], SAID[:1], tokens=[[1, 2]]))["longer_wins"]["tokens"]["value"] == 0


def many(seed: int, prompts: int = 60, temperature: float = 1.0, ties: float = 0.2) -> Judged:
    """Votes with known probabilities on groups of two to five, and a model that is `temperature` times too sure."""
    rng = np.random.default_rng(seed)
    groups, said = [], []
    for n in range(prompts):
        size = int(rng.integers(2, 6))
        reward = rng.normal(0, 1.5, size)
        wins = np.zeros((size, size))
        for i in range(size):
            for j in range(i):
                votes = int(rng.integers(i == 1, 4))
                wins[i, j] = rng.binomial(votes, float(sigmoid(np.array(reward[i] - reward[j]))))
                wins[j, i] = votes - wins[i, j]
                wins[[i, j], [j, i]] += 0.5 * (rng.random() < ties)
        texts = [f"{k} " * int(rng.integers(1, 40)) + str(k) for k in range(size)]
        groups.append(group(f"prompt {n}", texts, wins.tolist(), f"source {n % 3}"))
        said.append(temperature * reward)
    return Judged(groups, said)


def close(one: Any, other: Any) -> bool:
    """Equal up to rounding, through all levels; sentences are left to their figures."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one if k not in ("words",))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_order_of_completions_and_of_groups_does_not_matter(seed: int) -> None:
    judged = many(seed, 40)
    rng = np.random.default_rng(seed)
    groups, said = [], []
    for g in rng.permutation(len(judged.groups)):
        voted, order = judged.groups[g], rng.permutation(len(judged.groups[g].completions))
        texts = [voted.completions[k] for k in order]
        wins = voted.wins.wins[np.ix_(order, order)].tolist()
        groups.append(VotedGroup(voted.prompt, tuple(texts), WinMatrix(wins), voted.source))
        said.append(judged.scores[g][order])

    assert close(honesty_report(judged), honesty_report(Judged(groups, said)))


def test_a_pairwise_model_that_says_the_same_gets_the_same_report() -> None:
    judged = many(1)
    logits = [row[:, None] - row[None, :] for row in judged.scores]
    assert close(honesty_report(judged), honesty_report(Judged(judged.groups, logits)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_the_temperature_is_fitted_on_one_half_and_holds_on_the_other(seed: int, temperature: float) -> None:
    report = honesty_report(many(seed, 2000, temperature, ties=0))

    assert report["temperature"]["value"] == pytest.approx(temperature, rel=0.1)
    assert report["calibration"]["after"]["ece"] <= 0.03
    assert report["calibration"]["before"]["ece"] > 0.05
    assert report["temperature"]["pairs"] + report["calibration"]["after"]["pairs"] == report["sizes"]["pairs"]
    assert any(("over" if temperature > 1 else "under") + "-confident" in word for word in report["words"])
    assert report["warnings"] == []


def test_votes_by_rater_show_ties_that_a_matrix_hides(tmp_path: Path) -> None:
    def votes(*choices: str) -> dict[str, Any]:
        cast = [{"annotator": f"rater {n}", "choice": choice} for n, choice in enumerate(choices)]
        return {"prompt": "p", "response_1": "a", "response_2": "b", "votes": cast}

    (two_ties,) = read_voted_groups(write_rows(tmp_path / "v.jsonl", [votes("tie", "tie")]))
    assert split_half(two_ties) is None  # nobody preferred anything, so no half has anything to predict
    assert split_half(duel("p", "a", "b", 1, 1)) is not None
    (mixed,) = read_voted_groups(write_rows(tmp_path / "v.jsonl", [votes("1", "1", "tie")]))
    halves = split_half(mixed)
    assert halves is not None
    # One against two. Alone 1 (2 of 3 ways): both decided and agreed. Alone the tie: only the two are, at a half.
    assert halves.decided[0, 1] == pytest.approx((2 / 3 * 2 + 1 / 3) / 2)
    assert halves.agreed[0, 1] == pytest.approx((2 / 3 * 2 + 1 / 3 * 0.5) / 2)


def test_weighted_votes_have_no_ceiling() -> None:
    report = honesty_report(Judged([duel("p", "a", "b", 2.7, 0.4)], scores([1, 0])))
    assert report["ceiling"] is None


def rated(*ratings: list[float]) -> VotedGroup:
    texts = tuple(f"text {n} {sum(row)}" for n, row in enumerate(ratings))
    return VotedGroup((), texts, rated_wins(ratings), "snippets", ratings=tuple(tuple(r) for r in ratings))


def test_raters_of_texts_who_agree_have_a_ceiling_of_one_and_dice_one_of_a_half() -> None:
    report = honesty_report(Judged([rated([3] * 6, [1] * 5, [-2] * 7)] * 2, scores([3, 2, 1], [3, 2, 1])))
    assert report["ceiling"]["value"] == 1
    assert report["ceiling"]["corrected"] == 1

    rng = np.random.default_rng(0)
    dice = [rated(*rng.integers(-4, 5, (4, 10)).tolist()) for _ in range(300)]
    assert honesty_report(Judged(dice, [np.arange(4.0)] * 300))["ceiling"]["value"] == pytest.approx(0.5, abs=0.02)


def test_the_corrected_ceiling_is_what_somebody_who_knows_the_truth_would_reach() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 1, (400, 4))
    groups = [rated(*(mean + rng.normal(0, 3, (4, 12))).tolist()) for mean in truth[:, :, None]]

    report = honesty_report(Judged(groups, list(truth)))

    assert report["accuracy"]["value"] - report["ceiling"]["value"] > 0.05
    assert report["ceiling"]["corrected"] == pytest.approx(report["accuracy"]["value"], abs=0.02)
    assert corrected(0.5) == 0.5
    assert corrected(0.3) == 0.5


def follows_length(judged: Judged) -> Judged:
    lengths = [np.array([float(len(text)) for text in g.completions]) for g in judged.groups]
    return Judged(judged.groups, lengths)


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        (lambda: Judged(SMALL, SAID), "Only 5 held-out pairs"),
        (lambda: Judged(many(5).groups, [-row for row in many(5).scores]), "no better than chance"),
        (lambda: Judged(many(5).groups, [-row for row in many(5).scores]), "could not be put right"),
        (lambda: follows_length(many(5)), "rewards follow length"),
        (lambda: Judged(*length_wins()), "not surely better than always taking the longer"),
        (lambda: Judged(*length_wins(-1)), "not surely better than always taking the shorter"),
        (lambda: Judged(many(5).groups, many(5).scores, consistency=0.8), "On 20.0% of the pairs its verdict depends"),
        (lambda: Judged(many(5).groups, many(5).scores, truncated=190), "190 of"),
        (lambda: Judged(*two_minds()), "off by"),
        (lambda: Judged(*hardly_better_than_chance()), "temperature is uncertain"),
    ],
)
def test_what_makes_a_model_untrustworthy_is_said(judged: Callable[[], Judged], said: str) -> None:
    warnings = honesty_report(judged())["warnings"]
    assert any(said in warning for warning in warnings), warnings


def length_wins(sign: int = 1) -> tuple[list[VotedGroup], list[np.ndarray[Any, Any]]]:
    """People like longer answers, or shorter ones, nine times in ten, and so does the model."""
    groups = [duel(f"p{n}", "x" * 20, "y" * (20 - sign * 5), *((1, 0) if n % 10 else (0, 1))) for n in range(300)]
    return groups, [np.array([1.0, 0.0])] * 300


def test_a_model_that_only_takes_the_shorter_one_is_not_ahead_of_that_rule() -> None:
    report = honesty_report(Judged(*length_wins(-1)))
    assert report["longer_wins"]["characters"]["value"] == pytest.approx(0.1)
    assert report["accuracy"]["value"] == pytest.approx(0.9)
    assert report["longer_wins"]["advantage"]["value"] == 0


def two_minds() -> tuple[list[VotedGroup], list[np.ndarray[Any, Any]]]:
    """Sure and wrong on half of the prompts, unsure and right on the others: no temperature mends that."""
    groups = [duel(f"p{n}", "aaa", "bbb", *((7, 3) if n % 2 else (10, 0))) for n in range(400)]
    return groups, [np.array([3.0, 0.0]) if n % 2 else np.array([0.1, 0.0]) for n in range(400)]


def hardly_better_than_chance() -> tuple[list[VotedGroup], list[np.ndarray[Any, Any]]]:
    groups = [duel(f"p{n}", "aaa", "bbb", *((1, 0) if n % 20 < 12 else (0, 1))) for n in range(120)]
    return groups, [np.array([1.0, 0.0])] * 120


def test_a_score_that_is_not_a_number_and_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        honesty_report(Judged(SMALL[:1], scores([math.nan, 0])))
    with pytest.raises(ValueError, match="shape"):
        honesty_report(Judged(SMALL[:1], scores([1, 2, 3])))
    with pytest.raises(ValueError, match="no held-out groups"):
        honesty_report(Judged([], []))


def test_the_smallest_held_out_set_makes_a_report_without_made_up_numbers() -> None:
    for voted in (duel("a", "x", "y", 1, 0), duel("b", "x", "y", 1, 1), duel("c", "x", "x", 0, 2)):
        report = json.loads(json.dumps(honesty_report(Judged([voted], scores([1, 0]))), allow_nan=False))
        assert report["temperature"]["low"] is None
        assert report["warnings"]
        if voted.wins.wins[0, 1] == voted.wins.wins[1, 0]:
            assert report["accuracy"] is None
            assert report["words"] == ["No held-out pair has a majority, so nothing can be said about the accuracy."]
