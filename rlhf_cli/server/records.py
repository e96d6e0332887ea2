"""What the store hands out, and how it reads from a row."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.flow.wire import Outcome


@dataclass(frozen=True, slots=True)
class FlowRecord:
    id: str
    name: str
    instruction: str
    responses: Responses
    created_at: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion of an item; its position is its place among the item's candidates by `sort_index`."""

    id: str
    sort_index: int
    text: str


@dataclass(frozen=True, slots=True)
class ItemRecord:
    id: str
    flow_id: str
    dataset_id: str
    context: str
    size: int
    responses: Responses
    state: ItemState
    votes: int
    """Counted votes: neither late nor skipped."""
    created_at: float
    expires_at: float
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class LeasedPair:
    """One pair, handed to one rater; `left` and `right` are texts."""

    id: str
    prompt: str
    instruction: str
    left: str
    right: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class Vote:
    """A raw vote; `left` and `right` are positions in the item, as they were shown."""

    lease_id: str
    item_id: str
    rater_id: str
    left: int
    right: int
    outcome: Outcome
    response_ms: int | None
    late: bool
    created_at: float


def flow_of(row: sqlite3.Row) -> FlowRecord:
    responses = Responses(row["min"], row["desired"], row["max"])
    return FlowRecord(row["id"], row["name"], row["instruction"], responses, row["created_at"])


def item_of(row: sqlite3.Row) -> ItemRecord:
    return ItemRecord(
        id=row["id"],
        flow_id=row["flow_id"],
        dataset_id=row["dataset_id"],
        context=row["context"],
        size=row["size"],
        responses=Responses(row["min"], row["desired"], row["max"]),
        state=ItemState(row["state"]),
        votes=row["votes"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def vote_of(row: sqlite3.Row) -> Vote:
    return Vote(
        lease_id=row["lease_id"],
        item_id=row["item_id"],
        rater_id=row["rater_id"],
        left=row["left"],
        right=row["right"],
        outcome=row["outcome"],
        response_ms=row["response_ms"],
        late=bool(row["late"]),
        created_at=row["created_at"],
    )
