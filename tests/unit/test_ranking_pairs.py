"""Whatever the goal, no rater gets a pair they must not get, and the group is connected as soon as it can be."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ranking.bradley_terry import components, fit
from rlhf_cli.ranking.pairs import Goal, Pair, choose_pair
from rlhf_cli.types import WinMatrix

GOALS: list[Goal] = ["ranking", "best", "balanced"]
EVERY_GOAL = pytest.mark.parametrize("goal", GOALS)


def no_votes(size: int) -> WinMatrix:
    return WinMatrix(np.zeros((size, size)))


@st.composite
def situations(draw: st.DrawFn) -> tuple[WinMatrix, dict[Pair, int], set[Pair]]:
    size = draw(st.integers(2, 9))
    pairs = list(combinations(range(size), 2))
    wins = np.zeros((size, size))
    for i, j in draw(st.lists(st.sampled_from(pairs), max_size=40)):
        outcome = draw(st.sampled_from([0.0, 0.5, 1.0]))
        wins[i, j] += outcome
        wins[j, i] += 1 - outcome
    in_flight = draw(st.dictionaries(st.sampled_from(pairs), st.integers(1, 3)))
    return WinMatrix(wins), in_flight, draw(st.sets(st.sampled_from(pairs)))


@EVERY_GOAL
@given(situations(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_a_rater_gets_an_allowed_pair_as_long_as_there_is_one(
    goal: Goal, situation: tuple[WinMatrix, dict[Pair, int], set[Pair]], seed: int
) -> None:
    wins, in_flight, forbidden = situation
    allowed = set(combinations(range(wins.size), 2)) - forbidden
    pair = choose_pair(wins, in_flight, forbidden, random.Random(seed), goal)

    assert pair in allowed if allowed else pair is None
    assert pair == choose_pair(wins, in_flight, forbidden, random.Random(seed), goal)
    turned = {(j, i) for i, j in forbidden}
    assert pair == choose_pair(wins, in_flight, turned, random.Random(seed), goal)


@EVERY_GOAL
@pytest.mark.parametrize("size", [2, 3, 8, 13, 16])
@pytest.mark.parametrize("answered", [True, False])
def test_a_matching_comes_first_and_size_minus_one_votes_connect_the_group(
    goal: Goal, size: int, answered: bool
) -> None:
    """Answered or still with their raters: what is in flight is on its way."""
    rng = random.Random(size)
    wins, in_flight = np.zeros((size, size)), {}
    shown: list[Pair] = []
    for _ in range(size - 1):
        pair = choose_pair(WinMatrix(wins), in_flight, (), rng, goal)
        assert pair is not None
        shown.append(pair)
        if answered:
            wins[pair if rng.random() < 0.5 else pair[::-1]] += 1
        else:
            in_flight[pair] = 1

    met = np.zeros((size, size), dtype=bool)
    for i, j in shown:
        met[i, j] = met[j, i] = True
    assert len({k for pair in shown[: size // 2] for k in pair}) == size // 2 * 2
    assert not components(met).any()
    assert met.sum(1).max() <= 2  # a chain: nobody is compared more than twice before all are connected


def test_the_first_pair_is_any_pair() -> None:
    rng = random.Random(0)

    assert {choose_pair(no_votes(4), {}, (), rng) for _ in range(100)} == set(combinations(range(4), 2))


def test_a_lease_that_came_back_unanswered_is_handed_out_again() -> None:
    wins = WinMatrix([[0, 1, 0], [0, 0, 0], [0, 0, 0]])

    assert choose_pair(wins, {(0, 2): 1}, (), random.Random(0), "balanced") == (1, 2)
    assert choose_pair(wins, {}, [(1, 2)], random.Random(0), "balanced") == (0, 2)


def test_balanced_compares_all_pairs_equally_often() -> None:
    rng, wins = random.Random(1), np.zeros((6, 6))
    for votes in range(1, 46):
        pair = choose_pair(WinMatrix(wins), {}, (), rng, "balanced")
        assert pair is not None
        wins[pair] += 1
        counts = wins[np.triu_indices(6, 1)]
        assert counts.max() - counts.min() <= 1
        assert votes < 15 or counts.min() >= 1


def test_ranking_asks_where_a_vote_says_most() -> None:
    """0 and 1 are level, 2 is far behind both: only the vote on 0 and 1 is open."""
    wins = WinMatrix([[0, 5, 20], [5, 0, 20], [0, 0, 0]])

    assert choose_pair(wins, {}, (), random.Random(0), "ranking") == (0, 1)


def test_ranking_spreads_raters_who_vote_at_the_same_time() -> None:
    wins = WinMatrix([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
    in_flight: dict[Pair, int] = {}
    for _ in range(4):
        pair = choose_pair(wins, in_flight, (), random.Random(0), "ranking")
        assert pair is not None
        in_flight[pair] = in_flight.get(pair, 0) + 1

    assert len(in_flight) >= 3


def test_best_asks_among_those_that_may_be_the_best() -> None:
    """0 and 1 lead clearly and are level; what 2 to 5 are among themselves does not matter."""
    wins = np.full((6, 6), 2.0)
    wins[:2, 2:], wins[2:, :2] = 30, 1
    np.fill_diagonal(wins, 0)
    rng = random.Random(0)
    pairs = [choose_pair(WinMatrix(wins), {}, (), rng, "best") for _ in range(100)]

    assert pairs.count((0, 1)) > 90


@EVERY_GOAL
@pytest.mark.parametrize("count", [1e-3, 1e6])
def test_one_sided_votes_of_any_size_do_not_break_the_choice(goal: Goal, count: float) -> None:
    wins = WinMatrix(np.triu(np.full((5, 5), count), 1))

    assert choose_pair(wins, {(0, 1): 1}, [(0, 1)], random.Random(0), goal) is not None


def test_information_gain_orders_a_group_better_than_random_pairs_do() -> None:
    """56 votes on 8, the same groups both ways; counted are pairs of completions in the right order."""
    i_P, j_P = np.triu_indices(8, 1)
    right = {"ranking": 0, "random": 0}
    for seed in range(60):
        truth = np.random.default_rng(seed).normal(0, 1.5, 8)
        for way in right:
            rng, wins = random.Random(seed), np.zeros((8, 8))
            for _ in range(56):
                pair = rng.choice(list(combinations(range(8), 2)))
                if way == "ranking":
                    pair = choose_pair(WinMatrix(wins), {}, (), rng, "ranking") or pair
                first = rng.random() < 1 / (1 + math.exp(truth[pair[1]] - truth[pair[0]]))
                wins[pair if first else pair[::-1]] += 1
            scores, _ = fit(wins)
            right[way] += int(((scores[i_P] > scores[j_P]) == (truth[i_P] > truth[j_P])).sum())

    assert right["ranking"] > right["random"]
