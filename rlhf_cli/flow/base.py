"""Asking people, in nouns: what a flow is, what became of an item, and the requests that any service must answer.

A *flow* holds the instruction and the thresholds, an *item* is one group of completions that people compare, and a
*dataset* is the list of completions behind one item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

from rlhf_cli.errors import FlowRefused
from rlhf_cli.types import WinMatrix


@dataclass(frozen=True, slots=True)
class Responses:
    """How many votes an item gets: below `min` it is incomplete, at `desired` it is enough, beyond `max` none count.

    Raises:
        ValueError: Not 1 <= min <= desired <= max.
    """

    min: int
    desired: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.desired <= self.max:
            raise ValueError(f"responses must satisfy 1 <= min <= desired <= max, not {self}")


@dataclass(frozen=True, slots=True)
class FlowSpec:
    """What people are asked, and how often; `ttl_s` is an item's time to live in seconds."""

    name: str
    instruction: str
    responses: Responses
    ttl_s: float

    def fingerprint(self) -> str:
        """SHA-256 of the content as hex: two flows with the same fingerprint ask the same question."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        """The flow's name at the service; carries the fingerprint, so that the flow can be found again."""
        return f"{self.name} [{self.fingerprint()[:12]}]"


class ItemState(StrEnum):
    """Values are those of the wire."""

    PENDING = "Pending"
    RUNNING = "Running"
    STOPPING = "Stopping"
    COMPLETED = "Completed"
    INCOMPLETE = "Incomplete"
    STOPPED = "Stopped"
    FAILED = "Failed"

    @property
    def terminal(self) -> bool:
        return self not in (ItemState.PENDING, ItemState.RUNNING, ItemState.STOPPING)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a service offers beyond the ranking-flow protocol; the vendor's service offers none of it."""

    idempotency: bool = False
    """A creation repeated with the same key answers with what the first one made."""
    desired: bool = False
    """Knows a desired number of votes between minimum and maximum."""
    live_votes: bool = False
    """Shows votes while they accumulate."""


@dataclass(frozen=True, slots=True)
class ItemStatus:
    item_id: str
    dataset_id: str
    state: ItemState
    votes: int | None = None
    """Votes counted so far; None where the service does not say."""
    failure: str | None = None


class BadAnswer(FlowRefused):
    """The service answered with something that is not the protocol, or not about the candidates that were sent."""


class Flow(Protocol):
    """One service, one method per request. Safe to call concurrently within one event loop.

    Every method raises:
        FlowUnavailable: Not reachable or overloaded, past the retry deadline. A creation may or may not have happened.
        FlowRefused: The service refused; repeating will not help. BadAnswer: its answer cannot be trusted.
        CredentialsError: Missing, wrong or no longer valid.
    """

    async def capabilities(self) -> Capabilities:
        """What the service offers; asked once."""

    async def open_flow(self, spec: FlowSpec) -> str:
        """Create a flow and return its id."""

    async def find_flow(self, spec: FlowSpec) -> str | None:
        """The id of the newest flow with the fingerprint of `spec`, if there is one."""

    async def create_dataset(self, name: str, key: str) -> str:
        """Create an empty dataset and return its id; `key` is used where the service offers idempotency."""

    async def add_datapoint(self, dataset_id: str, sort_index: int, text: str) -> None:
        """Put candidate number `sort_index` into a dataset."""

    async def create_item(self, flow_id: str, dataset_id: str, context: str, ttl_s: float, key: str) -> str:
        """Ask people about a dataset, shown under `context`; this is what costs money. Returns the item's id."""

    async def find_item(self, flow_id: str, dataset_id: str) -> ItemStatus | None:
        """The oldest item made from a dataset, if there is one."""

    async def statuses(self, flow_id: str, item_ids: Collection[str]) -> dict[str, ItemStatus]:
        """How these items stand; one that the service does not know is left out."""

    async def vote_matrix(self, item_id: str, texts: Sequence[str], *, partial: bool = False) -> WinMatrix | None:
        """The votes on an item in the order of `texts`, its distinct candidates.

        None while the service does not show them; `partial` asks for votes of an item that is still running.
        """

    async def stop(self, item_id: str) -> None:
        """End an item now; votes so far can be read."""

    async def close(self) -> None:
        """Drop the connections. Nothing at the service changes."""
