"""Bodies of the ranking-flow protocol, shared by client and server. Unknown members of what is received are ignored."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from pydantic.alias_generators import to_camel

from rlhf_cli.flow.base import Capabilities, ItemState, ItemStatus

MAX_TEXT_BYTES = 32 * 1024
MIN_CANDIDATES, MAX_CANDIDATES = 2, 16
MAX_TTL_S = 7 * 86400


class Body(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, mode="json")


class Token(BaseModel):
    """The answer of the identity service; its members are in snake case."""

    access_token: str = Field(min_length=1)
    token_type: str = "Bearer"
    expires_in: float | None = None


class CreateFlow(Body):
    name: str = Field(min_length=1, max_length=1000)
    criteria: str = Field(min_length=1, max_length=4000)
    min_responses: int = Field(20, ge=1)
    max_responses: int = Field(100, ge=1, le=100_000)
    serve_responses: int | None = Field(None, ge=1)
    """Votes at which serving stops, our *desired*; null means the maximum."""


class FlowCreated(Body):
    flow_id: str = Field(min_length=1)


class FlowDocument(Body):
    """A flow as the server shows it. Without `_t`, `id`, `name` or `featureFlags` the official SDK breaks."""

    t: str = Field("RankingFlow", alias="_t")
    id: str
    name: str
    criteria: str
    min_responses: int
    max_responses: int
    serve_responses: int | None = None
    feature_flags: list[Any] | None = []
    flow_item_count: int | None = 0
    starting_elo: int | None = 1200
    created_at: str | None = None


class FlowRow(Body):
    id: str
    name: str
    type: str | None = "Ranking"
    owner_id: str | None = "00000000-0000-4000-8000-000000000000"
    owner_mail: str | None = ""
    organization_id: str | None = ""
    created_at: str | None = None


class CreateDataset(Body):
    name: str = Field(min_length=1, max_length=1000)


class DatasetCreated(Body):
    dataset_id: str = Field(min_length=1)


class TextAsset(Body):
    t: Literal["TextAssetInput"] = Field("TextAssetInput", alias="_t")
    text: str = Field(min_length=1)


class Segment(Body):
    key: Literal["asset"] = "asset"
    kind: Literal["Asset"] = "Asset"
    asset: TextAsset


class CreateDatapoint(Body):
    segments: list[Segment] = Field(min_length=1, max_length=1)
    sort_index: int | None = Field(None, ge=0, le=1_000_000)
    group: str | None = None
    private_metadata: dict[str, str] | None = None

    @property
    def text(self) -> str:
        return self.segments[0].asset.text


class DatapointCreated(Body):
    datapoint_id: str = Field(min_length=1)


class CreateItem(Body):
    dataset_id: str
    context: str | None = None
    time_to_live_in_seconds: FiniteFloat | None = Field(None, gt=0, le=MAX_TTL_S)


class ItemCreated(Body):
    flow_item_id: str = Field(min_length=1)


class Item(Body):
    """An item, alone or as a row of the list. `votes` and `desired` are additions of our server."""

    id: str
    flow_id: str | None = None
    dataset_id: str
    workflow_id: str | None = None
    state: ItemState
    context: str | None = None
    failure_message: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    expires_at: str | None = None
    completed_at: str | None = None
    failed_at: str | None = None
    votes: int | None = None
    desired: int | None = None

    def status(self) -> ItemStatus:
        return ItemStatus(self.id, self.dataset_id, self.state, self.votes, self.failure_message)


Row = TypeVar("Row", bound=Body)


class Page(Body, Generic[Row]):
    total: int
    page: int
    page_size: int
    total_pages: int | None = None
    items: list[Row]


class ResultAsset(Body):
    t: Literal["TextAsset"] = Field("TextAsset", alias="_t")
    text: str
    metadata: dict[str, str] = {}
    identifier: str


class ResultRow(Body):
    id: str
    asset: ResultAsset
    elo: int


class Results(Body):
    datapoints: list[ResultRow]
    total_votes: int


class VoteMatrix(Body):
    """`data[i][j]` votes for `index[i]` over `columns[j]`; `sort_index` (ours): the rows' places at the caller."""

    index: list[str]
    columns: list[str]
    data: list[list[FiniteFloat]]
    sort_index: list[int] | None = None


class CapabilityDocument(Body):
    """What is found under `/.well-known/rlhf-flow`."""

    idempotency: bool = False
    desired: bool = False
    live_votes: bool = False

    def capabilities(self) -> Capabilities:
        return Capabilities(self.idempotency, self.desired, self.live_votes)


class Lease(Body):
    """One pair for one rater: what a person sees, and nothing that tells the candidates apart otherwise."""

    lease: str
    prompt: str
    instruction: str
    kind: Literal["text", "image"] = "text"
    left: str
    """A text; of an image the path under which this server shows it."""
    right: str
    context_images: list[str] = []
    """Paths of images to show above the pair."""
    expires: float
    """Unix time in seconds."""


Outcome = Literal["left", "right", "tie", "both_bad", "skip"]


class CastVote(BaseModel):
    """A rater's answer; its members are in snake case."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    outcome: Outcome
    response_ms: int | None = Field(None, ge=0, le=86_400_000)
