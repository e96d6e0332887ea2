"""What all feedback that answers without delay has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from rlhf_cli.journal.events import Event, GroupRanked, GroupSetAside
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.types import Group, RankedGroup, Unranked


class AnswersAtOnce(ABC):
    """`Feedback` that decides about a group when it is submitted, and journals that before anybody acts on it."""

    def __init__(self, journal: Callable[[Event], object]) -> None:
        self._journal = journal
        self._decided: list[RankedGroup | Unranked] = []

    @abstractmethod
    def submit(self, group: Group) -> None:
        """Decide about `group`, with `_rank` or `_set_aside`."""

    def resume(self, open_groups: Iterable[GroupState]) -> None:
        """Answer groups that an earlier process was about to answer."""
        for state in open_groups:
            self.submit(state.sampled.group())

    def collect(self) -> list[RankedGroup | Unranked]:
        decided, self._decided = self._decided, []
        return decided

    def status(self) -> dict[str, float]:
        return {}

    def _rank(self, group: Group, ranked: GroupRanked) -> None:
        self._journal(ranked)
        self._decided.append(ranked.ranked(group))

    def _set_aside(self, group: Group, reason: str) -> None:
        self._journal(GroupSetAside(group_id=group.id, reason=reason))
        self._decided.append(Unranked(group, reason))
