"""What the journal knows about the items of a group, for a process that goes on where another one ended."""

from __future__ import annotations

from rlhf_cli.feedback.doubles import Sold
from rlhf_cli.feedback.items import Item, Shown
from rlhf_cli.feedback.late import Seen
from rlhf_cli.flow.base import ItemState
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.types import Segment, WinMatrix

DECIDED, DOUBLED = "the ranking is decided", "one of two items on one dataset"
"""Why we stop items."""


def item_ids(known: GroupState) -> list[str]:
    """All items of the group, each once: one per ask, and those that a service made besides."""
    asked = [ask.item_id for ask in known.asks if ask.item_id is not None]
    return list(dict.fromkeys([*asked, *(item_id for double in known.doubles for item_id in double.item_ids)]))


def item_of(known: GroupState, shown: Shown, item_id: str, now: float) -> Item:
    """One of its items as it was last recorded; `now` is clock time, seconds."""
    item = Item(item_id, since=now, seen_at=now, decided_early=ended_early(known, item_id))
    for ended in known.ended:
        if ended.item_id == item_id:
            item.state, item.votes, item.recorded = ItemState(ended.state), ended.votes, True
            item.segments = tuple(Segment(*segment) for segment in ended.segments)
            item.ended = shown.read(ended.wins) if ended.wins is not None else None
            item.lost = None if item.ended is not None else f"item {item_id} ended {ended.state} without its votes"
    return item


def ended_early(known: GroupState, item_id: str | None) -> bool:
    """Whether we stopped the item because its votes had decided the ranking."""
    return any(stop.item_id == item_id and stop.reason == DECIDED for stop in known.stopped)


def sold_by(known: GroupState, shown: Shown) -> dict[str, Sold]:
    """The group's datasets by id; not one whose item is still to be made or found."""
    sold = {}
    for ask in known.asks:
        if ask.dataset_id is not None and (ask.item_id is not None or not known.open):
            sold[ask.dataset_id] = Sold(shown, {ask.item_id} if ask.item_id is not None else set())
    for double in known.doubles:
        sold[double.dataset_id].item_ids.update(double.item_ids)
    return sold


def seen_of(known: GroupState, shown: Shown, item_id: str, due: float) -> Seen:
    """What was seen of an item of a decided group, late votes included."""
    wins, unseen = shown.none(), 0.0
    if known.ranked is not None and known.ranked.source == f"item:{item_id}":
        wins = shown.read(known.ranked.wins)
    for ended in known.ended:
        if ended.item_id == item_id:
            wins = shown.read(ended.wins) if ended.wins is not None else wins
            unseen = ended.votes if ended.wins is None else 0.0
    for late in known.late:
        if late.item_id == item_id:
            wins, unseen = WinMatrix(wins.wins + shown.read(late.wins).wins), 0.0
    return Seen(shown, item_id, wins, due, unseen)
