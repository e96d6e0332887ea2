"""Which candidate a label stands for.

Services answer with labels, not with places, and what the vendor's labels are is not documented: an identifier that was
sent, the text, or an id of its own. Every way to read them that applies is tried, and all that apply have to agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from rlhf_cli.flow import wire
from rlhf_cli.flow.base import Asset, BadAnswer, ImageFile, ImageUrl, ItemResults
from rlhf_cli.types import Segment, WinMatrix

_IDENTIFIER = re.compile(r"rlhf:(.{1,200}):([0-9]{1,5})")


class Nameless(BadAnswer):
    """The labels say nothing by themselves; the results may say what they stand for."""


def identifier(dataset_id: str, place: int) -> str:
    """What the client calls candidate number `place`; no other candidate anywhere is called so."""
    return f"rlhf:{dataset_id}:{place}"


def name_of(place: int, asset: Asset) -> str:
    """What a service that goes by content calls a candidate: its text, its name when uploaded, or its address."""
    match asset:
        case ImageFile(path):
            return f"candidate-{place}{path.suffix.lower()}"
        case ImageUrl(url):
            return url
    return asset


def in_order_of(
    names: Sequence[str], matrix: wire.VoteMatrix, item_id: str, results: wire.SeenResults | None = None
) -> WinMatrix:
    """The votes of `matrix` in the order in which `names` were sent.

    Rows and columns are matched by label, each by itself.

    Raises:
        BadAnswer: A candidate is missing, unknown or there twice, two ways to read the labels contradict each other, or
            a count is not one. `Nameless` when the labels alone do not say which candidates they stand for.
    """
    size, labels = len(names), matrix.index
    if len(labels) != size or len(matrix.data) != size or any(len(row) != size for row in matrix.data):
        raise _bad(
            item_id, f"{size} candidates were sent, the matrix has {len(labels)} labels and {len(matrix.data)} rows"
        )
    for side in (labels, matrix.columns):
        if len(set(side)) != size or len(side) != size:
            raise _bad(item_id, "a label stands for two candidates or is missing")
    if set(labels) != set(matrix.columns):
        raise _bad(item_id, "its rows and columns are about different candidates")
    rows = _places(names, labels, labels, matrix.sort_index, item_id)
    if rows is None:
        if results is None:
            raise Nameless(_unknown(names, labels, item_id))
        rows = _through(names, labels, results, item_id)
    place = dict(zip(labels, rows, strict=True))
    wins = np.zeros((size, size))
    wins[np.ix_(rows, [place[label] for label in matrix.columns])] = matrix.data
    try:
        return WinMatrix(wins)
    except ValueError as error:
        raise _bad(item_id, str(error)) from error


def segments_in_order_of(names: Sequence[str], answer: wire.ItemSegments, item_id: str) -> tuple[Segment, ...]:
    """What raters marked, by the order in which the texts `names` were sent; in their order, then by place.

    Raises:
        BadAnswer: As for `in_order_of`, or a mark is not in its text.
    """
    if len(answer.index) != len(names):
        raise _bad(item_id, f"{len(names)} candidates were sent, marks are about {len(answer.index)}")
    places = _places(names, answer.index, answer.index, answer.sort_index, item_id)
    if places is None:
        raise BadAnswer(_unknown(names, answer.index, item_id))
    found = []
    for mark in answer.segments:
        if mark.candidate >= len(places) or not mark.start < mark.end <= len(names[places[mark.candidate]]):
            raise _bad(item_id, f"characters {mark.start} to {mark.end} were marked where there are none")
        found.append(Segment(places[mark.candidate], mark.start, mark.end, mark.good))
    return tuple(sorted(found, key=astuple))


def elo_in_order_of(names: Sequence[str], results: wire.SeenResults, item_id: str) -> ItemResults:
    """The scores of `results` in the order in which `names` were sent.

    Raises:
        BadAnswer: As for `in_order_of`.
    """
    elo = [0.0] * len(names)
    for place, row in zip(_result_places(names, results, item_id), results.datapoints, strict=True):
        elo[place] = row.elo
    return ItemResults(tuple(elo), results.total_votes)


def _through(names: Sequence[str], labels: list[str], results: wire.SeenResults, item_id: str) -> list[int]:
    """The places of labels that are ids or identifiers of the service's own, by what its results say of these."""
    places = _result_places(names, results, item_id)
    for known in ([row.id for row in results.datapoints], [row.asset.identifier for row in results.datapoints]):
        if len(set(known)) == len(names) and set(known) == set(labels):
            place = dict(zip(known, places, strict=True))
            return [place[label] for label in labels]
    raise BadAnswer(_unknown(names, labels, item_id))


def _result_places(names: Sequence[str], results: wire.SeenResults, item_id: str) -> list[int]:
    rows = results.datapoints
    if len(rows) != len(names) or len({row.id for row in rows}) != len(rows):
        raise _bad(item_id, f"{len(names)} candidates were sent, the results have {len(rows)}")
    sort_index = [row.sort_index for row in rows if row.sort_index is not None]
    identifiers, shown = [row.asset.identifier or "" for row in rows], [row.asset.name or "" for row in rows]
    places = _places(names, identifiers, shown, sort_index or None, item_id)
    if places is None:
        raise BadAnswer(_unknown(names, shown, item_id))
    return places


def _places(
    names: Sequence[str], identifiers: list[str], shown: list[str], sort_index: list[int] | None, item_id: str
) -> list[int] | None:
    """The place of each, by every way that applies; None when none does."""
    ways = []
    own = [_IDENTIFIER.fullmatch(text) for text in identifiers]
    if len({match[1] if match else None for match in own}) == 1 and own[0] is not None:
        ways.append([int(match[2]) for match in own if match])
    if len(set(names)) == len(names) and set(shown) == set(names):
        ways.append([names.index(text) for text in shown])
    if sort_index is not None:
        ways.append(sort_index)
    if any(sorted(way) != list(range(len(names))) or way != ways[0] for way in ways):
        raise _bad(item_id, "its labels and its sort indices contradict each other")
    # A service that makes labels of equal texts unique adds to them; any other change means something else is meant.
    if ways == [sort_index] and not all(text.startswith(names[i]) for text, i in zip(shown, ways[0], strict=True)):
        return None
    return ways[0] if ways else None


def _unknown(names: Sequence[str], labels: list[str], item_id: str) -> str:
    unknown = next((label for label in labels if label not in names), None)
    if unknown is None:
        return str(_bad(item_id, "candidates with the same content cannot be told apart by what it says"))
    return str(_bad(item_id, f"it names a candidate that was never sent: {unknown[:80]!r}"))


def _bad(item_id: str, why: str) -> BadAnswer:
    return BadAnswer(f"The votes on item {item_id} cannot be used: {why}. Nothing was learned from them.")
