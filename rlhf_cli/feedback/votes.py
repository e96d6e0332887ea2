"""People compare the completions: every group becomes one item at a flow service, never two.

The asking runs in a thread of its own with an asyncio loop, so the trainer never waits for it. What happened goes to
the journal before anybody acts on it; `_buy` and `_one_item` are the heart of "no item bought twice".
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlhf_cli.errors import FlowRefused, FlowUnavailable
from rlhf_cli.flow.base import BadAnswer, Flow, FlowSpec, ItemState, ItemStatus
from rlhf_cli.journal.events import DatasetCreated, Event, GroupIntended, GroupRanked, GroupSetAside, GroupSubmitted
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.types import Group, RankedGroup, Unranked, WinMatrix

DRAIN_S = 60.0
"""How long after its time to live a service may take to end an item before we stop it ourselves."""
SLACK_S = 30.0
"""How long an item may then still go without an outcome."""
ASKING_AT_ONCE = 8
CREATE_ATTEMPTS = 5
DATASET_ATTEMPTS = 3
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
        self._figures = _Figures(votes=votes_before)
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
        self._begin(group, _Known())

    def resume(self, open_groups: Iterable[GroupState]) -> None:
        """Go on with groups that an earlier process was asking about, from what the journal knows of each."""
        for state in open_groups:
            known = _Known(state.key, state.dataset_id, state.item_id, state.submitted_at)
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

    def _begin(self, group: Group, known: _Known) -> None:
        self._begun += 1
        self._loop.call_soon_threadsafe(lambda: self._start(self._ask(group, known)))

    # The asking thread.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        try:
            self._flow = self._connect()
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

    async def _ask(self, group: Group, known: _Known) -> None:
        shown = distinct(group)
        if len(shown) < 2:
            self._set_aside(group, "fewer than two different completions that are not empty: nothing to compare")
            return
        async with self._asking:
            item_id = await self._buy(group, known, [group.completions[i].text.strip() for i in shown])
        waited_s = 0.0 if known.submitted_at is None else max(0.0, time.time() - known.submitted_at)
        self._asked[item_id] = _Asked(group, shown, item_id, since=self._clock(), waited_s=waited_s)
        self._interval_s = self._poll_s

    async def _buy(self, group: Group, known: _Known, texts: Sequence[str]) -> str:
        """The id of the one item of `group`.

        Three facts are journalled on the way, each before the next step, so a restart knows where to go on:

        1. intended: nothing exists yet, but from here on it may.
        2. dataset created: all candidates are at the service. Its id is the tag by which the item can be recognised.
        3. submitted: the item's id.
        """
        if known.item_id is not None:
            return known.item_id
        key = known.key
        if key is None:
            key = hashlib.sha256(f"{self._run_id}/{group.id}".encode()).hexdigest()
            self._journal(GroupIntended(group_id=group.id, key=key))
        dataset_id = known.dataset_id
        if dataset_id is None:
            dataset_id = await self._dataset(group, texts, key)
            self._journal(DatasetCreated(group_id=group.id, dataset_id=dataset_id))
        item_id = await self._one_item(group, dataset_id, key, doubt=known.dataset_id is not None)
        self._journal(GroupSubmitted(group_id=group.id, dataset_id=dataset_id, item_id=item_id))
        return item_id

    async def _one_item(self, group: Group, dataset_id: str, key: str, *, doubt: bool) -> str:
        """Create the item of a dataset, unless it exists.

        It may exist whenever there is `doubt`: after a restart, or when the answer to a creation was lost. A service
        with idempotency keys sorts that out itself. With any other: wait until the item would show in the list, adopt
        it if it does, and create it only if it does not.
        """
        has_keys = (await self._flow.capabilities()).idempotency
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            if doubt and not has_keys:
                await asyncio.sleep(self._settle_s)
                if found := await self._flow.find_item(self._flow_id, dataset_id):
                    return found.item_id
            try:
                return await self._flow.create_item(self._flow_id, dataset_id, group.prompt.text, self._spec.ttl_s, key)
            except (FlowUnavailable, BadAnswer):
                if has_keys or attempt == CREATE_ATTEMPTS:
                    raise
                doubt = True
        raise AssertionError("unreachable")

    async def _dataset(self, group: Group, texts: Sequence[str], key: str) -> str:
        """A dataset with all candidates. It costs nothing, so one that may be half filled is left behind."""
        for attempt in range(1, DATASET_ATTEMPTS + 1):
            try:
                dataset_id = await self._flow.create_dataset(f"{self._spec.name} {group.id}", f"{key}-dataset")
                added = await asyncio.gather(
                    *(self._flow.add_datapoint(dataset_id, i, text) for i, text in enumerate(texts)),
                    return_exceptions=True,
                )
                for error in added:
                    if error is not None:
                        raise error
                return dataset_id
            except FlowUnavailable:
                if attempt == DATASET_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

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
        texts = [asked.group.completions[i].text.strip() for i in asked.shown]
        try:
            wins = await self._flow.vote_matrix(asked.item_id, texts)
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


def spread(wins: WinMatrix, shown: Sequence[int], size: int) -> WinMatrix:
    """The votes on the `shown` completions in a matrix over all `size`; those not shown have none."""
    whole = np.zeros((size, size))
    whole[np.ix_(shown, shown)] = wins.wins
    return WinMatrix(whole)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the journal says about a group that is asked about again."""

    key: str | None = None
    dataset_id: str | None = None
    item_id: str | None = None
    submitted_at: float | None = None
    """Unix time, seconds."""


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


@dataclass(slots=True)
class _Figures:
    """What `status` tells; written by the asking thread, read by any."""

    votes: float
    """Delivered, in decided groups."""
    ended: int = 0
    """Items with an outcome."""
    incomplete: int = 0
    decided: int = 0
    """Groups with an outcome, asked about or not."""
    set_aside: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """Clock time and votes, of the last minute."""

    def tick(self, now: float, running: float) -> None:
        self.recent.append((now, self.votes + running))
        while now - self.recent[0][0] > 60:
            self.recent.popleft()

    def rows(self, running: float) -> dict[str, float]:
        """Metrics; what nothing is known about yet is left out."""
        rows = {"flow/votes_total": self.votes + running, "flow/set_aside_total": float(self.set_aside)}
        if self.ended:
            rows["flow/incomplete_frac"] = self.incomplete / self.ended
        if latencies_s := list(self.latencies_s):
            p50, p95 = np.quantile(latencies_s, (0.5, 0.95))
            rows |= {"flow/latency_p50_s": float(p50), "flow/latency_p95_s": float(p95)}
        recent = list(self.recent)
        if len(recent) > 1 and recent[-1][0] > recent[0][0]:
            (start, before), (end, after) = recent[0], recent[-1]
            rows["flow/votes_per_min"] = 60 * (after - before) / (end - start)
        return rows
