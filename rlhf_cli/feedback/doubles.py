"""Items that the journal does not know: a service made them and the answer never reached us, or its list lagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.feedback.items import Shown
from rlhf_cli.flow.base import ItemStatus


@dataclass(frozen=True, slots=True)
class Sold:
    """A dataset of ours, what it shows, and the items that are known to be made of it."""

    shown: Shown
    item_ids: set[str]


@dataclass(frozen=True, slots=True)
class Found:
    """Items of one dataset, of which some were not known."""

    dataset_id: str
    item_ids: tuple[str, ...]
    """All of them, oldest first."""
    strangers: tuple[ItemStatus, ...]
    """Those that were not known."""
    to_stop: tuple[str, ...]
    """All but the oldest, unless they ended already."""


def unknown_items(listed: Sequence[ItemStatus], sold: Mapping[str, Sold]) -> list[Found]:
    """Items made of datasets of ours that nobody has recorded.

    Args:
        listed: Items of the flow, newest first. Other runs may share it: what is made of their datasets is theirs.
        sold: Our datasets by id.
    """
    of_dataset: dict[str, list[ItemStatus]] = {}
    for status in reversed(listed):
        if status.dataset_id in sold:
            of_dataset.setdefault(status.dataset_id, []).append(status)
    found = []
    for dataset_id, items in of_dataset.items():
        known = sold[dataset_id].item_ids
        strangers = tuple(status for status in items if status.item_id not in known)
        if not strangers:
            continue
        listed_ids = [status.item_id for status in items]
        # A known one that is not listed has dropped off the end of the list: it is older.
        item_ids = (*sorted(known.difference(listed_ids)), *listed_ids)
        over = {status.item_id for status in items if status.state.terminal}
        to_stop = tuple(item_id for item_id in item_ids[1:] if item_id not in over)
        found.append(Found(dataset_id, item_ids, strangers, to_stop))
    return found
