"""One more look at items whose group is decided: votes that came after it are kept, and never trained on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_cli.feedback.figures import Figures
from rlhf_cli.feedback.items import Shown
from rlhf_cli.flow.base import BadAnswer, Flow, ItemStatus
from rlhf_cli.journal.events import Event, SnapshotContradicted, VotesLate
from rlhf_cli.types import WinMatrix

AT_ONCE = 8
TOGETHER_S = 10.0
"""What falls due within this time shares the request for the states."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was known of an item when its group was decided."""

    shown: Shown
    item_id: str
    wins: WinMatrix
    due: float
    """Clock time of the look, seconds."""
    unseen_votes: float = 0.0
    """Counted as paid although the service did not show which they were."""


class LateLooks:
    """Items to look at once more, each once."""

    def __init__(
        self,
        flow: Flow,
        flow_id: str,
        journal: Callable[[Event], object],
        note: Callable[[str], None],
        figures: Figures,
        clock: Callable[[], float],
    ) -> None:
        self._flow, self._flow_id, self._journal, self._note = flow, flow_id, journal, note
        self._figures, self._clock = figures, clock
        self._waiting: list[Seen] = []
        self._at_once = asyncio.Semaphore(AT_ONCE)

    def add(self, seen: Seen) -> None:
        self._waiting.append(seen)

    async def look(self, *, ahead_s: float = 0.0) -> None:
        """Look at what is due, or will be within `ahead_s`; nothing is asked of the service while nothing is due."""
        soonest = self._clock() + ahead_s
        if not any(seen.due <= soonest for seen in self._waiting):
            return
        soon = max(soonest, self._clock() + TOGETHER_S)
        due = [seen for seen in self._waiting if seen.due <= soon]
        statuses = await self._flow.statuses(self._flow_id, [seen.item_id for seen in due])
        self._waiting = [seen for seen in self._waiting if seen.due > soon]
        for result in await asyncio.gather(
            *(self._look_at(seen, statuses.get(seen.item_id)) for seen in due), return_exceptions=True
        ):
            if isinstance(result, BaseException):
                raise result

    async def _look_at(self, seen: Seen, status: ItemStatus | None) -> None:
        if status is None or (not seen.unseen_votes and status.votes == seen.wins.votes):
            return
        if not status.state.terminal and seen.wins.votes:
            self._contradicted(seen, f"it had ended and is {status.state} again")
        async with self._at_once:
            try:
                wins = await self._flow.vote_matrix(seen.item_id, seen.shown.texts)
            except BadAnswer as error:
                if seen.wins.votes:
                    self._contradicted(seen, f"its votes could be read before, now: {error}")
                return
        if wins is None:
            return
        more = wins.wins - seen.wins.wins
        if (more < 0).any():
            self._contradicted(seen, f"it had {seen.wins.votes:g} votes and now has {wins.votes:g}", wins)
        elif more.any():
            late = WinMatrix(more)
            rows = seen.shown.rows(late)
            self._journal(VotesLate(group_id=seen.shown.group_id, item_id=seen.item_id, wins=rows))
            self._figures.late += late.votes
            self._figures.votes += max(0.0, late.votes - seen.unseen_votes)

    def _contradicted(self, seen: Seen, what: str, wins: WinMatrix | None = None) -> None:
        rows = None if wins is None else seen.shown.rows(wins)
        self._journal(SnapshotContradicted(group_id=seen.shown.group_id, item_id=seen.item_id, what=what, wins=rows))
        self._note(f"The service contradicts itself about item {seen.item_id}: {what}. What it said first counts.")
