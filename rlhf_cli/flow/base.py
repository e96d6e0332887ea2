"""Asking people, in nouns: what a flow is, what became of an item, and the requests that any service must answer.

A *flow* holds the instruction and the thresholds, an *item* is one group of completions that people compare, and a
*dataset* is the list of completions behind one item.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from rlhf_cli.errors import FlowRefused, FlowUnavailable
from rlhf_cli.types import Segment, WinMatrix


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
    segments: bool = False
    """Whether raters may mark spans of what they compare."""

    def fingerprint(self) -> str:
        """SHA-256 of the content as hex: two flows with the same fingerprint ask the same question."""
        content = asdict(self)
        if not self.segments:  # as it was before there were any
            del content["segments"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

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
class ImageFile:
    """A candidate that is a local image; it is uploaded under a name that tells nothing of where it was."""

    path: Path


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """A candidate that is an image somewhere else, which the service fetches itself; `url` is http or https."""

    url: str


Asset = str | ImageFile | ImageUrl
"""A candidate: a text, or an image."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a service offers; what nothing is known of is taken to be the bare ranking-flow protocol."""

    idempotency: bool = False
    """A creation repeated with the same key answers with what the first one made."""
    desired: bool = False
    """Knows a desired number of votes between minimum and maximum, and ends an item there."""
    live_votes: bool = False
    """Shows votes while they accumulate."""
    raw_votes: bool = False
    """Shows every single vote, with a pseudonym of who cast it."""
    preheat: bool = False
    """Can be told that work is coming, so that people are there when it does."""
    list_filter: bool = False
    """Lists items by state and time of creation."""
    segments: bool = False
    """Lets raters mark spans of what they compare, and shows what they marked."""
    ttl_min_s: float = 0.0
    """Shortest time to live of an item, seconds."""
    ttl_max_s: float = math.inf
    max_candidates: int | None = None
    """Most candidates of an item; None where the service states no limit."""


RAPIDATA = Capabilities(preheat=True, list_filter=True, ttl_min_s=60.0, ttl_max_s=3600.0)
"""The vendor's service. The shortest time to live is that of its default settings: 20 s more than the 40 s before an
item's end in which nobody new is asked."""


@dataclass(frozen=True, slots=True)
class ItemStatus:
    item_id: str
    dataset_id: str
    state: ItemState
    votes: int | None = None
    """Votes counted so far; None where the service does not say."""
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class ItemResults:
    """What the service itself makes of the votes: a cross-check, never trained on."""

    elo: tuple[float, ...]
    """One per candidate, in the caller's order."""
    votes: float


class BadAnswer(FlowRefused):
    """The service answered with something that is not the protocol, or not about the candidates that were sent."""


class EffectUnknown(FlowUnavailable):
    """A creation failed in a way that leaves open whether it happened. The service itself may well be there."""


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

    async def asks(self, flow_id: str, spec: FlowSpec) -> bool:
        """Whether that flow is still there and asks what `spec` says."""

    async def update_flow(self, flow_id: str, spec: FlowSpec) -> None:
        """Ask the question of `spec` as often as it says in items created from now on; the flow's name stays."""

    async def preheat(self) -> None:
        """Tell the service that work is coming in a few minutes; nothing where it does not listen."""

    async def create_dataset(self, name: str, key: str) -> str:
        """Create an empty dataset and return its id; `key` is used where the service offers idempotency."""

    async def add_datapoint(self, dataset_id: str, sort_index: int, asset: Asset) -> str:
        """Put candidate number `sort_index` into a dataset, an image uploaded first. Returns the datapoint's id."""

    async def fill_dataset(self, dataset_id: str, assets: Sequence[Asset]) -> None:
        """Put all candidates into an empty dataset and make sure that as many arrived as were sent.

        All requests have ended when this returns or raises; after an error the dataset may be half filled.
        """

    async def create_item(self, flow_id: str, dataset_id: str, context: str, ttl_s: float, key: str) -> str:
        """Ask people about a dataset, shown under `context`; this is what costs money. Returns the item's id."""

    async def find_item(self, flow_id: str, dataset_id: str) -> ItemStatus | None:
        """The oldest item made from a dataset, if there is one."""

    async def newest_items(self, flow_id: str) -> list[ItemStatus]:
        """The newest few hundred items of a flow, newest first."""

    async def statuses(self, flow_id: str, item_ids: Collection[str]) -> dict[str, ItemStatus]:
        """How these items stand; one that the service does not know is left out."""

    async def vote_matrix(self, item_id: str, assets: Sequence[Asset], *, partial: bool = False) -> WinMatrix | None:
        """The votes on an item in the order of `assets`, its candidates.

        None while the service does not show them; `partial` asks for votes of an item that is still running.
        """

    async def segments(self, item_id: str, assets: Sequence[str]) -> tuple[Segment, ...] | None:
        """What raters marked in the texts of an item, one entry for every mark; `completion` counts in `assets`.

        None while the service does not show it. Only where the capabilities have `segments`.
        """

    async def results(self, item_id: str, assets: Sequence[Asset]) -> ItemResults | None:
        """What the service makes of the votes on an item; None while it does not say."""

    async def stop(self, item_id: str) -> None:
        """End an item now; votes so far can be read."""

    def health(self) -> dict[str, float]:
        """Figures on the connection; from any thread, without waiting.

        `flow/circuit_open` (0 or 1), `flow/unreachable_s`, `flow/requests_total`, `flow/retries_total`.
        """

    async def close(self) -> None:
        """Drop the connections. Nothing at the service changes."""
