"""Marks of raters as weights of tokens: which tokens, how much, and what becomes of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.learner.segments import segment_weights, token_spans
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.types import Completion, Segment

BYTES = "Gute Fl\u00fcsse \U0001f30a!"


def letters(ids: Sequence[int]) -> str:
    """One token a letter; 0 is the end and no text."""
    return "".join(chr(i) for i in ids if i)


def utf8(ids: Sequence[int]) -> str:
    """One token a byte, as in byte-level vocabularies."""
    return bytes(ids).decode("utf-8", "replace")


def completion(text: str, *, end: bool = True) -> Completion:
    ids = (*map(ord, text), *((0,) if end else ()))
    zeros = tuple(0.0 for _ in ids)
    return Completion(text.strip(), ids, zeros, zeros, end)


def test_every_token_stands_for_its_characters_and_the_end_for_none() -> None:
    assert token_spans((*map(ord, "abc"), 0), letters) == [(0, 1), (1, 2), (2, 3), (3, 3)]


def test_blanks_that_the_text_lost_at_its_ends_are_no_characters_of_it() -> None:
    spans = token_spans(tuple(map(ord, "  ab \n")), letters)
    assert spans == [(0, 0), (0, 0), (0, 1), (1, 2), (2, 2), (2, 2)]


def test_a_character_of_several_tokens_belongs_to_all_of_them() -> None:
    spans = token_spans(tuple(BYTES.encode()), utf8)
    place, wave = BYTES.index("\u00fc"), BYTES.index("\U0001f30a")
    assert spans.count((place, place + 1)) == 2
    assert spans.count((wave, wave + 1)) == 4
    assert len(spans) == len(BYTES.encode())


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30))
def test_spans_are_in_order_and_leave_no_character_out(text: str) -> None:
    text = text.replace("\x00", "")
    spans = token_spans(tuple(text.encode()), utf8)
    assert all(start <= end for start, end in spans)
    assert spans == sorted(spans)
    assert set().union(*(range(start, end) for start, end in spans)) == set(range(len(text.strip())))


@pytest.mark.parametrize(
    "text", ["Water flows to the sea.", " r\u00e9sum\u00e9 \u2014 caf\u00e9s, \u65e5\u672c \U0001f600 end"]
)
def test_tokens_of_a_real_vocabulary_are_found_where_their_text_is(tiny: str, text: str) -> None:
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    spans = token_spans(ids, lambda i: str(tokenizer.decode(i, skip_special_tokens=True)))
    shown = whole.strip()
    for token, (start, end) in zip(ids, spans, strict=True):
        alone = tokenizer.decode([token], skip_special_tokens=True).strip()
        assert "\ufffd" in alone or alone in shown[start:end]


def test_marked_tokens_weigh_more_by_hand() -> None:
    won, lost = segment_weights(completion("abcd", end=False), [Segment(0, 1, 3, True)], letters, 5.0)
    # weights 1, 5, 5, 1 have the mean 3
    assert won.tolist() == pytest.approx([1 / 3, 5 / 3, 5 / 3, 1 / 3])
    assert lost.tolist() == [1, 1, 1, 1]


def test_what_is_bad_counts_where_the_completion_loses() -> None:
    won, lost = segment_weights(completion("ab", end=False), [Segment(0, 0, 1, False)], letters, 3.0)
    assert won.tolist() == [1, 1]
    assert lost.tolist() == pytest.approx([1.5, 0.5])


def test_more_raters_decide_and_as_many_on_both_sides_cancel() -> None:
    marks = [Segment(0, 0, 2, True), Segment(0, 0, 2, True), Segment(0, 1, 3, False), Segment(0, 1, 2, False)]
    won, lost = segment_weights(completion("abcd", end=False), marks, letters, 2.0)
    assert (won > won.min()).tolist() == [True, False, False, False]
    assert (lost > lost.min()).tolist() == [False, False, True, False]


def test_without_marks_every_token_weighs_one() -> None:
    won, lost = segment_weights(completion("abc"), [], letters, 5.0)
    assert won.tolist() == lost.tolist() == [1, 1, 1, 1]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10), st.booleans()), max_size=6),
    st.floats(1.1, 50),
)
def test_weights_have_the_mean_one_and_the_ratio_of_the_recipe(
    marks: list[tuple[int, int, bool]], weight: float
) -> None:
    segments = [Segment(0, start, start + length, good) for start, length, good in marks]
    both = segment_weights(completion("abcdefghij"), segments, letters, weight)
    doubled = segment_weights(completion("abcdefghij"), segments * 2, letters, weight)
    for weights, again in zip(both, doubled, strict=True):
        assert weights.mean() == pytest.approx(1)
        assert weights.max() / weights.min() == pytest.approx(weight if len(set(weights.tolist())) > 1 else 1)
        assert np.array_equal(weights, again)
