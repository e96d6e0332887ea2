"""Everything the journal can say, one model per event. An event is written once and never changed."""

from __future__ import annotations

import base64
import math
import re
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Segment, WinMatrix

_BY_PEOPLE = re.compile(r"(recorded:[^/]*/)*item:")


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _pack(values: tuple[float, ...]) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def _unpack(text: str) -> tuple[float, ...]:
    return tuple(np.frombuffer(base64.b64decode(text), dtype="<f4").tolist())


class CompletionRecord(_Event):
    """A completion on disk; log-probabilities as base64 of little-endian float32, so they come back bit for bit."""

    text: str
    token_ids: tuple[int, ...]
    logps: str
    ref_logps: str
    ended: bool
    role: str = ""
    start_logp: float | None = None


class RunStarted(_Event):
    type: Literal["run_started"] = "run_started"
    run_id: str
    name: str
    seed: int
    version: str
    """Of rlhf itself; the other versions are in environment.json."""


class StageStarted(_Event):
    type: Literal["stage_started"] = "stage_started"
    stage: str
    fingerprint: str
    """Of everything that the stage's result follows from: recipe keys and the content of its data files."""
    attempt: int = 1
    """Counts up with --fresh; groups of earlier attempts are history, not state."""
    resumed_from_step: int | None = None


class StageFinished(_Event):
    type: Literal["stage_finished"] = "stage_finished"
    stage: str
    fingerprint: str
    seconds: float
    summary: dict[str, float | str | None] = {}
    """The few figures a person would quote."""


class FlowOpened(_Event):
    type: Literal["flow_opened"] = "flow_opened"
    flow_id: str
    service: str
    fingerprint: str
    instruction: str
    min_votes: int
    desired_votes: int
    max_votes: int
    ttl_s: float
    segments: bool = False


class GroupSampled(_Event):
    type: Literal["group_sampled"] = "group_sampled"
    group_id: str
    index: int
    prompt_id: str
    messages: tuple[tuple[str, str], ...]
    prompt_ids: tuple[int, ...]
    completions: tuple[CompletionRecord, ...]
    policy_step: int
    batch: int | None = None
    """Index of the first group sampled together with this one; the random numbers of all of them follow from it."""

    @classmethod
    def of(cls, group: Group, batch: int | None = None) -> GroupSampled:
        return cls(
            group_id=group.id,
            index=group.index,
            prompt_id=group.prompt.id,
            messages=tuple((m.role, m.content) for m in group.prompt.messages),
            prompt_ids=group.prompt_ids,
            completions=tuple(
                CompletionRecord(
                    text=c.text,
                    token_ids=c.token_ids,
                    logps=_pack(c.logps),
                    ref_logps=_pack(c.ref_logps),
                    ended=c.ended,
                    role=c.role,
                    start_logp=c.start_logp,
                )
                for c in group.completions
            ),
            policy_step=group.policy_step,
            batch=batch,
        )

    def group(self) -> Group:
        return Group(
            id=self.group_id,
            index=self.index,
            prompt=Prompt(self.prompt_id, tuple(Message(role, content) for role, content in self.messages)),
            prompt_ids=self.prompt_ids,
            completions=tuple(
                Completion(c.text, c.token_ids, _unpack(c.logps), _unpack(c.ref_logps), c.ended, c.role, c.start_logp)
                for c in self.completions
            ),
            policy_step=self.policy_step,
        )


class GroupChosen(_Event):
    """Who is asked about a group, decided when it was sampled and never again: people, or nobody but the model."""

    type: Literal["group_chosen"] = "group_chosen"
    group_id: str
    people: bool
    why: Literal["random", "uncertainty", "diverse", "drifting", "round", "not selected", "budget"]
    """`random` is blind to the group, so figures of these groups hold for all; `round` is a targeted round."""
    value: float | None = None
    """What it was compared by; larger is more worth asking about."""
    version: str | None = None
    """Of the model behind `scores`."""
    scores: tuple[float, ...] | None = None
    """What that model said before anybody was asked, one per completion; differences are calibrated log-odds."""
    cluster: int | None = None
    """Of its prompt, where a drift watch sorts them."""


class GroupIntended(_Event):
    """About to buy an item for the group. From here on, a restart looks the item up before it creates one."""

    type: Literal["group_intended"] = "group_intended"
    group_id: str
    key: str
    """Idempotency key, the same after every restart."""


class DatasetCreated(_Event):
    type: Literal["dataset_created"] = "dataset_created"
    group_id: str
    dataset_id: str


class GroupSubmitted(_Event):
    type: Literal["group_submitted"] = "group_submitted"
    group_id: str
    dataset_id: str
    item_id: str


class GroupRanked(_Event):
    """The first terminal snapshot of the votes on a group; what trains, if the group trains."""

    type: Literal["group_ranked"] = "group_ranked"
    group_id: str
    source: str
    wins: tuple[tuple[float, ...], ...]
    latency_s: float
    complete: bool
    scores: tuple[float | None, ...] | None = None
    segments: tuple[tuple[int, int, int, bool], ...] = ()
    """Completion, start, end, good; see `types.Segment`."""

    @property
    def by_people(self) -> bool:
        """Simulated and recorded ones included; False where a model answered in their place."""
        return _BY_PEOPLE.match(self.source) is not None

    def matrix(self) -> WinMatrix:
        return WinMatrix(self.wins)

    def ranked(self, group: Group) -> RankedGroup:
        """`group` with what this event says about it."""
        segments = tuple(Segment(*segment) for segment in self.segments)
        scores = None if self.scores is None else tuple(math.nan if s is None else s for s in self.scores)
        return RankedGroup(
            group, self.matrix(), self.source, self.latency_s, self.complete, scores=scores, segments=segments
        )


class ItemEnded(_Event):
    """The first terminal snapshot of an item that does not decide its group alone; the group may be asked again."""

    type: Literal["item_ended"] = "item_ended"
    group_id: str
    item_id: str
    state: str
    votes: float
    """Paid for; all that is known where the service does not show which they were."""
    wins: tuple[tuple[float, ...], ...] | None = None
    segments: tuple[tuple[int, int, int, bool], ...] = ()
    """As in `GroupRanked`."""


class ItemDoubled(_Event):
    """A service made two items of one dataset: their votes are pooled, all but the oldest are stopped."""

    type: Literal["item_doubled"] = "item_doubled"
    group_id: str
    dataset_id: str
    item_ids: tuple[str, ...]
    """Oldest first."""


class ItemStopped(_Event):
    """We ended an item before its time."""

    type: Literal["item_stopped"] = "item_stopped"
    group_id: str
    item_id: str
    reason: str


class VotesLate(_Event):
    """Votes that came after their group was decided: no policy step learns from them, a reward model may."""

    type: Literal["votes_late"] = "votes_late"
    group_id: str
    item_id: str
    wins: tuple[tuple[float, ...], ...]
    """Without those known before."""

    def matrix(self) -> WinMatrix:
        return WinMatrix(self.wins)


class SnapshotContradicted(_Event):
    """A service took back what it had said about an ended item. The first snapshot stays the one that counts."""

    type: Literal["snapshot_contradicted"] = "snapshot_contradicted"
    group_id: str
    item_id: str
    what: str
    wins: tuple[tuple[float, ...], ...] | None = None
    """What it says now, where that are votes."""


class GroupSetAside(_Event):
    """The group will not be trained on."""

    type: Literal["group_set_aside"] = "group_set_aside"
    group_id: str
    reason: str


class PromptsCompared(_Event):
    """How prompts are compared in this run, to its end."""

    type: Literal["prompts_compared"] = "prompts_compared"
    embedding: Literal["minilm", "words"]
    """What stands for a prompt: see `policy.embeddings`."""
    clusters: tuple[tuple[int, str], ...] = ()
    """Where a drift watch sorts them: how many prompts each cluster has, and the id of the one in its middle."""


class DriftFound(_Event):
    """Model and people disagree more than before in one cluster of prompts: a targeted round begins."""

    type: Literal["drift_found"] = "drift_found"
    cluster: int
    z: float
    """Standard errors by which it rose."""
    before: float
    """Share of votes against the model beyond what the model itself expects, before and now."""
    now: float
    groups: int
    """The next ones of the cluster that people are asked about."""
    outdated: tuple[str, ...]
    """Groups of the cluster that people decided before it began; what they say no longer holds."""


class RoundEnded(_Event):
    """People have decided about the groups of a targeted round; the reward model is to be refitted."""

    type: Literal["round_ended"] = "round_ended"
    cluster: int


class RewardModelRefreshed(_Event):
    """The heads of the reward model were refitted to people's votes, and held-out fresh votes said what becomes of it.

    What is published is on disk before this is written.
    """

    type: Literal["reward_model_refreshed"] = "reward_model_refreshed"
    version: int
    """Scores from here on, and says so in the source of a group; the one before where the refit was not published."""
    published: bool
    groups: int
    """People's groups known by then, in the order of the journal; those unknown to the refit before are fresh."""
    heldout: tuple[str, ...]
    """The fresh ones that neither version had learned from."""
    accuracy_before: float
    """Share of the held-out votes that the version in use agrees with."""
    accuracy_after: float
    """The same of the refit."""
    path: str | None = None
    """Of its heads, relative to the run folder."""
    sha256: str | None = None


class StepTrained(_Event):
    type: Literal["step_trained"] = "step_trained"
    step: int
    """Counts from 1."""
    group_ids: tuple[str, ...]
    beta: float | None = None
    """Of the learner in this step, so that a repeated step is the same step."""


class CheckpointSaved(_Event):
    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int
    path: str
    """Relative to the run folder."""


class GuardTripped(_Event):
    """A guard found the policy beyond its limit and the run goes on, or ends; see `RolledBack` for the third way."""

    type: Literal["guard_tripped"] = "guard_tripped"
    guard: str
    """`kl`, `length_growth` or `length_correlation`."""
    step: int
    """Steps that the policy had taken."""
    value: float
    limit: float
    action: Literal["note", "stop"]


class RolledBack(_Event):
    """The run goes on from an earlier step: the steps after it are void, and so is what was sampled after it.

    One event does all of it, so that a death leaves the roll-back undecided or decided and never half of it.
    """

    type: Literal["rolled_back"] = "rolled_back"
    guard: str
    value: float
    limit: float
    from_step: int
    to_step: int
    """0 for the model that the run started from."""
    checkpoint: str | None
    """Of `to_step`, relative to the run folder."""
    beta_scale: float
    """What the recipe's beta is multiplied by from here on, all roll-backs of the attempt together."""


class RunStopped(_Event):
    """The process ended in order, early or not; a journal without it at the end belongs to a killed process."""

    type: Literal["run_stopped"] = "run_stopped"
    exit_code: int
    reason: str


Event = Annotated[
    RunStarted
    | StageStarted
    | StageFinished
    | FlowOpened
    | GroupSampled
    | GroupChosen
    | GroupIntended
    | DatasetCreated
    | GroupSubmitted
    | GroupRanked
    | ItemEnded
    | ItemDoubled
    | ItemStopped
    | VotesLate
    | SnapshotContradicted
    | GroupSetAside
    | PromptsCompared
    | DriftFound
    | RoundEnded
    | RewardModelRefreshed
    | StepTrained
    | CheckpointSaved
    | GuardTripped
    | RolledBack
    | RunStopped,
    Field(discriminator="type"),
]

event_adapter: TypeAdapter[Event] = TypeAdapter(Event)
