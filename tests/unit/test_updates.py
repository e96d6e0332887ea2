"""The updates of a step: which groups each is on, and how the figures of its parts come together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.learner.stream_trainer import Means, plan_updates


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_every_pass_takes_every_group_once(groups: int, epochs: int, minibatches: int, step: int) -> None:
    updates = plan_updates(groups, epochs, minibatches, (7, step))
    each = min(minibatches, groups)
    assert len(updates) == epochs * each
    for epoch in range(epochs):
        part = updates[epoch * each : (epoch + 1) * each]
        assert sorted(k for update in part for k in update) == list(range(groups))
        assert max(map(len, part)) - min(map(len, part)) <= 1
    assert updates == plan_updates(groups, epochs, minibatches, (7, step))


def test_one_minibatch_keeps_the_order_of_the_groups() -> None:
    assert plan_updates(3, 2, 1, (7, 0)) == [[0, 1, 2], [0, 1, 2]]


def test_passes_and_steps_deal_the_groups_out_anew() -> None:
    first, second = plan_updates(16, 2, 2, (7, 0)), plan_updates(16, 2, 2, (7, 1))
    assert first[0] != first[2]
    assert first[0] != second[0]


def test_figures_of_parts_are_weighed() -> None:
    means = Means()
    means.add(1, {"a": 1.0, "b": 5.0})
    means.add(3, {"a": 3.0})
    means.add(0, {"c": 9.0})
    assert means.means() == pytest.approx({"a": 2.5, "b": 5.0})
    means.clear()
    assert means.means() == {}
