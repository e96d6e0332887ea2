"""Hybrid feedback without a backbone: completions that spell their features, and people who like the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stream_world import Disk
from torch import nn

from rlhf_cli.feedback.drift import DriftWatch
from rlhf_cli.feedback.hybrid import HybridFeedback
from rlhf_cli.feedback.refresh import LiveModel, Refresher
from rlhf_cli.feedback.selection import Chooser
from rlhf_cli.journal.events import Event, GroupIntended, GroupRanked, GroupSampled, VotesLate
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.learner.refit import refit_heads
from rlhf_cli.policy.scoring import About, Array, RewardModel, Text
from rlhf_cli.recipe.online import Refresh, Selection
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Unranked, WinMatrix

WIDTH, SIZE = 4, 3


class Spelled(RewardModel):
    """Reads the features of a completion from its text; its head likes the second feature."""

    def __init__(self, heads: int = 1, temperature: float = 1.0) -> None:
        self.about = About(temperature=temperature)
        self.model = nn.Module()
        self.model.score = nn.Linear(WIDTH, heads, bias=False)
        with torch.no_grad():
            self.model.score.weight.zero_()
            self.model.score.weight[:, 1] = 1.0
        self.looks = 0

    def features(self, texts: Sequence[Text]) -> list[Array]:
        self.looks += 1
        return [np.array([[float(x) for x in c.split()] for c in completions]) for _, completions in texts]


def group(index: int) -> Group:
    draw = np.random.default_rng(index)
    texts = [" ".join(f"{x:.3f}" for x in draw.normal(size=WIDTH)) for _ in range(SIZE)]
    completions = tuple(Completion(text, (1,), (-1.0,), (-1.0,), True) for text in texts)
    return Group(f"r-1-{index:06d}", index, Prompt(f"p{index}", (Message("user", "Hi"),)), (1,), completions, 0)


def liked(group: Group, votes: float = 4.0) -> WinMatrix:
    """Every pair goes to the completion with the larger first feature."""
    first = [float(c.text.split()[0]) for c in group.completions]
    return WinMatrix([[votes * (a > b) for b in first] for a in first])


@dataclass
class Crowd:
    """People who need `looks` looks before they have voted, one group at a time; late votes come one look later."""

    journal: Callable[[Event], object]
    looks: int = 2
    late: float = 0.0
    waiting: list[list] = field(default_factory=list)  # type: ignore[type-arg]
    owed: list[Group] = field(default_factory=list)
    votes: float = 0.0

    def submit(self, group: Group) -> None:
        self.journal(GroupIntended(group_id=group.id, key=group.id))
        self.waiting.append([group, self.looks])

    def resume(self, groups: Iterable[GroupState]) -> None:
        for state in groups:
            if state.open:
                if not state.asks:
                    self.submit(state.sampled.group())
                else:
                    self.waiting.append([state.sampled.group(), self.looks])
            elif state.ranked is not None and state.ranked.by_people and self.late and not state.late:
                self.owed.append(state.sampled.group())

    def collect(self) -> list[RankedGroup | Unranked]:
        for group in self.owed:
            rows = liked(group, self.late).wins.tolist()
            self.journal(VotesLate(group_id=group.id, item_id="i", wins=rows))
        self.owed = []
        if not self.waiting:
            return []
        self.waiting[0][1] -= 1
        group, left = self.waiting[0]
        if left > 0:
            return []
        self.waiting.pop(0)
        rows = tuple(tuple(row) for row in liked(group).wins.tolist())
        event = GroupRanked(group_id=group.id, source="item:i", wins=rows, latency_s=1.0, complete=True)
        self.journal(event)
        self.votes += event.matrix().votes
        if self.late:
            self.owed.append(group)
        return [event.ranked(group)]

    def status(self) -> dict[str, float]:
        return {"flow/votes_total": self.votes}


@dataclass
class World:
    """What a process holds: hybrid feedback with all its parts, gone on from what is on disk."""

    disk: Disk
    folder: Path
    selection: Selection = field(default_factory=lambda: Selection(share=0.5))
    refresh: Refresh | None = field(default_factory=lambda: Refresh(every_groups=5, heldout_share=0.4))
    looks: int = 2
    late: float = 0.0
    penalty: float = 0.0
    model: RewardModel = field(default_factory=Spelled)
    watch: DriftWatch | None = None
    affords: Callable[[int], bool] = lambda groups: True
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.live = LiveModel(self.model)
        run = RunDir(self.folder)
        refit = partial(refit_heads, seed=3)
        self.refresher = (
            Refresher(self.live, refit, self.refresh, 3, run, self.disk.append, self.notes.append)
            if self.refresh is not None
            else None
        )
        self.people = Crowd(self.journal, self.looks, self.late)
        chooser = Chooser(self.selection, 3, watch=self.watch)
        self.feedback = HybridFeedback(
            self.people,
            chooser,
            self.live,
            self.disk.append,
            affords=self.affords,
            refresher=self.refresher,
            watch=self.watch,
            length_penalty=self.penalty,
        )
        self.feedback.resume(self.disk.state(), list(self.disk.entries))

    def journal(self, event: Event) -> None:
        """As the stage gives it to those who ask people."""
        self.disk.append(event)
        if self.refresher is not None:
            self.refresher.note(event)

    def run(self, groups: int) -> list[RankedGroup | Unranked]:
        """Look, as the stream does, then sample what is left of `groups` groups, one between two looks, and wait."""
        decided = self.feedback.collect()
        for index in range(self.disk.state().next_index, groups):
            self.disk.append(GroupSampled.of(group(index)))
            self.feedback.submit(group(index))
            decided += self.feedback.collect()
        while self.disk.state().open_groups or self.people.owed:
            decided += self.feedback.collect()
        return [*decided, *self.feedback.collect()]
