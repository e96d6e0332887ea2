"""What the store hands out, and how it reads from a row."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.flow.wire import Outcome
from rlhf_cli.ranking.pairs import Goal
from rlhf_cli.types import Segment


@dataclass(frozen=True, slots=True)
class FlowRecord:
    id: str
    name: str
    instruction: str
    responses: Responses
    goal: Goal
    settings: dict[str, Any]
    """Members of the protocol that are kept for whoever set them: feature flags, serving rates and the like."""
    created_at: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion of an item; its position is its place among the item's candidates by `sort_index`."""

    id: str
    sort_index: int
    text: str
    """The text, or the original file name of an image."""
    media: str | None = None
    """SHA-256 of the image, as hex."""

    @property
    def shown(self) -> str:
        """What a rater is given: the text, or where the image is."""
        return self.text if self.media is None else f"/media/{self.media}"


@dataclass(frozen=True, slots=True)
class ItemRecord:
    id: str
    flow_id: str
    dataset_id: str
    context: str
    context_media: tuple[str, ...]
    """SHA-256 of the images that are shown above the pair, as hex."""
    instruction: str
    size: int
    responses: Responses
    goal: Goal
    state: ItemState
    votes: int
    """Counted votes: neither late, skipped nor undone."""
    live: int
    """Pairs in people's hands."""
    decided: bool
    """The stopping rule of goal `best` was met: nobody new is asked."""
    created_at: float
    expires_at: float
    lease_s: float | None
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class LeasedPair:
    """One pair, handed to one rater; `left` and `right` are texts, or places of images on this server."""

    id: str
    prompt: str
    instruction: str
    left: str
    right: str
    images: bool
    context_images: tuple[str, ...]
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
    undone: bool
    created_at: float
    segments: tuple[Segment, ...] = ()
    """What was marked; `completion` is a position in the item."""

    @property
    def counts(self) -> bool:
        return not self.late and not self.undone and self.outcome != "skip"


def flow_of(row: sqlite3.Row) -> FlowRecord:
    responses = Responses(row["min"], row["desired"], row["max"])
    settings = json.loads(row["settings"])
    return FlowRecord(row["id"], row["name"], row["instruction"], responses, row["goal"], settings, row["created_at"])


def item_of(row: sqlite3.Row) -> ItemRecord:
    return ItemRecord(
        id=row["id"],
        flow_id=row["flow_id"],
        dataset_id=row["dataset_id"],
        context=row["context"],
        context_media=tuple(json.loads(row["context_media"])),
        instruction=row["instruction"],
        size=row["size"],
        responses=Responses(row["min"], row["desired"], row["max"]),
        goal=row["goal"],
        state=ItemState(row["state"]),
        votes=row["votes"],
        live=row["live"],
        decided=bool(row["decided"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        lease_s=row["lease_s"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def candidate_of(row: sqlite3.Row) -> Candidate:
    return Candidate(row["id"], row["sort_index"], row["original_name"] or row["text"], row["hash"])


def vote_of(row: sqlite3.Row, segments: Iterable[sqlite3.Row] = ()) -> Vote:
    return Vote(
        lease_id=row["lease_id"],
        item_id=row["item_id"],
        rater_id=row["rater_id"],
        left=row["left"],
        right=row["right"],
        outcome=row["outcome"],
        response_ms=row["response_ms"],
        late=bool(row["late"]),
        undone=bool(row["undone"]),
        created_at=row["created_at"],
        segments=tuple(Segment(row[s["side"]], s["start"], s["stop"], bool(s["good"])) for s in segments),
    )
