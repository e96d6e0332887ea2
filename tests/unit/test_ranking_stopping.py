"""Voting on a group ends when its best is known as well as promised, and not before."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest

from rlhf_cli.ranking.bradley_terry import fit, p_best
from rlhf_cli.ranking.pairs import choose_pair
from rlhf_cli.ranking.stopping import judge_best
from rlhf_cli.types import WinMatrix


def test_the_probability_of_two_is_the_normal_integral() -> None:
    wins = WinMatrix([[0, 6], [2, 0]])
    scores_G, covariance_GG = fit(wins.wins)
    spread = math.sqrt(covariance_GG[0, 0] + covariance_GG[1, 1] - 2 * covariance_GG[0, 1])
    exact = 0.5 + 0.5 * math.erf((scores_G[0] - scores_G[1]) / spread / math.sqrt(2))

    verdict = judge_best(wins, min_votes=8)

    assert verdict.leader == 0
    assert verdict.p_leader == pytest.approx(exact, abs=0.01)
    assert verdict == judge_best(wins, min_votes=8)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_probability_of_many_is_that_of_many_more_draws(size: int) -> None:
    rng = np.random.default_rng(size)
    for votes in (0.2, 0.6, 2.0):
        wins = rng.poisson(votes, (size, size)).astype(float)
        np.fill_diagonal(wins, 0)
        scores_G, covariance_GG = fit(wins)
        drawn_NG = rng.multivariate_normal(scores_G, covariance_GG, 150_000)
        exact_G = np.bincount(drawn_NG.argmax(1), minlength=size) / len(drawn_NG)

        assert p_best(scores_G, covariance_GG) == pytest.approx(exact_G, abs=0.015)


def test_a_clear_winner_stops_the_voting_and_a_level_group_does_not() -> None:
    clear, level = np.full((4, 4), 1.0), np.full((4, 4), 10.0)
    clear[0, 1:], clear[1:, 0] = 12, 0
    np.fill_diagonal(clear, 0)
    np.fill_diagonal(level, 0)

    assert judge_best(WinMatrix(clear), min_votes=8)[:2] == (True, 0)
    assert not judge_best(WinMatrix(level), min_votes=8).stop
    assert not judge_best(WinMatrix(clear), min_votes=100).stop


def test_one_that_nobody_compared_may_still_be_the_best() -> None:
    """Both islands hold many votes; the prior alone would let the threshold pass."""
    wins = WinMatrix([[0, 30, 0], [0, 0, 0], [0, 0, 0]])

    assert judge_best(wins, min_votes=1, threshold=0.5).p_leader > 0.5
    assert not judge_best(wins, min_votes=1, threshold=0.5).stop


@pytest.mark.parametrize("threshold", [0.0, 1.0, 90, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        judge_best(WinMatrix([[0, 1], [1, 0]]), 1, threshold)


def test_nothing_has_no_best() -> None:
    with pytest.raises(ValueError, match="without completions"):
        judge_best(WinMatrix(np.zeros((0, 0))), 1)


def votes_until_known(way: str, groups: int, size: int, most: int) -> tuple[float, float, float]:
    """Votes per group, how many of the groups stopped, and how many of those had the right winner."""
    rng, np_rng = random.Random(7), np.random.default_rng(7)
    votes, stopped, right = 0.0, 0, 0
    for _ in range(groups):
        truth, wins = np_rng.normal(0, 1.5, size), np.zeros((size, size))
        verdict = judge_best(WinMatrix(wins), min_votes=8)
        while not verdict.stop and wins.sum() < most:
            pair = rng.choice(list(combinations(range(size), 2)))
            if way == "best":
                pair = choose_pair(WinMatrix(wins), {}, (), rng, "best") or pair
            first = rng.random() < 1 / (1 + math.exp(truth[pair[1]] - truth[pair[0]]))
            wins[pair if first else pair[::-1]] += 1
            if wins.sum() % 4 == 0:
                verdict = judge_best(WinMatrix(wins), min_votes=8)
        votes += wins.sum()
        stopped += verdict.stop
        right += verdict.stop and verdict.leader == truth.argmax()
    return votes / groups, stopped / groups, right / stopped


def test_stopping_is_right_as_often_as_promised_and_best_gets_there_with_fewer_votes() -> None:
    """80 groups of 6 at a promise of 0.9: three standard errors below it is 0.8."""
    votes, stopped, right = votes_until_known("best", groups=80, size=6, most=100)
    random_votes, random_stopped, _ = votes_until_known("random", groups=80, size=6, most=100)

    assert right > 0.8
    assert stopped > random_stopped
    assert votes < 0.85 * random_votes
