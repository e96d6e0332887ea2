"""Scores, advantages and posterior labels of a ranked group, by hand and by their invariances."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_cli.learner.scores import group_advantages, group_scores, posterior_wins
from rlhf_cli.ranking.bradley_terry import TAU, rank
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, WinMatrix

few_scores = st.lists(st.floats(-50, 50), min_size=2, max_size=8)


def ranked(wins: Any, texts: list[str] | None = None, source: str = "item:x", scores: Any = None) -> RankedGroup:
    texts = texts or ["same"] * len(wins)
    made = tuple(Completion(t, (1,), (-1.0,), (-1.0,), True) for t in texts)
    group = Group("g", 0, Prompt("p", (Message("user", "?"),)), (1,), made, 0)
    return RankedGroup(group, WinMatrix(wins), source, 1.0, True, scores)


def advantages(scores: Any, leave_one_out: bool = False, by_deviation: bool = False) -> list[float]:
    array = np.array(scores, dtype=np.float64)
    return group_advantages(array, leave_one_out=leave_one_out, by_deviation=by_deviation).tolist()


def test_votes_become_the_posterior_mean_of_their_ranking() -> None:
    """One vote between two: s = tau^2 (1 - logistic(2 s)), which 0.5556... solves for tau 1.5."""
    score = 0.6
    for _ in range(200):
        score = 0.5 * score + 0.5 * TAU**2 / (1 + math.exp(2 * score))
    assert group_scores(ranked([[0, 1], [0, 0]])) == pytest.approx([score, -score], abs=1e-9)


def test_who_was_never_compared_has_no_score_and_no_advantage() -> None:
    scores = group_scores(ranked([[0, 2, 0], [0, 0, 0], [0, 0, 0]]))
    assert math.isnan(scores[2])
    above = advantages(scores)
    assert above[2] == 0
    assert above[0] == pytest.approx(-above[1])
    assert above[0] > 0
    assert advantages(group_scores(ranked([[0, 0], [0, 0]]))) == [0, 0]


def test_scores_that_the_source_gives_are_taken_as_they_are() -> None:
    given_scores = (0.25, -3.0)
    assert group_scores(ranked([[0, 0], [1, 0]], scores=given_scores, source="function"), per_char=9).tolist() == [
        0.25,
        -3.0,
    ]


def test_a_length_penalty_is_taken_from_a_ranking_once() -> None:
    """What a reward model says was penalised where it was scored."""
    texts = ["four", "sixsix"]
    free = group_scores(ranked([[0, 2], [1, 0]], texts))
    taken = group_scores(ranked([[0, 2], [1, 0]], texts), per_char=0.5)
    assert (free - taken).tolist() == pytest.approx([2.0, 3.0])
    by_model = ranked([[0, 2], [1, 0]], texts, source="reward_model:v1")
    assert group_scores(by_model, per_char=0.5).tolist() == group_scores(by_model).tolist()


def test_advantages_by_hand() -> None:
    assert advantages([1.0, 2.0, 6.0]) == pytest.approx([-2.0, -1.0, 3.0])
    # above the mean of the two others: 1 - 4, 2 - 3.5, 6 - 1.5
    assert advantages([1.0, 2.0, 6.0], leave_one_out=True) == pytest.approx([-3.0, -1.5, 4.5])
    deviation = math.sqrt((4 + 1 + 9) / 2)
    assert advantages([1.0, 2.0, 6.0], by_deviation=True) == pytest.approx(
        [-2 / deviation, -1 / deviation, 3 / deviation]
    )
    assert advantages([2.0, 2.0, 2.0], by_deviation=True) == [0, 0, 0]


@example(0.1, 3, False)
@given(st.floats(-50, 50), st.integers(2, 16), st.booleans())
def test_equal_scores_are_no_label_whatever_rounding_leaves_of_their_mean(
    score: float, size: int, leave_one_out: bool
) -> None:
    assert advantages([score] * size, leave_one_out, by_deviation=True) == [0] * size
    assert advantages([math.nan, 5.0]) == [0, 0]
    assert advantages([math.nan, 1.0, 3.0], leave_one_out=True) == pytest.approx([0, -2.0, 2.0])


@given(few_scores, st.floats(-100, 100), st.booleans())
@settings(deadline=None)
def test_a_shift_of_all_scores_changes_no_advantage(scores: list[float], shift: float, leave_one_out: bool) -> None:
    moved = advantages([s + shift for s in scores], leave_one_out)
    assert moved == pytest.approx(advantages(scores, leave_one_out), abs=1e-9)
    assert sum(moved) == pytest.approx(0, abs=1e-9)


@given(few_scores, st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None)
def test_the_order_of_completions_changes_no_advantage(
    scores: list[float], shuffler: random.Random, leave_one_out: bool
) -> None:
    order = list(range(len(scores)))
    shuffler.shuffle(order)
    whole = advantages(scores, leave_one_out)
    assert advantages([scores[k] for k in order], leave_one_out) == pytest.approx([whole[k] for k in order], abs=1e-9)


@given(few_scores)
@settings(deadline=None)
def test_leaving_one_out_is_the_score_above_the_mean_of_the_others(scores: list[float]) -> None:
    others = [(sum(scores) - s) / (len(scores) - 1) for s in scores]
    by_hand = [s - o for s, o in zip(scores, others, strict=True)]
    assert advantages(scores, leave_one_out=True) == pytest.approx(by_hand, abs=1e-8)


def test_posterior_labels_by_hand() -> None:
    """One vote between two: the mean of logistic(d) over d ~ N(2 s, variance of the difference)."""
    wins = WinMatrix([[0, 1], [0, 0]])
    ranking = rank(wins)
    mean = ranking.scores[0] - ranking.scores[1]
    variance = ranking.covariance[0, 0] + ranking.covariance[1, 1] - 2 * ranking.covariance[0, 1]
    d = np.linspace(mean - 12 * math.sqrt(variance), mean + 12 * math.sqrt(variance), 200_001)
    density = np.exp(-((d - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    expected = float(np.trapezoid(density / (1 + np.exp(-d)), d))
    labels = posterior_wins(ranked(wins.wins.tolist()))
    assert labels[0, 1] == pytest.approx(expected, abs=1e-4)
    assert 0.5 < labels[0, 1] < 1 / (1 + math.exp(-mean))  # doubt pulls it towards one half
    assert labels[1, 0] == pytest.approx(1 - labels[0, 1])


def test_posterior_labels_reach_every_pair_that_votes_join_and_no_other() -> None:
    labels = posterior_wins(ranked([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert labels[0, 2] > labels[0, 1] > 0.5  # nobody compared the first with the third, but the votes say something
    assert labels[0, 2] + labels[2, 0] == pytest.approx(1)
    assert labels[3].tolist() == [0, 0, 0, 0]
    assert labels[:, 3].tolist() == [0, 0, 0, 0]
    assert np.diagonal(labels).tolist() == [0, 0, 0, 0]


def test_more_of_the_same_votes_make_posterior_labels_surer() -> None:
    once, often = (posterior_wins(ranked([[0, times], [0, 0]]))[0, 1] for times in (1, 8))
    assert often > once > 0.5


def test_a_length_penalty_reaches_posterior_labels() -> None:
    texts = ["short", "s" * 105]
    even = posterior_wins(ranked([[0, 1], [1, 0]], texts))
    penalised = posterior_wins(ranked([[0, 1], [1, 0]], texts), per_char=0.02)
    assert even[0, 1] == pytest.approx(0.5)
    assert penalised[0, 1] > 0.7
