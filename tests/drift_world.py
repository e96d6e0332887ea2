"""A taste that turns in mid-run in one topic, a reward model that does not know it yet, and people who do.

The hybrid feedback, chooser, watch, refit and clusters are the real ones. Completions spell their qualities, which the
head of the model reads at the place of their topic, as a backbone does that can tell topics apart.
"""

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
from rlhf_cli.journal.events import DriftFound, Event, GroupChosen, GroupIntended, GroupRanked, GroupSampled
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.learner.refit import refit_heads
from rlhf_cli.policy.embeddings import Clusters, Prompts
from rlhf_cli.policy.heads import Array, Heads
from rlhf_cli.policy.scoring import About, RewardModel, Text
from rlhf_cli.recipe.online import Drift, Refresh, Selection
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Unranked

TOPICS = {
    "rivers": "river water bank flood delta stream source mouth",
    "bread": "bread flour yeast oven crust dough knead rise",
    "stars": "star planet orbit moon telescope light galaxy comet",
    "music": "song chord melody rhythm drum violin tune choir",
}
QUALITIES, SIZE, VOTES = 6, 6, 12
EVERYTHING = Selection(share=0.999, random_share=1.0)


def _prompts() -> list[Prompt]:
    """Twenty of each topic, recognisable by their words alone."""
    draw, made = np.random.default_rng(0), []
    for n in range(80):
        name = list(TOPICS)[n % len(TOPICS)]
        words = draw.choice(TOPICS[name].split(), 4, replace=False)
        made.append(Prompt(f"p{n}", (Message("user", f"what about {' and '.join(words)} number {n}"),)))
    return made


PROMPTS = _prompts()


def topic(prompt: Prompt) -> str:
    return next(name for name, words in TOPICS.items() if any(word in prompt.text.split() for word in words.split()))


def placed(name: str, qualities: Array) -> Array:
    """Qualities at the place of their topic, 0 at the others: shape (G, topics * QUALITIES)."""
    wide = np.zeros((len(qualities), len(TOPICS), QUALITIES))
    wide[:, list(TOPICS).index(name)] = qualities
    return wide.reshape(len(qualities), -1)


def qualities(completions: Iterable[str]) -> Array:
    return np.array([[float(x) for x in text.split()] for text in completions])


@dataclass
class Taste:
    """What people like: the same in all topics, until `turns_at`, when one topic turns to the opposite."""

    seed: int
    turns_at: int
    turning: str = "bread"

    def __post_init__(self) -> None:
        drawn = np.random.default_rng([self.seed, 1]).normal(size=QUALITIES)
        self.weight = 2 * drawn / np.linalg.norm(drawn)

    def of(self, name: str, index: int) -> Array:
        return -self.weight if name == self.turning and index >= self.turns_at else self.weight

    def group(self, index: int) -> Group:
        draw = np.random.default_rng([self.seed, 2, index])
        prompt = PROMPTS[int(draw.integers(len(PROMPTS)))]
        texts = [" ".join(f"{x:.3f}" for x in row) for row in draw.normal(size=(SIZE, QUALITIES))]
        completions = tuple(Completion(text, (1,), (-1.0,), (-1.5,), True) for text in texts)
        return Group(f"r-1-{index:06d}", index, prompt, (1,), completions, 0)

    def votes(self, group: Group) -> GroupRanked:
        """Twelve votes that err as Bradley and Terry say, the same whenever they are asked for."""
        draw = np.random.default_rng([self.seed, 3, group.index])
        scores = qualities(c.text for c in group.completions) @ self.of(topic(group.prompt), group.index)
        wins = np.zeros((SIZE, SIZE))
        for _ in range(VOTES):
            i, j = draw.choice(SIZE, 2, replace=False)
            first = draw.random() < 1 / (1 + np.exp(scores[j] - scores[i]))
            wins[(i, j) if first else (j, i)] += 1
        rows = tuple(tuple(row) for row in wins.tolist())
        return GroupRanked(group_id=group.id, source="item:i", wins=rows, latency_s=1.0, complete=True)

    def agreement(self, heads: Heads, name: str, index: int) -> float:
        """Share of fresh pairs of a topic that the model orders as people would, if they never erred."""
        one, other = np.random.default_rng([self.seed, 4]).normal(size=(2, 1000, QUALITIES))
        said = heads.rewards(placed(name, one)) - heads.rewards(placed(name, other))
        return float((((one - other) @ self.of(name, index)) * said.mean(1) > 0).mean())


class Topical(RewardModel):
    """Knows topics apart, and likes in all of them what people liked at first."""

    def __init__(self, taste: Taste) -> None:
        self.about = About()
        self.model = nn.Module()
        self.model.score = nn.Linear(len(TOPICS) * QUALITIES, 1, bias=False)
        with torch.no_grad():
            self.model.score.weight.copy_(torch.from_numpy(np.tile(taste.weight, len(TOPICS))[None]))

    def features(self, texts: Sequence[Text]) -> list[Array]:
        return [placed(topic(Prompt("", tuple(messages))), qualities(completions)) for messages, completions in texts]


@dataclass
class People:
    """They answer after `delay` more groups."""

    taste: Taste
    journal: Callable[[Event], object]
    delay: int
    waiting: list[tuple[int, Group]] = field(default_factory=list)
    looks: int = 0

    def submit(self, group: Group) -> None:
        self.journal(GroupIntended(group_id=group.id, key=group.id))
        self.waiting.append((self.looks + self.delay, group))

    def resume(self, groups: Iterable[GroupState]) -> None:
        for state in groups:
            if state.open and state.asks:
                self.waiting.append((self.looks + self.delay, state.sampled.group()))
            elif state.open:
                self.submit(state.sampled.group())

    def collect(self) -> list[RankedGroup | Unranked]:
        self.looks += 1
        decided: list[RankedGroup | Unranked] = []
        while self.waiting and self.waiting[0][0] < self.looks:
            _, group = self.waiting.pop(0)
            event = self.taste.votes(group)
            self.journal(event)
            decided.append(event.ranked(group))
        return decided

    def status(self) -> dict[str, float]:
        return {}


class World:
    """A process of a run with hybrid feedback, gone on from what is on disk."""

    def __init__(
        self,
        taste: Taste,
        disk: Disk,
        folder: Path,
        *,
        selection: Selection | None = None,
        drift: Drift | None = None,
        delay: int = 6,
    ) -> None:
        self.taste, self.disk = taste, disk
        self.clusters = Clusters(PROMPTS, len(TOPICS), Prompts(PROMPTS, "words"), taste.seed)
        self.watch = DriftWatch(drift, self.clusters) if drift is not None else None
        self.live = LiveModel(Topical(taste))
        refit = partial(refit_heads, seed=taste.seed)
        self.refresher = Refresher(self.live, refit, Refresh(), taste.seed, RunDir(folder), disk.append)
        self.people = People(taste, self._journal, delay)
        self.feedback = HybridFeedback(
            self.people,
            Chooser(selection or Selection(), taste.seed, watch=self.watch),
            self.live,
            disk.append,
            refresher=self.refresher,
            watch=self.watch,
        )
        self.agreement: list[float] = []
        """In the turning topic, after each group."""
        self.feedback.resume(disk.state(), list(disk.entries))

    def _journal(self, event: Event) -> None:
        self.disk.append(event)
        self.refresher.note(event)

    def run(self, groups: int, enough: float | None = None) -> World:
        """Sample up to so many groups, or until the model agrees so far with people again after the turn."""
        self.feedback.collect()
        for index in range(self.disk.state().next_index, groups):
            group = self.taste.group(index)
            self.disk.append(GroupSampled.of(group))
            self.feedback.submit(group)
            self.feedback.collect()
            self.agreement.append(self.taste.agreement(self.live.heads, self.taste.turning, index))
            if enough is not None and index >= self.taste.turns_at and self.agreement[-1] >= enough:
                break
        return self

    @property
    def found(self) -> list[DriftFound]:
        return self.disk.of(DriftFound)

    @property
    def turned(self) -> int:
        """The cluster of the turning topic."""
        return next(self.clusters(prompt) for prompt in PROMPTS if topic(prompt) == self.taste.turning)

    @property
    def votes_since_the_turn(self) -> int:
        """Votes bought on groups sampled since."""
        asked = [event.group_id for event in self.disk.of(GroupChosen) if event.people]
        return VOTES * sum(int(group_id[-6:]) >= self.taste.turns_at for group_id in asked)
