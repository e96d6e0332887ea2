"""The online stream without a model: a policy that writes numbers, people who answer when told, a trainer's pull."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.journal.events import Event, GroupRanked, GroupSampled, GroupSetAside, StepTrained
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import RunState, replay
from rlhf_cli.learner.batch import Batch
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.online.stream import Stream
from rlhf_cli.policy.policy import Stopwatch
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Unranked, WinMatrix

PROMPTS = [Prompt(f"p{i}", (Message("user", f"Question {i}?"),)) for i in range(5)]


class Killed(Exception):
    """The process died here."""


@dataclass
class Disk:
    """A journal in memory that may die before it writes event number `dies_at`, or right after `dies_after`."""

    entries: list[Entry] = field(default_factory=list)
    dies_at: int | None = None
    dies_after: int | None = None

    def append(self, event: Event) -> Entry:
        if self.dies_at is not None and len(self.entries) >= self.dies_at:
            raise Killed
        self.entries.append(Entry(len(self.entries), 0.0, event))
        if self.dies_after is not None and len(self.entries) > self.dies_after:
            raise Killed
        return self.entries[-1]

    def of(self, kind: type) -> list[Any]:
        return [entry.event for entry in self.entries if isinstance(entry.event, kind)]

    def state(self) -> RunState:
        """What a restart knows; raises RunDamaged if a group is sampled, or trained on, twice."""
        return replay(self.entries)


@dataclass
class Writer:
    """A policy that writes its step and the group's number; `kl_nats` is how far it has drifted."""

    kl_nats: float = 0.0
    syncs: int = 0
    phase: Stopwatch = field(default_factory=Stopwatch)

    def sync(self) -> None:
        self.syncs += 1

    def sample_groups(
        self,
        prompts: Sequence[Prompt],
        sampling: object,
        size: int,
        *,
        first_index: int,
        prefix: str,
        step: int,
        seed: int,
    ) -> list[Group]:
        del sampling, seed
        return [
            Group(
                f"{prefix}-{first_index + i:06d}",
                first_index + i,
                prompt,
                (1, 2),
                tuple(
                    Completion(f"{step}/{first_index + i}/{k}", (3,), (self.kl_nats - 1.0,), (-1.0,), True)
                    for k in range(size)
                ),
                step,
            )
            for i, prompt in enumerate(prompts)
        ]


@dataclass
class Answer:
    """What becomes of a group: after so many looks it has votes, or is set aside if there are none."""

    looks: int = 0
    votes: float = 3.0


@dataclass
class People:
    """`Feedback` that answers as told; every look at it lets time pass."""

    disk: Disk
    answer: Callable[[Group], Answer] = lambda group: Answer()
    on_submit: Callable[[], None] = lambda: None
    votes: float = 0.0
    waiting: list[tuple[Group, Answer]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def submit(self, group: Group) -> None:
        self.asked.append(group.id)
        self.waiting.append((group, self.answer(group)))
        self.on_submit()

    def collect(self) -> list[RankedGroup | Unranked]:
        decided: list[RankedGroup | Unranked] = []
        due = [(group, answer) for group, answer in self.waiting if answer.looks <= 0]
        self.waiting = [(group, answer) for group, answer in self.waiting if answer.looks > 0]
        for _, answer in self.waiting:
            answer.looks -= 1
        for group, answer in due:
            if not answer.votes:
                self.disk.append(GroupSetAside(group_id=group.id, reason="no votes"))
                decided.append(Unranked(group, "no votes"))
                continue
            rows = [[0.0] * len(group.completions) for _ in group.completions]
            rows[0][1] = answer.votes
            wins = WinMatrix(rows)
            event = GroupRanked(
                group_id=group.id, source="item:i", wins=tuple(map(tuple, rows)), latency_s=1.0, complete=True
            )
            self.disk.append(event)
            self.votes += answer.votes
            decided.append(RankedGroup(group, wins, "item:i", 1.0, True))
        return decided

    def status(self) -> dict[str, float]:
        return {"flow/votes_total": self.votes, "flow/in_flight": float(len(self.waiting))}


def stream(recipe: Recipe, disk: Disk, people: People, **given: Any) -> Stream:
    """A stream as run-online makes it from what is on disk; groups without an outcome are asked about again."""
    state = disk.state()
    for group in state.open_groups:
        people.submit(group.sampled.group())
    arguments: dict[str, Any] = {"policy": Writer(), "prompts": PROMPTS, "stop": StopRequest(), **given}
    return Stream(feedback=people, journal=disk, state=state, recipe=recipe, **arguments)  # type: ignore[arg-type]


def train(stream: Stream, disk: Disk, from_step: int = 0) -> list[Batch]:
    """What trainer and recorder do: pull, learn, write down. Returns the batches."""
    assert stream.recipe.run_online is not None
    stream.step = from_step
    batches: list[Batch] = []
    pull = iter(stream)
    while stream.step < stream.recipe.run_online.steps:
        batches.append(next(pull))
        ids = tuple(g.group.id for g in batches[-1].groups)
        disk.append(StepTrained(step=stream.step + 1, group_ids=ids, beta=batches[-1].beta))
        stream.step += 1
    return batches


def sampled(disk: Disk) -> list[GroupSampled]:
    return disk.of(GroupSampled)
