"""From the events of a journal to the state of the run: a fold, without side effects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_cli.errors import RunDamaged
from rlhf_cli.journal.events import (
    CheckpointSaved,
    DatasetCreated,
    DriftFound,
    Event,
    FlowOpened,
    GroupChosen,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    GroupSubmitted,
    GuardTripped,
    ItemDoubled,
    ItemEnded,
    ItemStopped,
    PromptsCompared,
    RewardModelRefreshed,
    RolledBack,
    RoundEnded,
    RunStarted,
    RunStopped,
    SnapshotContradicted,
    StageFinished,
    StageStarted,
    StepTrained,
    VotesLate,
)
from rlhf_cli.journal.journal import Entry

ONLINE = "run-online"


@dataclass(frozen=True, slots=True)
class StageDone:
    fingerprint: str
    summary: dict[str, float | str | None]
    seconds: float


@dataclass(frozen=True, slots=True)
class Ask:
    """One time that people are asked about a group; what has not happened yet is None."""

    key: str | None = None
    dataset_id: str | None = None
    item_id: str | None = None
    submitted_at: float | None = None


@dataclass(frozen=True, slots=True)
class GroupState:
    """The life of one group so far; what has not happened yet is None."""

    sampled: GroupSampled
    chosen: GroupChosen | None = None
    """Who is asked; None where everybody always is."""
    asks: tuple[Ask, ...] = ()
    """More than one where too few votes came the first time and the recipe asks again."""
    doubles: tuple[ItemDoubled, ...] = ()
    ended: tuple[ItemEnded, ...] = ()
    stopped: tuple[ItemStopped, ...] = ()
    late: tuple[VotesLate, ...] = ()
    ranked: GroupRanked | None = None
    """The first terminal snapshot; later ones never replace it."""
    ranked_seq: int = -1
    """Place of that snapshot in the journal: steps take groups in this order. -1 where the group was set aside before,
    for too few votes: they are kept for a reward model, and nobody else was told of them."""
    set_aside: str | None = None
    decided_at: float | None = None
    """Unix time at which it was ranked or set aside."""
    step: int | None = None
    """The step that trained on it; steps that a roll-back made void do not count."""
    void: bool = False
    """Sampled by a policy that a roll-back gave up."""

    @property
    def ask(self) -> Ask:
        """The latest one; empty where nobody was asked yet."""
        return self.asks[-1] if self.asks else Ask()

    @property
    def item_id(self) -> str | None:
        return self.ask.item_id

    @property
    def open(self) -> bool:
        """Still waiting for votes, or for being asked about."""
        return self.ranked is None and self.set_aside is None

    @property
    def ready(self) -> bool:
        """Ranked and waiting for its step."""
        return self.ranked is not None and self.set_aside is None and self.step is None


@dataclass(frozen=True, slots=True)
class RunState:
    """What the journal says. From `groups` to `refreshed` it is of the current attempt of run-online."""

    started: RunStarted | None = None
    stages: dict[str, StageDone] = field(default_factory=dict)
    """Stages that finished and were not started again since, by name."""
    current: StageStarted | None = None
    """The stage that was started last and has not finished."""
    flow: FlowOpened | None = None
    attempt: int = 0
    """Of run-online; 0 before its first start."""
    groups: dict[str, GroupState] = field(default_factory=dict)
    """In the order they were sampled."""
    steps: dict[int, StepTrained] = field(default_factory=dict)
    """Those that stand: a roll-back takes the ones after it away."""
    checkpoint: CheckpointSaved | None = None
    rollbacks: tuple[RolledBack, ...] = ()
    tripped: tuple[GuardTripped, ...] = ()
    compared: PromptsCompared | None = None
    drift: tuple[tuple[int, DriftFound | RoundEnded], ...] = ()
    """What the drift watch found, each with its place in the journal."""
    refit_due: bool = False
    """A targeted round ended, and no refit came after it."""
    refreshed: tuple[RewardModelRefreshed, ...] = ()
    """Refits of the reward model, published or not."""
    votes_total: float = 0.0
    """People's votes in the journal, those of earlier attempts too: what was paid stays paid."""
    stopped: RunStopped | None = None
    """How the last process ended; None while one runs, or after one was killed."""

    @property
    def run_id(self) -> str | None:
        return self.started.run_id if self.started else None

    @property
    def next_index(self) -> int:
        """Index of the next group to sample."""
        return max((g.sampled.index for g in self.groups.values()), default=-1) + 1

    @property
    def beta_scale(self) -> float:
        """What roll-backs multiplied the recipe's beta by."""
        return self.rollbacks[-1].beta_scale if self.rollbacks else 1.0

    @property
    def open_groups(self) -> tuple[GroupState, ...]:
        """Groups without an outcome, in the order they were sampled."""
        return tuple(g for g in self.groups.values() if g.open)

    @property
    def ready_groups(self) -> tuple[GroupState, ...]:
        """Groups ranked but not yet trained on, in the order they were ranked."""
        return tuple(sorted((g for g in self.groups.values() if g.ready), key=lambda g: g.ranked_seq))


def replay(entries: Iterable[Entry]) -> RunState:
    """Fold the entries of a journal into the state of the run.

    Raises:
        RunDamaged: The events contradict each other: an event of an unknown group, a group sampled twice or trained in
            two steps, a step repeated with other groups. The message names the line.
    """
    state = RunState()
    for entry in entries:
        state = _after(state, entry)
    return state


def attempts(entries: Sequence[Entry]) -> Iterator[RunState]:
    """The state at the end of each attempt at run-online, with the groups of that attempt; the last one is `replay`'s.

    Raises:
        RunDamaged: As `replay`.
    """
    attempt = 0
    for n, entry in enumerate(entries):
        event = entry.event
        if isinstance(event, StageStarted) and event.stage == ONLINE and event.attempt != attempt:
            if attempt:
                yield replay(entries[:n])
            attempt = event.attempt
    yield replay(entries)


def _after(state: RunState, entry: Entry) -> RunState:
    event: Event = entry.event
    match event:
        case RunStarted():
            if state.started is not None and state.started.run_id != event.run_id:
                raise _damaged(entry, f"run {event.run_id} starts in the journal of run {state.started.run_id}")
            return replace(state, started=event, stopped=None)
        case StageStarted():
            stages = {name: done for name, done in state.stages.items() if name != event.stage}
            state = replace(state, stages=stages, current=event, stopped=None)
            if event.stage != ONLINE or event.attempt == state.attempt:
                return state
            return RunState(
                started=state.started,
                stages=stages,
                current=event,
                flow=state.flow,
                attempt=event.attempt,
                votes_total=state.votes_total,
            )
        case StageFinished():
            done = StageDone(event.fingerprint, event.summary, event.seconds)
            open_stage = None if state.current and state.current.stage == event.stage else state.current
            return replace(state, stages={**state.stages, event.stage: done}, current=open_stage)
        case FlowOpened():
            return replace(state, flow=event)
        case StepTrained():
            return _trained(state, entry, event)
        case CheckpointSaved():
            return replace(state, checkpoint=event)
        case GuardTripped():
            return replace(state, tripped=(*state.tripped, event))
        case RolledBack():
            return _rolled_back(state, entry, event)
        case PromptsCompared():
            return replace(state, compared=event)
        case RewardModelRefreshed():
            return replace(state, refreshed=(*state.refreshed, event), refit_due=False)
        case DriftFound() | RoundEnded():
            due = state.refit_due or isinstance(event, RoundEnded)
            return replace(state, drift=(*state.drift, (entry.seq, event)), refit_due=due)
        case RunStopped():
            return replace(state, stopped=event)
        case _:
            return _group(state, entry, event)


def _group(
    state: RunState,
    entry: Entry,
    event: GroupSampled
    | GroupChosen
    | GroupIntended
    | DatasetCreated
    | GroupSubmitted
    | GroupRanked
    | GroupSetAside
    | ItemEnded
    | ItemDoubled
    | ItemStopped
    | VotesLate
    | SnapshotContradicted,
) -> RunState:
    # The dicts below belong to this fold alone, so they are updated in place: replaying stays linear in the journal.
    if isinstance(event, GroupSampled):
        if event.group_id in state.groups:
            raise _damaged(entry, f"group {event.group_id} is sampled a second time")
        state.groups[event.group_id] = GroupState(event)
        return state
    group = state.groups.get(event.group_id)
    if group is None:
        raise _damaged(entry, f"{event.type} of group {event.group_id}, which was never sampled")
    paid = 0.0
    match event:
        case GroupChosen():
            group = replace(group, chosen=event)
        case GroupIntended():
            group = replace(group, asks=(*group.asks, Ask(key=event.key)))
        case DatasetCreated():
            group = _asked(group, dataset_id=event.dataset_id)
        case GroupSubmitted():
            group = _asked(group, dataset_id=event.dataset_id, item_id=event.item_id, submitted_at=entry.at)
        case ItemEnded():
            paid = event.votes
            group = replace(group, ended=(*group.ended, event))
        case ItemDoubled():
            group = replace(group, doubles=(*group.doubles, event))
        case ItemStopped():
            group = replace(group, stopped=(*group.stopped, event))
        case VotesLate():
            first = all(late.item_id != event.item_id for late in group.late)
            unseen = sum(e.votes for e in group.ended if first and e.item_id == event.item_id and e.wins is None)
            paid = max(0.0, event.matrix().votes - unseen)
            group = replace(group, late=(*group.late, event))
        case GroupSetAside():
            if group.step is not None:
                raise _damaged(entry, f"group {event.group_id} is set aside after it trained in step {group.step}")
            group = replace(group, set_aside=event.reason, decided_at=entry.at)
        case GroupRanked() if group.ranked is None:
            seq = entry.seq if group.set_aside is None else -1
            group = replace(group, ranked=event, ranked_seq=seq, decided_at=entry.at)
            if event.source.startswith("item:"):
                paid = event.matrix().votes - sum(e.votes for e in group.ended if e.wins is not None)
    state = replace(state, votes_total=state.votes_total + paid)
    state.groups[event.group_id] = group
    return state


def _asked(group: GroupState, **known: Any) -> GroupState:
    return replace(group, asks=(*group.asks[:-1], replace(group.ask, **known)))


def _trained(state: RunState, entry: Entry, event: StepTrained) -> RunState:
    before = state.steps.get(event.step)
    if before is not None and before.group_ids != event.group_ids:
        raise _damaged(entry, f"step {event.step} is trained again with other groups than the first time")
    for group_id in event.group_ids:
        group = state.groups.get(group_id)
        if group is None or group.ranked is None or group.set_aside is not None:
            raise _damaged(entry, f"step {event.step} trained on group {group_id}, which has no usable votes")
        if group.step is not None and group.step != event.step:
            raise _damaged(entry, f"group {group_id} is trained in step {group.step} and again in step {event.step}")
        state.groups[group_id] = replace(group, step=event.step)
    state.steps[event.step] = event
    return state


def _rolled_back(state: RunState, entry: Entry, event: RolledBack) -> RunState:
    """Steps after `to_step` are void; their groups wait again, unless a policy that is given up sampled them."""
    if event.to_step and event.to_step not in state.steps:
        raise _damaged(entry, f"the run is rolled back to step {event.to_step}, which was never trained")
    reason = f"rolled back to step {event.to_step}: the policy that sampled it was given up"
    for group_id, group in state.groups.items():
        if group.step is not None and group.step > event.to_step:
            group = replace(group, step=None)
        if group.sampled.policy_step > event.to_step and not group.void:
            group = replace(group, void=True)
            if group.set_aside is None:
                group = replace(group, set_aside=reason, decided_at=group.decided_at or entry.at)
        state.groups[group_id] = group
    return replace(
        state,
        steps={step: trained for step, trained in state.steps.items() if step <= event.to_step},
        checkpoint=CheckpointSaved(step=event.to_step, path=event.checkpoint) if event.checkpoint else None,
        rollbacks=(*state.rollbacks, event),
    )


def _damaged(entry: Entry, what: str) -> RunDamaged:
    return RunDamaged(
        f"journal line {entry.seq + 1}: {what}. The run cannot be continued from this journal; "
        "start anew with --fresh or in another run folder with --run-dir."
    )
