"""People compare the completions: every group becomes one item at a flow service, never two.

The asking runs in a thread of its own with an asyncio loop, so the trainer never waits for it. What happened goes to
the journal before anybody acts on it. Buying exactly one item per group is in `buying`.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_cli.errors import FlowRefused
from rlhf_cli.feedback.buying import Buyer, Known
from rlhf_cli.feedback.figures import Figures
from rlhf_cli.flow.base import BadAnswer, Flow, FlowSpec, ItemState, ItemStatus
from rlhf_cli.journal.events import Event, GroupRanked, GroupSetAside
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.types import Group, RankedGroup, Unranked, WinMatrix

DRAIN_S = 60.0
"""How long after its time to live a service may take to end an item before we stop it ourselves."""
SLACK_S = 30.0
"""How long an item may then still go without an outcome."""
ASKING_AT_ONCE = 8
BAD_ANSWERS_IN_A_ROW = 3
SLOWEST_POLL = 4.0
"""Longest time between two looks, in multiples of `poll_s`."""


class VotesFeedback:
    """`Feedback` by people, or by whoever votes at a flow service.

    Args:
        connect: Makes the client; called in the thread that uses it.
        flow_id: The open flow that items go to.
        spec: What that flow asks.
        journal: Puts an event on disk before it returns; called from the asking thread.
        run_id: Makes the keys of this run's items its own.
        incomplete: What becomes of an item that ended below the minimum: its votes are used, or it is set aside.
        settle_s: How long a service without idempotency keys may take to list an item that it made.
        poll_s: Seconds between two looks at the items while something happens; up to four times that otherwise.
        votes_before: Votes that earlier processes of the run brought in, for `flow/votes_total`.
        clock: Seconds that never jump.
    """

    def __init__(
        self,
        connect: Callable[[], Flow],
        flow_id: str,
        spec: FlowSpec,
        journal: Callable[[Event], object],
        *,
        run_id: str,
        incomplete: Literal["use", "drop"] = "use",
        settle_s: float = 10.0,
        poll_s: float = 1.0,
        votes_before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._flow_id = flow_id
        self._spec = spec
        self._journal = journal
        self._run_id = run_id
        self._incomplete = incomplete
        self._settle_s = settle_s
        self._poll_s = poll_s
        self._clock = clock
        self._jitter = random.Random(run_id)
        self._figures = Figures(votes=votes_before)
        self._decided: queue.SimpleQueue[RankedGroup | Unranked] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._begun = 0
        self._asked: dict[str, _Asked] = {}
        self._bad_answers = 0
        self._interval_s = poll_s
        self._asking = asyncio.Semaphore(ASKING_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._end = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rlhf-votes", daemon=True)
        self._thread.start()

    # The trainer's side; none of this waits for the network.

    def submit(self, group: Group) -> None:
        self._begin(group, Known())

    def resume(self, open_groups: Iterable[GroupState]) -> None:
        """Go on with groups that an earlier process was asking about, from what the journal knows of each."""
        for state in open_groups:
            known = Known(state.ask.key, state.ask.dataset_id, state.ask.item_id, state.ask.submitted_at)
            self._begin(state.sampled.group(), known)

    def collect(self) -> list[RankedGroup | Unranked]:
        decided: list[RankedGroup | Unranked] = []
        while not self._decided.empty():
            decided.append(self._decided.get_nowait())
        if self._failure is not None and not decided:
            raise self._failure
        return decided

    def status(self) -> dict[str, float]:
        running = sum(asked.votes for asked in list(self._asked.values()))
        return {"flow/in_flight": float(self._begun - self._figures.decided), **self._figures.rows(running)}

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def _begin(self, group: Group, known: Known) -> None:
        self._begun += 1
        self._loop.call_soon_threadsafe(lambda: self._start(self._ask(group, known)))

    # The asking thread.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        try:
            self._flow = self._connect()
            self._buyer = Buyer(
                self._flow, self._flow_id, self._run_id, self._spec.ttl_s, self._settle_s, self._journal
            )
        except Exception as error:
            self._fail(error)
            await self._end.wait()
            return
        self._start(self._poll())
        await self._end.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._flow.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        if self._failure is not None or self._end.is_set():
            work.close()  # the group stays as the journal has it, for a later resume
            return
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The asking is over; `collect` tells why."""
        if self._failure is None:
            self._failure = error
            for task in self._tasks:
                task.cancel()

    async def _ask(self, group: Group, known: Known) -> None:
        shown = distinct(group)
        if len(shown) < 2:
            self._set_aside(group, "fewer than two different completions that are not empty: nothing to compare")
            return
        async with self._asking:
            item_id = await self._buyer.item_of(group, shown_texts(group, shown), known)
        waited_s = 0.0 if known.submitted_at is None else max(0.0, time.time() - known.submitted_at)
        self._asked[item_id] = _Asked(group, shown, item_id, since=self._clock(), waited_s=waited_s)
        self._interval_s = self._poll_s

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * self._jitter.uniform(0.9, 1.1))
            changed = await self._look() if self._asked else False
            self._interval_s = self._poll_s if changed else min(1.5 * self._interval_s, SLOWEST_POLL * self._poll_s)

    async def _look(self) -> bool:
        """Ask once how all items stand and take the votes of those that ended; True if anything moved."""
        asked_before = list(self._asked.values())
        statuses = await self._flow.statuses(self._flow_id, [asked.item_id for asked in asked_before])
        changed, ended = False, []
        for asked in asked_before:
            status = statuses.get(asked.item_id)
            if status is None:
                # A service may take a moment to show what it has just made.
                if self._clock() - asked.since > self._settle_s + self._poll_s:
                    self._give_up(asked, f"the service no longer knows item {asked.item_id}")
                continue
            changed |= (status.state, status.votes or 0) != (asked.state, asked.votes)
            asked.state, asked.votes = status.state, status.votes or 0
            if status.state.terminal:
                ended.append(self._conclude(asked, status))
            else:
                await self._hurry(asked)
        await asyncio.gather(*ended)
        self._figures.tick(self._clock(), sum(asked.votes for asked in self._asked.values()))
        return changed

    async def _hurry(self, asked: _Asked) -> None:
        """End an item that its service forgot to end, by our own clock: theirs may be off."""
        now = self._clock()
        if asked.stopped_at is not None:
            if now - asked.stopped_at > SLACK_S:
                why = (
                    f"item {asked.item_id} was still {asked.state} long after its time to live and could not be stopped"
                )
                self._give_up(asked, why)
        elif now - asked.since > self._spec.ttl_s + DRAIN_S:
            asked.stopped_at = now
            try:
                await self._flow.stop(asked.item_id)
            except FlowRefused:
                return  # then it has the slack to end by itself

    async def _conclude(self, asked: _Asked, status: ItemStatus) -> None:
        """Take the votes of an item that has ended: the first such snapshot is the one that counts."""
        try:
            wins = await self._flow.vote_matrix(asked.item_id, shown_texts(asked.group, asked.shown))
        except BadAnswer as error:
            self._bad_answers += 1
            if self._bad_answers >= BAD_ANSWERS_IN_A_ROW:
                raise  # not one odd item but a service that we do not understand: stop paying it
            self._give_up(asked, str(error))
            return
        self._bad_answers = 0
        least = self._spec.responses.min
        if wins is None:
            if status.state is ItemState.FAILED:
                self._give_up(
                    asked, f"item {asked.item_id} failed at the service: {status.failure or 'no reason given'}"
                )
            elif self._clock() - asked.since > self._spec.ttl_s + DRAIN_S + SLACK_S:
                self._give_up(asked, f"item {asked.item_id} ended {status.state} without showing its votes")
            return
        complete = status.state is ItemState.COMPLETED or wins.votes >= least
        if wins.votes == 0:
            self._give_up(asked, f"no votes on item {asked.item_id}", incomplete=True)
            return
        wins = spread(wins, asked.shown, len(asked.group.completions))
        if complete or self._incomplete == "use":
            ranked = self._record(asked, wins, complete)
            self._figures.decided += 1
            self._done(asked, incomplete=not complete)
            self._decided.put(ranked)
        else:
            # Set aside first: whatever dies in between, votes that the policy drops are never trained on.
            why = f"only {wins.votes:g} of at least {least} votes on item {asked.item_id}"
            self._give_up(asked, why, incomplete=True)
            self._record(asked, wins, complete)

    def _record(self, asked: _Asked, wins: WinMatrix, complete: bool) -> RankedGroup:
        """Keep votes that were paid for, whether they will train or not."""
        source, latency_s = f"item:{asked.item_id}", asked.waited_s + self._clock() - asked.since
        rows = tuple(tuple(row) for row in wins.wins.tolist())
        self._journal(
            GroupRanked(group_id=asked.group.id, source=source, wins=rows, latency_s=latency_s, complete=complete)
        )
        self._figures.votes += wins.votes
        self._figures.latencies_s.append(latency_s)
        return RankedGroup(asked.group, wins, source, latency_s, complete)

    def _give_up(self, asked: _Asked, reason: str, *, incomplete: bool = False) -> None:
        self._set_aside(asked.group, reason)
        self._done(asked, incomplete=incomplete)

    def _done(self, asked: _Asked, *, incomplete: bool) -> None:
        self._figures.ended += 1
        self._figures.incomplete += incomplete
        del self._asked[asked.item_id]

    def _set_aside(self, group: Group, reason: str) -> None:
        self._journal(GroupSetAside(group_id=group.id, reason=reason))
        self._figures.set_aside += 1
        self._figures.decided += 1
        self._decided.put(Unranked(group, reason))


def distinct(group: Group) -> tuple[int, ...]:
    """Indices of the completions worth showing: the first of each text; empty ones and repetitions are left out."""
    first: dict[str, int] = {}
    for index, completion in enumerate(group.completions):
        text = completion.text.strip()
        if text:
            first.setdefault(text, index)
    return tuple(first.values())


def shown_texts(group: Group, shown: Sequence[int]) -> list[str]:
    """What raters read, and what the service calls the completions by."""
    return [group.completions[index].text.strip() for index in shown]


def spread(wins: WinMatrix, shown: Sequence[int], size: int) -> WinMatrix:
    """The votes on the `shown` completions in a matrix over all `size`; those not shown have none."""
    whole = np.zeros((size, size))
    whole[np.ix_(shown, shown)] = wins.wins
    return WinMatrix(whole)


@dataclass(slots=True)
class _Asked:
    """An item people are voting on."""

    group: Group
    shown: tuple[int, ...]
    item_id: str
    since: float
    """Clock time at which this process began to wait, seconds."""
    waited_s: float
    """How long earlier processes had waited."""
    votes: int = 0
    state: ItemState | None = None
    stopped_at: float | None = None
