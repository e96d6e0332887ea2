"""Which candidate a label stands for: every way to read labels, and none that contradicts another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.flow.base import BadAnswer
from rlhf_cli.flow.labels import Nameless, elo_in_order_of, identifier, in_order_of
from rlhf_cli.flow.wire import SeenResults, VoteMatrix

DATA = np.array([[0, 2, 1], [1, 0, 0.5], [0, 4, 0]])
TEXTS = ["a", "b", "c"]


def matrix(labels: list[str], order: list[int], sort_index: list[int] | None = None) -> VoteMatrix:
    """The votes `DATA` with rows in `order`, under these labels."""
    data = DATA[np.ix_(order, order)].tolist()
    return VoteMatrix(index=labels, columns=labels, data=data, sort_index=sort_index)


def results(rows: list[tuple[str, str | None, str | None]]) -> SeenResults:
    """Rows of id, identifier and text; the scores are 0, 1, 2, ... in their order."""
    points = [
        {"id": one, "elo": n, "asset": {"_t": "TextAsset", "text": text, "identifier": name}}
        for n, (one, name, text) in enumerate(rows)
    ]
    return SeenResults.model_validate({"datapoints": points, "totalVotes": 8})


orders = st.permutations(range(3))


@given(orders, st.lists(st.sampled_from(["same", "other"]), min_size=3, max_size=3))
def test_our_identifiers_tell_any_texts_apart(order: list[int], texts: list[str]) -> None:
    labels = [identifier("dts_1", place) for place in order]
    assert in_order_of(texts, matrix(labels, order), "fli").wins.tolist() == DATA.tolist()


@given(orders)
def test_sort_indices_tell_equal_texts_apart_whose_labels_were_made_unique(order: list[int]) -> None:
    texts, labels = ["same", "same", "same"], ["same", "same (2)", "same (3)"]
    assert in_order_of(texts, matrix(labels, order, order), "fli").wins.tolist() == DATA.tolist()


@given(orders, st.sampled_from(["id", "identifier"]))
def test_ids_of_the_service_are_looked_up_in_its_results(order: list[int], what: str) -> None:
    labels = [f"dpt_{place}" for place in order]
    seen = [
        (f"dpt_{i}" if what == "id" else f"row_{i}", None if what == "id" else f"dpt_{i}", TEXTS[i]) for i in range(3)
    ]
    with pytest.raises(Nameless):
        in_order_of(TEXTS, matrix(labels, order), "fli")
    found = in_order_of(TEXTS, matrix(labels, order), "fli", results(seen))
    assert found.wins.tolist() == DATA.tolist()


@given(orders)
def test_scores_come_in_the_callers_order(order: list[int]) -> None:
    found = elo_in_order_of(TEXTS, results([(f"dpt_{i}", None, TEXTS[i]) for i in order]), "fli")
    assert [found.elo[i] for i in order] == [0, 1, 2]
    assert found.votes == 8


@pytest.mark.parametrize(
    ("texts", "labels", "sort_index"),
    [
        (["rlhf:x:1", "rlhf:x:0", "rlhf:x:2"], ["rlhf:x:1", "rlhf:x:0", "rlhf:x:2"], None),  # texts that pose as labels
        (TEXTS, ["a", "b", "c"], [1, 0, 2]),
        (TEXTS, ["rlhf:d:0", "rlhf:d:1", "rlhf:d:2"], [1, 0, 2]),
        (TEXTS, ["rlhf:d:0", "rlhf:d:1", "rlhf:d:7"], None),
        (TEXTS, ["rlhf:d:0", "rlhf:other:1", "rlhf:d:2"], None),
        (TEXTS, ["x", "y", "z"], [0, 1, 2]),
        (["same", "same", "c"], ["same", "dpt_1", "c"], None),
    ],
)
def test_labels_that_contradict_each_other_or_say_nothing_are_never_used(
    texts: list[str], labels: list[str], sort_index: list[int] | None
) -> None:
    with pytest.raises(BadAnswer, match="Nothing was learned"):
        in_order_of(texts, matrix(labels, [0, 1, 2], sort_index), "fli")


@pytest.mark.parametrize(
    "rows",
    [
        [("d0", None, "same"), ("d1", None, "same"), ("d2", None, "c")],  # cannot be told apart
        [("d0", None, "a"), ("d0", None, "b"), ("d2", None, "c")],
        [("d0", None, "a"), ("d1", None, "b")],
        [("d0", None, "a"), ("d1", None, "b"), ("d9", None, "c")],  # about another label
        [("d0", None, "a"), ("d1", None, "b"), ("d2", None, "x")],
    ],
)
def test_results_that_do_not_name_every_candidate_once_are_no_help(rows: list[tuple[str, str | None, str]]) -> None:
    texts = ["same", "same", "c"] if rows[0][2] == "same" else TEXTS
    with pytest.raises(BadAnswer, match="Nothing was learned"):
        in_order_of(texts, matrix(["d0", "d1", "d2"], [0, 1, 2]), "fli", results(rows))
