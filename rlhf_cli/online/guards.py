"""What holds a policy back: how far it is from the reference, and whether it only learns to write more."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.journal.replay import RunState
from rlhf_cli.learner.scores import group_scores
from rlhf_cli.online.lengths import Scored, correlation_within, slope_within
from rlhf_cli.recipe.online import RunOnline
from rlhf_cli.types import Completion, Group, RankedGroup

ENOUGH = 16
"""Completions that KL and length are judged by at least: a single one is far off by chance."""
ENOUGH_SCORED = 64
"""Completions that the correlation with length is judged by: its standard error is then about an eighth."""

Guard = Literal["kl", "length_growth", "length_correlation"]

_WHAT: dict[Guard, str] = {
    "kl": "KL to the reference is {value:.1f} nats a completion after step {step}, run_online.kl.hard_nats is "
    "{limit:g}",
    "length_growth": "completions after step {step} are {value:.2f} times as long as those of the first step, "
    "run_online.length.max_growth is {limit:g}",
    "length_correlation": "the correlation of score and length within groups is {value:.2f} after step {step}, "
    "run_online.length.max_correlation is {limit:g}",
}


@dataclass(frozen=True, slots=True)
class Trip:
    """A guard that found something beyond its limit, and what the recipe wants done about it."""

    guard: Guard
    value: float
    limit: float
    action: Literal["note", "stop", "rollback"]
    step: int
    """Steps that the policy had taken."""

    def __str__(self) -> str:
        return tripped(self.guard, self.value, self.limit, self.step)


def tripped(guard: str, value: float, limit: float, step: int) -> str:
    """In words."""
    form = next((words for name, words in _WHAT.items() if name == guard), guard)
    return form.format(value=value, limit=limit, step=step)


class RollBack(Exception):
    """Not an error: the loop gives up its latest steps and goes on from a checkpoint before them."""

    def __init__(self, trip: Trip) -> None:
        super().__init__(str(trip))
        self.trip = trip


class Guards:
    """The completions sampled and scored last, and what they say.

    All of it follows from the journal, so that a resumed run judges as the one before would have.
    """

    def __init__(self, online: RunOnline, state: RunState) -> None:
        self._online, self._own = online, online.sampling.own
        step = online.prompts_per_step * online.group_size
        own = sum(role.name in self._own for role in online.sampling.of_group(online.group_size))
        # By group those that the policy sampled as it is: a chosen one, or one of another policy, is no sample of it.
        self._sampled, self._enough = deque[list[Completion]](), max(ENOUGH, online.prompts_per_step * own)
        self._scored, self._enough_scored = deque[Scored](), max(ENOUGH_SCORED, step)
        self._shown = deque[Scored]()
        self._first_chars: list[int] = []
        groups = [g for g in state.groups.values() if not g.void]
        self.sampled(g.sampled.group() for g in groups)
        for g in sorted(groups, key=lambda g: g.ranked_seq):
            if g.ranked is not None and g.ranked_seq >= 0:
                self.ranked(g.ranked.ranked(g.sampled.group()))

    def sampled(self, groups: Iterable[Group]) -> None:
        for group in groups:
            own = [c for c in group.completions if c.role in self._own]
            if group.policy_step == 0:
                self._first_chars += [len(c.text) for c in own]
            self._sampled.append(own)
            size = sum(map(len, self._sampled))
            while size - len(self._sampled[0]) >= self._enough:
                size -= len(self._sampled.popleft())

    def ranked(self, ranked: RankedGroup) -> None:
        per_char = self._online.length.penalty if self._online.length else 0.0
        _keep(self._scored, (group_scores(ranked, per_char).tolist(), _chars(ranked.group)), self._enough_scored)

    def shown(self, group: Group, rewards: list[float]) -> None:
        """Rewards for display, for `length_controlled`."""
        _keep(self._shown, (rewards, _chars(group)), self._enough_scored)

    @property
    def kl_nats(self) -> float | None:
        """KL from the reference a completion, over what was sampled last; None where that is too little to tell."""
        if sum(map(len, self._sampled)) < ENOUGH:
            return None
        return _kl_nats(self._sampled)

    @property
    def kl_latest_nats(self) -> float | None:
        """The same over the groups of one step alone, however few completions those are."""
        latest = list(self._sampled)[-self._online.prompts_per_step :]
        return _kl_nats(latest) if latest else None

    @property
    def growth(self) -> float | None:
        """Mean length of what was sampled last against what the untrained policy sampled, in characters."""
        now = [len(c.text) for own in self._sampled for c in own]
        if len(now) < ENOUGH or len(self._first_chars) < ENOUGH or not any(self._first_chars):
            return None
        return statistics.fmean(now) / statistics.fmean(self._first_chars)

    @property
    def correlation(self) -> float | None:
        """Of score and length within the groups scored last, as the learner sees the scores."""
        if sum(len(chars) for _, chars in self._scored) < ENOUGH_SCORED:
            return None
        return correlation_within(self._scored)

    def length_controlled(self, reward: float, chars: float) -> float | None:
        """What a mean reward would be at the length of the first step, by the slope within groups of rewards shown.

        None where none of these is as short or as long as that: a slope says nothing beyond the lengths it is of.
        """
        lengths = [n for _, chars_G in self._shown for n in chars_G]
        if not self._first_chars or not lengths:
            return None
        first = statistics.fmean(self._first_chars)
        if not min(lengths) <= first <= max(lengths):
            return None
        return reward - slope_within(self._shown) * (chars - first)

    def trips(self, step: int) -> list[Trip]:
        """Guards that are beyond their limits after `step` steps."""
        kl, length = self._online.kl, self._online.length
        found = []
        if kl.hard_nats is not None and (nats := self.kl_nats) is not None and nats > kl.hard_nats:
            found.append(Trip("kl", nats, kl.hard_nats, kl.on_hard, step))
        if length is not None:
            limits: list[tuple[Guard, float | None, float | None]] = [
                ("length_growth", self.growth, length.max_growth),
                ("length_correlation", self.correlation, length.max_correlation),
            ]
            for guard, value, limit in limits:
                if value is not None and limit is not None and value > limit:
                    found.append(Trip(guard, value, limit, length.on_trip, step))
        return found


def _kl_nats(groups: Iterable[list[Completion]]) -> float:
    return statistics.fmean(c.kl_nats for own in groups for c in own)


def _chars(group: Group) -> list[int]:
    return [len(c.text) for c in group.completions]


def _keep(window: deque[Scored], scored: Scored, enough: int) -> None:
    window.append(scored)
    size = sum(len(chars) for _, chars in window)
    while size - len(window[0][1]) >= enough:
        size -= len(window.popleft()[1])
