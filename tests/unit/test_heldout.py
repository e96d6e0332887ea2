"""Figures of an evaluation, worked out by hand."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.evaluation.heldout import (
    Comparison,
    check_gates,
    comparisons,
    drift_rows,
    pair_up,
    reward_rows,
    same_answer,
    win_rate_rows,
)
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Unranked, WinMatrix


def answer(
    text: str, logps: tuple[float, ...] = (-1.0,), ref: tuple[float, ...] = (-1.0,), ended: bool = True
) -> Completion:
    return Completion(text, tuple(range(len(logps))), logps, ref, ended)


def group(name: str, *answers: Completion) -> Group:
    return Group(name, 0, Prompt(name, (Message("user", f"{name}?"),)), (1,), answers, 0)


def ranked(pair: Group, before: float, after: float) -> RankedGroup:
    return RankedGroup(pair, WinMatrix([[0, before], [after, 0]]), "item:x", 1.0, True)


def test_answers_are_paired_in_order_and_the_trained_one_is_second() -> None:
    before = [group("a", answer("a0"), answer("a1")), group("b", answer("b0"), answer("b1"))]
    after = [group("a", answer("A0"), answer("A1")), group("b", answer("B0"), answer("b1"))]
    pairs = pair_up(before, after, "run-eval")
    assert [[c.text for c in p.completions] for p in pairs] == [["a0", "A0"], ["a1", "A1"], ["b0", "B0"], ["b1", "b1"]]
    assert [p.id for p in pairs] == [f"run-eval-{i:06d}" for i in range(4)]
    assert [p.prompt.id for p in pairs] == ["a", "a", "b", "b"]
    assert [same_answer(p) for p in pairs] == [False, False, False, True]


def test_votes_count_for_the_side_they_were_given_to() -> None:
    (pair,) = pair_up([group("a", answer("x"))], [group("a", answer("y"))], "e")
    (tie,) = pair_up([group("b", answer("x"))], [group("b", answer("x"))], "e")
    verdicts = [ranked(pair, before=1, after=4.5), Unranked(pair, "no votes")]
    assert comparisons(verdicts, [tie]) == [Comparison("a", won=4.5, lost=1), Comparison("b", 0.5, 0.5)]


def test_the_win_rate_is_a_mean_over_prompts_not_over_votes() -> None:
    compared = [Comparison("a", 9, 1), Comparison("b", 0, 2), Comparison("a", 10, 0), Comparison("c", 1, 1)]
    rows = win_rate_rows(compared)
    assert rows["win_rate"] == pytest.approx((19 / 20 + 0 + 0.5) / 3)
    low, high = rows["win_rate_low"], rows["win_rate_high"]
    assert low is not None
    assert high is not None
    assert 0 <= low < rows["win_rate"] < high <= 1


def test_where_nothing_was_compared_there_is_no_win_rate() -> None:
    assert win_rate_rows([]) == {"win_rate": None, "win_rate_low": None, "win_rate_high": None}


def test_the_gain_in_reward_with_its_interval_over_prompts() -> None:
    rows = reward_rows([[1.0, 3.0], [0.0, 0.0], [5.0, 5.0]], [[3.0, 3.0], [1.0, 3.0], [5.0, 8.0]])
    assert rows["reward_before"] == pytest.approx((2 + 0 + 5) / 3)
    assert rows["reward_after"] == pytest.approx((3 + 2 + 6.5) / 3)
    # gains 1, 2, 1.5: mean 1.5, standard error 0.5 / sqrt(3), t(2) = 4.302653
    assert rows["reward_gain"] == pytest.approx(1.5)
    assert rows["reward_gain_low"] == pytest.approx(1.5 - 4.302653 * 0.5 / 3**0.5, abs=1e-5)
    assert rows["reward_gain_high"] == pytest.approx(1.5 + 4.302653 * 0.5 / 3**0.5, abs=1e-5)


def test_a_single_prompt_says_nothing_about_the_spread_and_stays_json() -> None:
    rows = reward_rows([[1.0]], [[2.0]])
    assert rows["reward_gain"] == 1
    assert rows["reward_gain_low"] is rows["reward_gain_high"] is None
    json.dumps(rows, allow_nan=False)


def test_drift_is_of_the_trained_answers_and_lengths_are_of_both() -> None:
    before = [group("a", answer("x", (-1.0, -2.0), (-1.0, -2.0)), answer("y", (-1.0,), (-1.0,), ended=False))]
    after = [group("a", answer("x", (-1.0, -1.0, -1.0), (-2.0, -3.0, -1.0)), answer("y", (-1.0,), (-2.0,)))]
    rows = drift_rows(before, after)
    assert rows["kl_sequence_nats"] == pytest.approx((3 + 1) / 2)
    assert rows["kl_token_nats"] == pytest.approx(4 / 4)
    assert (rows["length_before_tokens"], rows["length_after_tokens"]) == (1.5, 2)
    assert (rows["ended_before_frac"], rows["ended_after_frac"]) == (0.5, 1)


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({"win_rate": 0.6, "kl_nats_max": 5.0, "reward_gain": 0.0}, {"win_rate": True, "kl_nats_max": True}),
        ({"win_rate": 0.61, "kl_nats_max": 4.9}, {"win_rate": False, "kl_nats_max": False}),
        ({"win_rate": None, "kl_nats_max": None}, {}),
    ],
)
def test_gates_are_inclusive_and_what_was_not_measured_has_not_passed(
    gates: dict[str, float | None], passed: dict[str, bool]
) -> None:
    checked = check_gates({"win_rate": 0.6, "kl_sequence_nats": 5.0}, gates)
    expected = passed | ({"reward_gain": False} if "reward_gain" in gates else {})
    assert {name: gate["passed"] for name, gate in checked.items()} == expected
