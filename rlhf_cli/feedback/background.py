"""What feedback has in common that is computed elsewhere: a thread of its own in which groups are answered."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cli.journal.events import Event, GroupRanked, GroupSetAside
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.types import Group, RankedGroup, Unranked


@dataclass(frozen=True, slots=True)
class Waiting:
    """A group that was submitted and has no outcome; `since` is on the monotonic clock, seconds."""

    group: Group
    since: float


class InBackground(ABC):
    """`Feedback` whose answers take time: the trainer hands over groups and picks up outcomes, and waits for neither.

    Everything below `_serve` runs in one asyncio loop in a thread that starts with the first group. What is journalled
    there is on disk before the trainer sees it; a group without an outcome stays open for a later resume.
    """

    def __init__(self, journal: Callable[[Event], object]) -> None:
        self._journal = journal
        self._inbox: asyncio.Queue[Waiting] = asyncio.Queue()
        self._decided: queue.SimpleQueue[RankedGroup | Unranked] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._begun = self._ended = self._put_aside = 0
        self._latencies_s: deque[float] = deque(maxlen=256)
        self._latency: dict[str, float] = {}
        self._end = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rlhf-feedback", daemon=True)

    # The trainer's side; none of this waits.

    def submit(self, group: Group) -> None:
        if not self._thread.ident:
            self._thread.start()
        self._begun += 1
        self._loop.call_soon_threadsafe(self._inbox.put_nowait, Waiting(group, time.monotonic()))

    def resume(self, open_groups: Iterable[GroupState]) -> None:
        """Ask again about groups that an earlier process had asked about."""
        for state in open_groups:
            self.submit(state.sampled.group())

    def collect(self) -> list[RankedGroup | Unranked]:
        failure = self._failure  # first: what was decided before it is in the queue
        decided: list[RankedGroup | Unranked] = []
        while not self._decided.empty():
            decided.append(self._decided.get_nowait())
        if failure is not None and not decided:
            raise failure
        return decided

    def status(self) -> dict[str, float]:
        return {
            "flow/in_flight": float(self._begun - self._ended),
            "flow/set_aside_total": float(self._put_aside),
            **self._latency,
        }

    def close(self) -> None:
        """Give up what is under way. Call once, at the end."""
        if self._thread.ident:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
        else:
            self._loop.close()

    # The thread.

    @abstractmethod
    async def _serve(self) -> None:
        """Answer what comes into `_inbox`, with `_rank` or `_set_aside`, until cancelled; an error ends the asking."""

    def _rank(
        self,
        waiting: Waiting,
        source: str,
        wins: object,
        *,
        complete: bool,
        scores: Sequence[float | None] | None = None,
    ) -> None:
        """Journal and hand out what was decided.

        Args:
            wins: (G, G), as in `WinMatrix`.
            scores: (G,), None for a completion that has none; or None.
        """
        latency_s = time.monotonic() - waiting.since
        event = GroupRanked(
            group_id=waiting.group.id,
            source=source,
            wins=tuple(tuple(row) for row in np.asarray(wins, dtype=np.float64).tolist()),
            latency_s=latency_s,
            complete=complete,
            scores=None if scores is None else tuple(scores),
        )
        self._journal(event)
        self._latencies_s.append(latency_s)
        p50, p95 = np.quantile(self._latencies_s, (0.5, 0.95))
        self._latency = {"flow/latency_p50_s": float(p50), "flow/latency_p95_s": float(p95)}
        self._decide(event.ranked(waiting.group))

    def _set_aside(self, waiting: Waiting, reason: str) -> None:
        self._journal(GroupSetAside(group_id=waiting.group.id, reason=reason))
        self._put_aside += 1
        self._decide(Unranked(waiting.group, reason))

    def _decide(self, outcome: RankedGroup | Unranked) -> None:
        self._ended += 1
        self._decided.put(outcome)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_the_end())

    async def _until_the_end(self) -> None:
        serving, ending = asyncio.create_task(self._serve()), asyncio.create_task(self._end.wait())
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            serving.cancel()
        (error,) = await asyncio.gather(serving, return_exceptions=True)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]  # of tasks: the first that failed ended the others
        if not isinstance(error, asyncio.CancelledError):
            self._failure = error  # `collect` tells
        await ending
