"""What raters marked inside completions, as weights of tokens: marked tokens count more in a completion's score.

Source: the dense DPO of Yu et al. (2023), "RLHF-V", where the tokens that a correction changed weigh more, and the
weights are normalised so that no completion gains by their number alone. What differs here is told in docs/segments.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.types import Completion, Segment

Decode = Callable[[Sequence[int]], str]
"""Tokens as text, special ones left out, blanks at the ends kept."""


def segment_weights(
    completion: Completion, segments: Sequence[Segment], decode: Decode, weight: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of the tokens of a completion where it wins, and where it loses; their mean is 1.

    What is marked as good weighs `weight` times as much as the rest where the completion wins, what is marked as bad
    where it loses. A character counts as marked so when it was in more votes than the other way.

    Args:
        segments: Marks in this completion, of all votes.
    """
    tokens = len(completion.token_ids)
    if not segments:
        return np.ones(tokens), np.ones(tokens)
    balance = np.zeros(len(completion.text))
    for segment in segments:
        balance[segment.start : segment.end] += 1 if segment.good else -1
    spans = token_spans(completion.token_ids, decode)
    return _normalised(spans, balance > 0, weight), _normalised(spans, balance < 0, weight)


def token_spans(token_ids: Sequence[int], decode: Decode) -> list[tuple[int, int]]:
    """The characters (start included, end excluded) of a completion's text that each token stands for.

    A character that takes several tokens belongs to all of them; a token without text, such as the end, has none.
    """
    whole = decode(token_ids)
    ends = [0]
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[:count])
        # The text so far may end in a replacement character, where a character is not complete yet.
        while not whole.startswith(text):
            text = text[:-1]
        ends.append(max(ends[-1], len(text)))
    spans: list[tuple[int, int]] = []
    following = ends[-1]
    for start, end in reversed(list(pairwise(ends))):
        following = end if end > start else following
        spans.append((start, following))
    before, size = len(whole) - len(whole.lstrip()), len(whole.strip())
    return [(min(max(s - before, 0), size), min(max(e - before, 0), size)) for s, e in reversed(spans)]


def _normalised(spans: Sequence[tuple[int, int]], marked: NDArray[np.bool_], weight: float) -> NDArray[np.float64]:
    weights = np.array([weight if marked[start:end].any() else 1.0 for start, end in spans])
    return weights / weights.mean()
