"""Votes of a recorded run, given again to the same completions: a run without people that takes the same steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rlhf_cli.errors import DataError
from rlhf_cli.feedback.at_once import AnswersAtOnce
from rlhf_cli.journal.events import Event, GroupSampled
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import GroupState, RunState, replay
from rlhf_cli.types import Group


@dataclass(frozen=True, slots=True)
class Batch:
    """Groups that were sampled together, by the policy as it was after so many steps."""

    first: int
    """Index of its first group."""
    count: int
    policy_step: int


@dataclass(frozen=True, slots=True)
class Recording:
    """What the journal of a run says about its groups, by their index."""

    path: Path
    state: RunState

    @classmethod
    def read(cls, path: Path) -> Recording:
        """The recording in the journal at `path`, of a run that may have ended in any way.

        Raises:
            DataError: There is none, or no group in it.
            RunDamaged: As `journal.read`.
        """
        state = replay(read(path))
        if not state.groups:
            raise DataError(f"{path}: holds no group that votes were asked for; there is nothing to replay")
        return cls(path, state)

    @property
    def groups(self) -> dict[int, GroupState]:
        return {group.sampled.index: group for group in self.state.groups.values()}

    @property
    def steps(self) -> dict[int, tuple[int, ...]]:
        """Indices of the groups that each step trained on, in their order."""
        index = {name: group.sampled.index for name, group in self.state.groups.items()}
        return {step: tuple(index[name] for name in event.group_ids) for step, event in self.state.steps.items()}

    def steps_for(self, steps: int) -> dict[int, tuple[int, ...]]:
        """`steps`, where there are enough of them.

        Raises:
            DataError: The recording ends before.
        """
        if len(self.steps) < steps:
            raise DataError(
                f"{self.path}: the recording has {len(self.steps)} steps, run_online.steps is {steps}; "
                f"replay as far as it goes with --set run_online.steps={len(self.steps)}"
            )
        return self.steps

    @property
    def batches(self) -> tuple[Batch, ...]:
        """In the order they were sampled; not those of policies that a roll-back gave up.

        Raises:
            DataError: The recording does not say which groups were sampled together.
        """
        stand = (group.sampled for group in self.state.groups.values() if not group.void)
        sampled = sorted(stand, key=lambda s: s.index)
        batches = []
        for first, together in groupby(sampled, key=lambda s: s.batch):
            if first is None:
                raise DataError(f"{self.path}: too old to replay, it does not say which groups were sampled together")
            members = list(together)
            batches.append(Batch(first, len(members), members[0].policy_step))
        return tuple(batches)


class RecordedFeedback(AnswersAtOnce):
    """Answers with what the recording says about the same prompt and the same completions.

    A group that is not in the recording is set aside with the reason; nothing stands in for its votes.
    """

    def __init__(self, recording: Recording, journal: Callable[[Event], object]) -> None:
        super().__init__(journal)
        self._run_id, self._groups = recording.state.run_id, recording.groups

    def submit(self, group: Group) -> None:
        recorded = self._groups.get(group.index)
        reason = _difference(group, recorded.sampled) if recorded is not None else "sampled fewer groups"
        if recorded is None or reason is not None:
            self._set_aside(group, f"not in the recording, which {reason}")
        elif recorded.set_aside is not None:
            self._set_aside(group, f"set aside in the recording: {recorded.set_aside}")
        elif (ranked := recorded.ranked) is not None:
            source = f"recorded:{self._run_id}/{ranked.source}"
            self._rank(group, ranked.model_copy(update={"group_id": group.id, "source": source}))
        else:
            self._set_aside(group, "the recording ends before this group was decided")


def _difference(group: Group, sampled: GroupSampled) -> str | None:
    """What the recording has otherwise, in words; None where it shows the same prompt and the same completions."""
    prompt = tuple((m.role, m.content) for m in group.prompt.messages)
    if sampled.messages != prompt:
        return f"asks another prompt in group {group.index}"
    texts, recorded = [c.text for c in group.completions], [c.text for c in sampled.completions]
    if len(texts) != len(recorded):
        return f"has {len(recorded)} completions in group {group.index}, not {len(texts)}"
    other = [i for i, (a, b) in enumerate(zip(texts, recorded, strict=True)) if a != b]
    return f"has another completion {other[0]} in group {group.index}" if other else None
