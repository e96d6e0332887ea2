"""Bodies of the ranking-flow protocol, shared by client and server. Unknown members of what is received are ignored."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic.alias_generators import to_camel

from rlhf_cli.flow.base import Capabilities, ItemState, ItemStatus

MAX_TEXT_BYTES = 32 * 1024
MIN_CANDIDATES, MAX_CANDIDATES = 2, 16
MAX_TTL_S = 7 * 86400
MAX_SEGMENTS = 64
"""Most marks in one vote."""
MAX_VOTES = 1_000_000_000
"""No item has as many; whoever says more is not to be believed."""


class Body(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, mode="json")


class Sent(Body):
    """A body that a client sends: what is not given is left out, so that a service's own default holds."""

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)


class Token(BaseModel):
    """The answer of the identity service; its members are in snake case."""

    access_token: str = Field(min_length=1)
    token_type: str = "Bearer"
    expires_in: float | None = None


Goal = Literal["ranking", "best", "balanced"]


class FeatureFlag(Body):
    key: str = Field(max_length=200)
    value: str = Field(max_length=1000)


class FlowSettings(Sent):
    """Members of a flow that are optional and nullable. Our server acts on the first two and the last one."""

    drain_duration_seconds: int | None = Field(None, ge=0, le=MAX_TTL_S)
    """Seconds before an item's end at which nobody new is asked."""
    serve_timeout_seconds: int | None = Field(None, ge=1, le=86400)
    """Seconds that a person may keep a pair."""
    starting_elo: int | None = Field(None, ge=-1_000_000, le=1_000_000)
    feature_flags: list[FeatureFlag] | None = Field(None, max_length=100)
    validation_set_id: str | None = Field(None, max_length=200)
    audience_id: str | None = Field(None, max_length=200)
    serve_to_response_ratio: FiniteFloat | None = None
    target_response_count: int | None = Field(None, ge=0)
    pid_proportional_gain: FiniteFloat | None = None
    pid_integral_gain: FiniteFloat | None = None
    pid_derivative_gain: FiniteFloat | None = None
    pid_output_offset: FiniteFloat | None = None
    pid_min_sessions_per_minute: int | None = None
    pid_max_sessions_per_minute: int | None = None
    pid_batch_mode: Literal["Total", "PerBatch", "PerBatchTimeWeighted"] | None = None
    mark_segments: bool | None = None
    """Ours: whether raters may mark spans of texts."""

    def settings(self) -> dict[str, Any]:
        """Those that were sent, as on the wire; a list that is null is an empty one."""
        names = FlowSettings.model_fields.keys() & self.model_fields_set
        sent = self.model_dump(include=names, by_alias=True, mode="json")
        return sent | ({"featureFlags": sent["featureFlags"] or []} if "featureFlags" in sent else {})


class CreateFlow(FlowSettings):
    name: str = Field(min_length=1, max_length=1000)
    criteria: str = Field(min_length=1, max_length=4000)
    min_responses: int | None = Field(None, ge=1)
    max_responses: int | None = Field(None, ge=1, le=100_000)
    serve_responses: int | None = Field(None, ge=1)
    """Votes at which serving stops, our *desired*; null means the maximum."""
    goal: Goal | None = None
    """Ours: which pairs people are given, and with `best` when it is enough."""


class UpdateFlow(FlowSettings):
    """Absent members stay as they are."""

    criteria: str | None = Field(None, min_length=1, max_length=4000)
    min_responses: int | None = Field(None, ge=1)
    max_responses: int | None = Field(None, ge=1, le=100_000)
    serve_responses: int | None = Field(None, ge=1)
    goal: Goal | None = None


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
    goal: str | None = None
    mark_segments: bool | None = None
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
    identifier: str | None = None
    """What the client calls it; ours answers with sort indices instead."""


class ExistingAsset(Body):
    """Something uploaded before, by the name that the upload was answered with."""

    t: Literal["ExistingAssetInput"] = Field("ExistingAssetInput", alias="_t")
    name: str = Field(min_length=1, max_length=200)
    identifier: str | None = None


class ManyAssets(Body):
    t: Literal["MultiAssetInput"] = Field("MultiAssetInput", alias="_t")
    assets: list[ExistingAsset] = Field(min_length=1, max_length=10)


CandidateAsset = Annotated[TextAsset | ExistingAsset, Field(discriminator="t")]


class Segment(Body):
    key: Literal["asset"] = "asset"
    kind: Literal["Asset"] = "Asset"
    asset: CandidateAsset


class CreateDatapoint(Sent):
    """A candidate, as one segment or, as older clients have it, as an asset."""

    segments: list[Segment] | None = Field(None, min_length=1, max_length=1)
    asset: CandidateAsset | None = None
    sort_index: int | None = Field(None, ge=0, le=1_000_000)
    group: str | None = None
    private_metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _one_candidate(self) -> CreateDatapoint:
        if (self.segments is None) == (self.asset is None):
            raise ValueError("a datapoint has one segment, or one asset")
        return self

    @property
    def candidate(self) -> TextAsset | ExistingAsset:
        asset = self.segments[0].asset if self.segments else self.asset
        assert asset is not None
        return asset


class DatapointCreated(Body):
    datapoint_id: str = Field(min_length=1)


class CreateItem(Sent):
    dataset_id: str
    context: str | None = None
    context_asset: Annotated[ExistingAsset | ManyAssets, Field(discriminator="t")] | None = None
    """Images to show above the pairs."""
    # Whole numbers stay whole: the vendor's members are integers, and 60.0 is none to a strict parser.
    time_to_live_in_seconds: int | FiniteFloat | None = Field(None, gt=0, le=MAX_TTL_S)
    drain_duration_in_seconds: int | FiniteFloat | None = Field(None, ge=0, le=MAX_TTL_S)

    @property
    def context_names(self) -> list[str]:
        if self.context_asset is None:
            return []
        many = self.context_asset.assets if isinstance(self.context_asset, ManyAssets) else [self.context_asset]
        return [asset.name for asset in many]


class ItemCreated(Body):
    flow_item_id: str = Field(min_length=1)


class FileUploaded(Body):
    file_name: str = Field(min_length=1)


class UploadUrls(Sent):
    urls: list[str]
    correlation_id: str


class UploadStarted(Body):
    batch_upload_id: str = Field(min_length=1)


class UploadProgress(Body):
    status: str
    completed_batches: list[str] = []


class UploadedUrl(Body):
    url: str
    status: str
    file_name: str | None = None
    error_message: str | None = None


class UploadEnded(Body):
    items: list[UploadedUrl]


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


class ItemRow(Body):
    """What the client reads of an item in a list: hundreds of them are looked at every few seconds."""

    id: str
    dataset_id: str
    state: ItemState
    created_at: str | None = None
    failure_message: str | None = None
    votes: int | None = Field(None, ge=0, le=MAX_VOTES)

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


class OriginalFilename(Body):
    t: Literal["OriginalFilenameMetadata"] = Field("OriginalFilenameMetadata", alias="_t")
    original_filename: str


class ResultFile(Body):
    t: Literal["FileAsset"] = Field("FileAsset", alias="_t")
    file_name: str
    metadata: dict[str, OriginalFilename] = {}
    identifier: str


class ResultRow(Body):
    """A candidate; what follows `elo` is ours: a 95 % interval, P(best), votes, its place, and what to beware of."""

    id: str
    asset: ResultAsset | ResultFile
    elo: int
    elo_low: int | None = None
    elo_high: int | None = None
    p_best: float | None = None
    votes: float | None = None
    sort_index: int | None = None
    flags: list[str] = []


class Results(Body):
    datapoints: list[ResultRow]
    total_votes: int


class SeenAsset(Body):
    """A candidate as results of any service show it: a text, or a file with what is known of its origin."""

    text: str | None = None
    identifier: str | None = None
    metadata: dict[str, Any] = {}

    @property
    def name(self) -> str | None:
        """The text, or the file name or address that it was uploaded from."""
        for key, member in (("sourceUrl", "url"), ("originalFilename", "originalFilename")):
            entry = self.metadata.get(key)
            if isinstance(entry, dict) and isinstance(entry.get(member), str):
                return str(entry[member])
        return self.text


class SeenResult(Body):
    id: str
    asset: SeenAsset
    elo: FiniteFloat
    sort_index: int | None = None


class SeenResults(Body):
    """Results as a client reads them, from our server or another."""

    datapoints: list[SeenResult]
    total_votes: FiniteFloat


class RawVotes(Body):
    """A page of single votes, which is ours alone; kept as it is."""

    total: int
    items: list[Any]


class VoteMatrix(Body):
    """`data[i][j]` votes for `index[i]` over `columns[j]`; `sort_index` (ours): the rows' places at the caller."""

    index: list[str]
    columns: list[str]
    data: list[list[FiniteFloat]]
    sort_index: list[int] | None = None


class ItemSegment(Body):
    """A span that a rater marked: characters `start` (included) to `end` (excluded), by Unicode code point."""

    candidate: int = Field(ge=0)
    """Place in `index`."""
    start: int = Field(ge=0)
    end: int
    good: bool


class ItemSegments(Body):
    """All marks in the counted votes on an item; `index` and `sort_index` as in the vote matrix."""

    index: list[str]
    sort_index: list[int] | None = None
    segments: list[ItemSegment]


class CapabilityDocument(Body):
    """What is found under `/.well-known/rlhf-flow`."""

    idempotency: bool = False
    desired: bool = False
    live_votes: bool = False
    raw_votes: bool = False
    preheat: bool = False
    list_filter: bool = False
    segments: bool = False
    ttl_min_s: FiniteFloat = Field(0.0, ge=0)
    ttl_max_s: FiniteFloat | None = Field(None, gt=0)
    max_candidates: int | None = Field(None, ge=MIN_CANDIDATES)

    def capabilities(self) -> Capabilities:
        known = self.model_dump()
        return Capabilities(**known | {"ttl_max_s": math.inf if self.ttl_max_s is None else self.ttl_max_s})


OURS = Capabilities(
    idempotency=True,
    desired=True,
    live_votes=True,
    raw_votes=True,
    list_filter=True,
    segments=True,
    ttl_max_s=MAX_TTL_S,
    max_candidates=MAX_CANDIDATES,
)
"""What our server offers in this version."""


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
    segments: bool = False
    """Whether spans of the two texts may be marked."""
    expires: float
    """Unix time in seconds."""


Outcome = Literal["left", "right", "tie", "both_bad", "skip"]


class CastSegment(BaseModel):
    """What a rater marked in one of the two texts: code points `start` (included) to `end` (excluded)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    side: Literal["left", "right"]
    start: int = Field(ge=0)
    end: int = Field(le=MAX_TEXT_BYTES)
    good: bool

    @model_validator(mode="after")
    def _not_empty(self) -> CastSegment:
        if self.start >= self.end:
            raise ValueError("a segment ends after its start")
        return self


class CastVote(BaseModel):
    """A rater's answer; its members are in snake case."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    outcome: Outcome
    response_ms: int | None = Field(None, ge=0, le=86_400_000)
    segments: tuple[CastSegment, ...] = Field((), max_length=MAX_SEGMENTS)

    @model_validator(mode="after")
    def _apart(self) -> CastVote:
        """One rater has one say about a character, however marks of all raters are added up."""
        in_order = sorted(self.segments, key=lambda s: (s.side, s.start))
        if any(a.side == b.side and a.end > b.start for a, b in pairwise(in_order)):
            raise ValueError("marks of a vote do not overlap")
        return self
