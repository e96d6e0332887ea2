"""The plan of a training: every example once a pass, like lengths together, and the same plan for the same seed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.learner.batches import plan_batches


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=200),
    size=st.integers(1, 9),
    passes=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_each_pass_takes_every_example_once(lengths: list[int], size: int, passes: int, seed: int) -> None:
    plan = plan_batches(lengths, size, passes, seed)
    each = -(-len(lengths) // size)
    assert len(plan) == passes * each
    for start in range(0, len(plan), each):
        assert sorted(k for batch in plan[start : start + each] for k in batch) == list(range(len(lengths)))
    assert plan == plan_batches(lengths, size, passes, seed)


def test_a_limit_on_batches_holds_whatever_the_passes_are() -> None:
    assert len(plan_batches([1, 2, 3], 2, 1, 0, max_batches=7)) == 7
    assert plan_batches(range(1, 50), 4, 5, 0)[:9] == plan_batches(range(1, 50), 4, 1, 0, max_batches=9)


def test_like_lengths_share_a_batch_and_the_order_of_batches_does_not_follow_length() -> None:
    lengths = [n % 97 for n in range(400)]
    plan = plan_batches(lengths, 8, 1, 3)
    padding = sum(max(lengths[k] for k in b) * len(b) - sum(lengths[k] for k in b) for b in plan)
    unsorted = [list(range(n, n + 8)) for n in range(0, 400, 8)]
    assert padding < 0.5 * sum(max(lengths[k] for k in b) * len(b) - sum(lengths[k] for k in b) for b in unsorted)
    longest = [max(lengths[k] for k in b) for b in plan]
    assert longest != sorted(longest)


def test_another_seed_and_another_pass_have_another_order() -> None:
    lengths = [5] * 64
    first, second = plan_batches(lengths, 8, 2, 0)[:8], plan_batches(lengths, 8, 2, 0)[8:]
    assert first != second
    assert first != plan_batches(lengths, 8, 1, 1)
