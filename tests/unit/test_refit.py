"""Refitting heads: the optimum of a likelihood that is written down by hand, pulled towards where it started."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_cli.learner.refit import TAU, refit_heads
from rlhf_cli.policy.heads import Array, Heads, VotedFeatures
from rlhf_cli.types import WinMatrix

WIDTH = 5


def world(groups: int, seed: int = 0, votes: int = 10, size: int = 4) -> list[VotedFeatures]:
    """Groups whose votes follow Bradley-Terry with the first feature as the score, twice."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(groups):
        features, wins = draw.normal(size=(size, WIDTH)), np.zeros((size, size))
        for _ in range(votes):
            i, j = draw.choice(size, 2, replace=False)
            won = draw.random() < 1 / (1 + math.exp(2 * (features[j, 0] - features[i, 0])))
            wins[(i, j) if won else (j, i)] += 1
        made.append(VotedFeatures(index, features, WinMatrix(wins)))
    return made


def first(heads: int = 1, seed: int = 1) -> Heads:
    return Heads(np.random.default_rng(seed).normal(size=(heads, WIDTH)), np.full(heads, 0.5))


def objective(weight_H: Array, start_H: Array, voted: list[VotedFeatures], temperature: float) -> float:
    """The module's formula, one vote at a time."""
    squared, pairs, total = 0.0, 0, 0.0
    for v in voted:
        scores = v.features @ weight_H / temperature
        for i in range(len(scores)):
            for j in range(len(scores)):
                total += v.wins.wins[i, j] * math.log1p(math.exp(scores[j] - scores[i]))
                if i < j:
                    squared += float(np.square((v.features[i] - v.features[j]) / temperature).sum())
                    pairs += 1
    sigma = TAU / math.sqrt(squared / pairs)
    return total + float(np.square(weight_H - start_H).sum()) / (2 * sigma**2)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_the_refit_is_the_minimum_of_the_objective(temperature: float) -> None:
    voted, start = world(12), first()
    found = refit_heads(start, voted, temperature, seed=0).weight[0]
    lowest = objective(found, start.weight[0], voted, temperature)
    for direction in np.eye(WIDTH):
        for step in (1e-3, -1e-3):
            assert objective(found + step * direction, start.weight[0], voted, temperature) > lowest


def test_many_votes_teach_what_people_like_and_a_few_hardly_move_it() -> None:
    start = first()
    toward = refit_heads(start, world(400), 1.0, seed=0).weight[0]
    assert toward[0] == pytest.approx(2.0, abs=0.15)
    assert np.abs(toward[1:]).max() < 0.15
    few = refit_heads(start, world(1, votes=1), 1.0, seed=0).weight[0]
    assert 0 < np.abs(few - start.weight[0]).max() < 0.5


def test_the_scale_of_the_features_changes_nothing_but_the_scale_of_the_weights() -> None:
    voted, start = world(10), first()
    large = [VotedFeatures(v.index, 100 * v.features, v.wins) for v in voted]
    one = refit_heads(start, voted, 1.0, seed=0)
    other = refit_heads(Heads(start.weight / 100, start.bias), large, 1.0, seed=0)
    assert other.weight * 100 == pytest.approx(one.weight, rel=1e-4, abs=1e-6)


def test_order_of_groups_and_of_completions_do_not_matter_and_biases_stay() -> None:
    voted, start, turn = world(10), first(), np.array([2, 0, 3, 1])
    turned = [
        VotedFeatures(v.index, v.features[turn], WinMatrix(v.wins.wins[np.ix_(turn, turn)])) for v in reversed(voted)
    ]
    one, other = refit_heads(start, voted, 1.0, seed=0), refit_heads(start, turned, 1.0, seed=0)
    assert other.weight == pytest.approx(one.weight, abs=1e-6)
    assert np.array_equal(one.bias, start.bias)


def test_a_group_that_is_there_twice_counts_as_twice_its_votes() -> None:
    voted, start = world(6), first()
    doubled = [VotedFeatures(v.index, v.features, WinMatrix(2 * v.wins.wins)) for v in voted]
    one, other = refit_heads(start, [*voted, *voted], 1.0, seed=0), refit_heads(start, doubled, 1.0, seed=0)
    assert other.weight == pytest.approx(one.weight, abs=1e-6)


def test_groups_of_different_sizes_are_fitted_together() -> None:
    small, large = world(4, seed=2, size=2), world(4, seed=3, size=6)
    start = first()
    found = refit_heads(start, [*small, *large], 1.0, seed=0).weight[0]
    lowest = objective(found, start.weight[0], [*small, *large], 1.0)
    for direction in np.eye(WIDTH):
        for step in (1e-3, -1e-3):
            assert objective(found + step * direction, start.weight[0], [*small, *large], 1.0) > lowest


def test_heads_of_an_ensemble_stay_apart_where_votes_are_few_and_come_together_where_they_are_many() -> None:
    start = first(heads=8)
    few, many = (refit_heads(start, world(n), 1.0, seed=0).weight.std(0).mean() for n in (5, 400))
    assert many < 0.25 * few
    again = refit_heads(start, world(5), 1.0, seed=0)
    assert np.array_equal(again.weight, refit_heads(start, world(5), 1.0, seed=0).weight)
    assert not np.allclose(again.weight, refit_heads(start, world(5), 1.0, seed=1).weight)


@pytest.mark.parametrize("same", [True, False])
def test_without_anything_to_tell_apart_the_heads_stay(same: bool) -> None:
    start = first()
    voted = [VotedFeatures(0, np.ones((2, WIDTH)), WinMatrix([[0, 3], [1, 0]]))] if same else []
    assert refit_heads(start, voted, 1.0, seed=0) is start


def test_heads_come_back_from_disk_bit_for_bit() -> None:
    heads = refit_heads(first(3), world(3), 1.0, seed=0)
    back = Heads.from_bytes(heads.to_bytes())
    assert np.array_equal(back.weight, heads.weight)
    assert np.array_equal(back.bias, heads.bias)
