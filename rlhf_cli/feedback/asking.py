"""Asking people about groups, in one asyncio loop: buy an item, watch it, take its votes once.

What happened goes to the journal before anybody acts on it. The parts: `buying` makes exactly one item, `doubles` finds
those a service made besides, `late` looks once more after the decision.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.feedback.buying import Buyer
from rlhf_cli.feedback.doubles import Sold, unknown_items
from rlhf_cli.feedback.figures import Figures
from rlhf_cli.feedback.items import Asked, Item, Shown, as_rows
from rlhf_cli.feedback.late import LateLooks, Seen
from rlhf_cli.feedback.recall import DECIDED, DOUBLED, ended_early, item_ids, item_of, seen_of, sold_by
from rlhf_cli.flow.base import BadAnswer, Flow, FlowSpec, ItemState, ItemStatus
from rlhf_cli.journal.events import (
    Event,
    GroupRanked,
    GroupSetAside,
    ItemDoubled,
    ItemEnded,
    ItemStopped,
    SnapshotContradicted,
)
from rlhf_cli.journal.replay import Ask, GroupState
from rlhf_cli.ranking.stopping import judge_best
from rlhf_cli.types import Group, RankedGroup, Segment, Unranked

Incomplete = Literal["use", "drop", "resubmit_once"]

DRAIN_S = 60.0
"""How long after its time to live a service may take to end an item before we stop it ourselves."""
SLACK_S = 30.0
"""How long an item may then still go without an outcome."""
SWEEP_S = 30.0
"""Time between two sweeps for items that the journal does not know."""
CLOSING_S = 5.0
"""How long the last look at the end of a run may take."""
AT_ONCE = 8
BAD_ANSWERS_IN_A_ROW = 3
SLOWEST_POLL = 4.0
"""Longest time between two looks, in multiples of `poll_s`."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How to ask; see `VotesFeedback` for the meaning of each."""

    run_id: str
    incomplete: Incomplete = "use"
    stop_when_decided: float | None = None
    settle_s: float = 10.0
    poll_s: float = 1.0


class Asking:
    """The asking of one run in one flow; everything here runs in one event loop.

    Args:
        decided: Takes every outcome, once, after it is in the journal.
        clock: Seconds that never jump; all deadlines are on it.
        wall: Unix time, only to say how long earlier processes had waited.
    """

    def __init__(
        self,
        flow: Flow,
        flow_id: str,
        spec: FlowSpec,
        terms: Terms,
        journal: Callable[[Event], object],
        decided: Callable[[RankedGroup | Unranked], None],
        figures: Figures,
        *,
        note: Callable[[str], None],
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._flow, self._flow_id, self._spec, self._terms = flow, flow_id, spec, terms
        self._journal, self._deliver, self._figures, self._note = journal, decided, figures, note
        self._clock, self._wall = clock, wall
        self._buyer = Buyer(flow, flow_id, terms.run_id, spec.ttl_s, terms.settle_s, journal)
        self._late = LateLooks(flow, flow_id, journal, note, figures, clock)
        self._asked: dict[str, Asked] = {}
        self._sold: dict[str, Sold] = {}
        self._sweep_at = clock()
        self._interval_s = terms.poll_s
        self._jitter = random.Random(terms.run_id)
        self._bad_matrices = 0
        self._buying, self._looking = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[object]] = set()
        self._end = asyncio.Event()
        self._failure: BaseException | None = None

    # From the outside.

    @property
    def in_vote(self) -> int:
        """Groups that people are voting on."""
        return len(self._asked)

    async def check(self) -> None:
        """Make sure that the service can do what was asked of it, before anything is paid.

        Raises:
            FlowRefused: It cannot.
        """
        can = await self._flow.capabilities()
        if self._spec.segments and not can.segments:
            raise FlowRefused(
                "run_online.segments lets raters mark spans, but this service has no such thing. "
                "Leave the section out, or vote at a server of ours (`rlhf serve`)."
            )
        if self._terms.stop_when_decided is not None and not can.live_votes:
            raise FlowRefused(
                "flow.stop_when_decided ends an item once its votes have decided the ranking, but this service shows "
                "no votes before an item's end. Leave the key out, or vote at a service that shows them."
            )

    def begin(self, group: Group, known: GroupState | None = None) -> None:
        """Ask about `group`, or go on with what the journal knows of it."""
        self._start(self._ask(group, known))

    def remember(self, known: GroupState) -> None:
        """Keep an eye on the items of a group that was decided by an earlier process."""
        shown = self._remember(known)
        self._figures.set_aside += known.set_aside is not None
        self._figures.late += sum(late.matrix().votes for late in known.late)
        if known.ranked is not None and any(ended_early(known, ask.item_id) for ask in known.asks):
            self._figures.saved += max(0.0, self._spec.responses.desired - known.ranked.matrix().votes)
        if known.decided_at is not None and self._wall() - known.decided_at <= 2 * DRAIN_S:
            self._stop_doubles(known)
            for item_id in item_ids(known):
                self._late.add(seen_of(known, shown, item_id, due=self._clock()))

    async def run(self) -> None:
        """Ask until `end` is called; raises what made it impossible."""
        self._start(self._poll())
        await self._end.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        await self._last_look()

    def end(self) -> None:
        """Items that people still vote on stay open, for a later resume."""
        self._end.set()

    # Tasks.

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        if self._end.is_set():
            work.close()  # the group stays as the journal has it
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error
            self._end.set()

    async def _last_look(self) -> None:
        try:
            async with asyncio.timeout(CLOSING_S):
                if self._sold:
                    await self._sweep()  # first: votes on what it finds are looked at below
                await self._late.look(ahead_s=DRAIN_S)
        except (TimeoutError, FlowUnavailable, FlowRefused, CredentialsError) as error:
            self._note(f"Could not look for late votes at the end: {error or 'no answer in time'}")
        self._publish()

    # Buying.

    async def _ask(self, group: Group, known: GroupState | None) -> None:
        shown = Shown.of(group.id, [c.text for c in group.completions])
        if len(shown.texts) < 2:
            why = "fewer than two different completions that are not empty: nothing to compare"
            unranked = self._set_aside(group, why)
            self._publish()
            self._deliver(unranked)
            return
        asked = Asked(group, shown, self._clock(), waited_s=0.0)
        if known is not None:
            self._recall(asked, known)
        await self._buy(asked, known.ask if known else Ask(), known)
        if asked.over:
            self._decide(asked)

    def _recall(self, asked: Asked, known: GroupState) -> None:
        """Items of earlier asks, those made besides, and what was seen of them."""
        self._remember(known)
        asked.asks = max(1, len(known.asks))
        if known.asks and known.asks[0].submitted_at is not None:
            asked.waited_s = max(0.0, self._wall() - known.asks[0].submitted_at)
        for item_id in item_ids(known):
            if item_id != known.item_id:  # that one comes from the buyer
                asked.items.append(item_of(known, asked.shown, item_id, self._clock()))
        self._stop_doubles(known)

    def _stop_doubles(self, known: GroupState) -> None:
        """End those that an earlier process had found and not stopped yet."""
        stopped = {stop.item_id for stop in known.stopped}
        for double in known.doubles:
            for item_id in double.item_ids[1:]:
                if item_id not in stopped:
                    self._start(self._stop(known.sampled.group_id, item_id, DOUBLED))

    def _remember(self, known: GroupState) -> Shown:
        shown = Shown.of(known.sampled.group_id, [c.text for c in known.sampled.completions])
        self._sold |= sold_by(known, shown)
        self._figures.doubles += sum(len(double.item_ids) > 1 for double in known.doubles)
        self._figures.orphans += len(known.doubles)
        return shown

    async def _buy(self, asked: Asked, ask: Ask, known: GroupState | None = None) -> None:
        asked.buying = True
        async with self._buying:
            dataset_id, item_id = await self._buyer.item_of(asked.group, asked.shown.texts, ask, asked.asks)
        asked.buying = False
        now = self._clock()
        asked.items.append(item_of(known, asked.shown, item_id, now) if known else Item(item_id, now, seen_at=now))
        self._sold.setdefault(dataset_id, Sold(asked.shown, set())).item_ids.add(item_id)
        self._asked[asked.group.id] = asked
        self._interval_s = self._terms.poll_s

    async def _ask_again(self, asked: Asked) -> None:
        await self._buy(asked, Ask())

    # Watching.

    async def _poll(self) -> None:
        bad_answers = 0
        while True:
            await asyncio.sleep(self._interval_s * self._jitter.uniform(0.9, 1.1))
            changed = False
            try:
                changed = await self._look() if self._asked else False
                await self._late.look()
                if self._sold and self._clock() >= self._sweep_at:
                    await self._sweep()
                bad_answers = 0
            except BadAnswer as error:
                bad_answers += 1
                if bad_answers >= BAD_ANSWERS_IN_A_ROW:
                    raise
                self._note(f"{error} Looking again.")
            self._figures.tick(self._clock(), self._running())
            slower_s = min(1.5 * self._interval_s, SLOWEST_POLL * self._terms.poll_s)
            self._interval_s = self._terms.poll_s if changed else slower_s

    async def _look(self) -> bool:
        """Ask once how all items stand and take the votes of those that ended; True if anything moved."""
        watched = [(asked, item) for asked in self._asked.values() for item in asked.items if not item.over]
        statuses = await self._flow.statuses(self._flow_id, [item.item_id for _, item in watched])
        before = [(item.state, item.votes) for _, item in watched]
        results = await asyncio.gather(
            *(self._follow(asked, item, statuses.get(item.item_id)) for asked, item in watched), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return before != [(item.state, item.votes) for _, item in watched]

    async def _follow(self, asked: Asked, item: Item, status: ItemStatus | None) -> None:
        """Act on how an item stands now; None where the service does not know it."""
        if status is None:
            # A service may take a moment to show what it has just made, and a list may skip a row while it moves.
            item.missed += 1
            if item.missed > 1 and self._clock() - item.seen_at > self._terms.settle_s + self._terms.poll_s:
                self._lose(asked, item, f"the service no longer knows item {item.item_id}")
            return
        votes = item.votes if status.votes is None else float(status.votes)
        grown = votes > item.votes
        if votes < item.votes:
            self._contradicted(asked, item, f"it had {item.votes:g} votes and now has {votes:g}")
        if item.state is not None and item.state.terminal and not status.state.terminal:
            self._contradicted(asked, item, f"it was {item.state} and is {status.state} again")
        item.state, item.votes, item.seen_at, item.missed = status.state, votes, self._clock(), 0
        async with self._looking:
            if status.state.terminal:
                await self._take(asked, item, status)
            elif item.hurried_at is not None or self._clock() - item.since > self._spec.ttl_s + DRAIN_S:
                await self._hurry(asked, item)
            elif grown and not item.decided_early:
                await self._stop_if_decided(asked, item)

    async def _hurry(self, asked: Asked, item: Item) -> None:
        """End an item that its service forgot to end, by our own clock: theirs may be off."""
        now = self._clock()
        if item.hurried_at is None:
            item.hurried_at = now  # with or without success it has the slack to end by itself
            await self._stop(asked.group.id, item.item_id, "its time to live was long over")
        elif now - item.hurried_at > SLACK_S:
            why = f"item {item.item_id} was still {item.state} long after its time to live and could not be stopped"
            self._lose(asked, item, why)

    async def _stop_if_decided(self, asked: Asked, item: Item) -> None:
        """Save votes where those so far have decided which completion is best."""
        threshold, least = self._terms.stop_when_decided, self._spec.responses.min
        if threshold is None or item.votes < least:
            return
        try:
            wins = await self._flow.vote_matrix(item.item_id, asked.shown.texts, partial=True)
        except BadAnswer as error:
            self._note(f"{error} The item goes on.")  # its end will tell
            return
        if wins is not None and judge_best(wins, least, threshold).stop:
            item.decided_early = await self._stop(asked.group.id, item.item_id, DECIDED)

    async def _stop(self, group_id: str, item_id: str, reason: str) -> bool:
        try:
            await self._flow.stop(item_id)
        except FlowRefused as error:
            self._note(f"Item {item_id} could not be stopped: {error}")
            return False
        self._journal(ItemStopped(group_id=group_id, item_id=item_id, reason=reason))
        return True

    async def _sweep(self) -> None:
        """Find items of ours that the journal does not know; pool their votes or keep them as late, end all but one."""
        self._sweep_at = self._clock() + SWEEP_S
        for found in unknown_items(await self._flow.newest_items(self._flow_id), self._sold):
            sold = self._sold[found.dataset_id]
            group_id = sold.shown.group_id
            self._journal(ItemDoubled(group_id=group_id, dataset_id=found.dataset_id, item_ids=found.item_ids))
            sold.item_ids.update(found.item_ids)
            self._figures.orphans += len(found.strangers)
            self._figures.doubles += len(found.item_ids) > 1
            self._note(
                f"The service made {len(found.item_ids)} items for group {group_id}: {', '.join(found.item_ids)}. "
                "All but the oldest are stopped, votes on any of them are kept."
            )
            asked = self._asked.get(group_id)
            for status in found.strangers:
                if asked is not None:
                    asked.items.append(Item(status.item_id, self._clock(), seen_at=self._clock()))
                else:
                    due = self._clock() + DRAIN_S
                    self._late.add(Seen(sold.shown, status.item_id, sold.shown.none(), due))
            for item_id in found.to_stop:
                await self._stop(group_id, item_id, DOUBLED)

    # The end of an item, and of the asking about its group.

    async def _take(self, asked: Asked, item: Item, status: ItemStatus) -> None:
        """Take the votes of an item that has ended: the first such snapshot is the one that counts."""
        try:
            wins = await self._flow.vote_matrix(item.item_id, asked.shown.texts)
        except BadAnswer as error:
            item.misread += 1
            if item.misread < BAD_ANSWERS_IN_A_ROW:
                self._note(f"{error} Looking again.")
                return
            self._bad_matrices += 1
            if self._bad_matrices >= BAD_ANSWERS_IN_A_ROW:
                raise FlowRefused(
                    f"{error} This is the {self._bad_matrices}. such answer in a row, so nothing more is paid."
                ) from error
            self._lose(asked, item, str(error))
            return
        self._bad_matrices = 0
        failure = f"item {item.item_id} failed at the service: {status.failure or 'no reason given'}"
        if wins is None:
            if status.state is ItemState.FAILED:
                self._lose(asked, item, failure)
            elif self._too_long(item):
                self._lose(asked, item, f"item {item.item_id} ended {status.state} without showing its votes")
            return
        if status.state is ItemState.FAILED:
            self._note(f"{failure}; {wins.votes:g} votes had come before")
        marks: tuple[Segment, ...] | None = ()
        if self._spec.segments and wins.votes:
            marks = await self._marks(asked, item)
        if marks is None:
            return
        # Together, with nothing to wait for in between: what has ended may be decided about.
        item.ended, item.votes, item.segments = wins, wins.votes, marks
        self._item_over(asked, item)

    async def _marks(self, asked: Asked, item: Item) -> tuple[Segment, ...] | None:
        """What raters marked; None while the service may still come to show it.

        Marks that make no sense are left out, all of them: the votes stand without.
        """
        try:
            marked = await self._flow.segments(item.item_id, asked.shown.texts)
        except BadAnswer as error:
            self._note(f"{error} Its votes train without marks.")
            return ()
        if marked is not None:
            return asked.shown.marks_over_all(marked)
        if not self._too_long(item):
            return None
        self._note(f"item {item.item_id} ended without showing what raters marked. Its votes train without marks.")
        return ()

    def _too_long(self, item: Item) -> bool:
        """Whether what an item's service does not show by now will not come any more."""
        return self._clock() - item.since > self._spec.ttl_s + DRAIN_S + SLACK_S

    def _lose(self, asked: Asked, item: Item, reason: str) -> None:
        item.lost = reason
        self._item_over(asked, item)

    def _item_over(self, asked: Asked, item: Item) -> None:
        self._figures.votes += item.votes
        if len(asked.items) > 1 or (item.ended is None and item.votes):
            self._record_end(asked, item)
        if asked.over:
            self._decide(asked)

    def _record_end(self, asked: Asked, item: Item) -> None:
        """Keep what was paid for, where the group's own entry in the journal will not say it, or not yet."""
        if not item.recorded:
            rows = None if item.ended is None else asked.shown.rows(item.ended)
            state = str(item.state or ItemState.PENDING)
            self._journal(
                ItemEnded(
                    group_id=asked.group.id,
                    item_id=item.item_id,
                    state=state,
                    votes=item.votes,
                    wins=rows,
                    segments=as_rows(item.segments),
                )
            )
            item.recorded = True

    def _decide(self, asked: Asked) -> None:
        """All items of a group are over: rank it, ask once more, or set it aside, with the reason."""
        wins, least = asked.votes(), self._spec.responses.min
        ended = [item for item in asked.items if item.ended is not None]
        complete = wins.votes >= least or any(i.state is ItemState.COMPLETED for i in ended)
        enough = complete and wins.votes > 0
        once_more = self._terms.incomplete == "resubmit_once" and asked.asks == 1
        # An item that is only out of sight may come back: then two would be open.
        if not enough and once_more and all(item.closed for item in asked.items):
            for item in asked.items:
                self._record_end(asked, item)
            asked.asks, asked.buying = 2, True
            self._start(self._ask_again(asked))
        elif wins.votes == 0:
            lost = [item.lost for item in asked.items if item.lost is not None]
            unranked = self._set_aside(asked.group, "; ".join(lost) or f"no votes on item {asked.names()}")
            self._asked_out(asked, incomplete=not lost)
            self._deliver(unranked)
        elif complete or self._terms.incomplete != "drop":
            ranked = self._record(asked, complete)
            self._figures.decided += 1
            self._asked_out(asked, incomplete=not complete)
            self._deliver(ranked)
        else:
            # In this order, whatever dies in between, votes that the policy drops are kept and never trained on.
            for item in asked.items:
                self._record_end(asked, item)
            why = f"only {wins.votes:g} of at least {least} votes on item {asked.names()}"
            unranked = self._set_aside(asked.group, why)
            self._record(asked, complete)
            self._asked_out(asked, incomplete=True)
            self._deliver(unranked)

    def _record(self, asked: Asked, complete: bool) -> RankedGroup:
        """Keep votes that were paid for, whether they will train or not."""
        source, latency_s = f"item:{asked.names()}", asked.waited_s + self._clock() - asked.since
        wins = asked.shown.over_all(asked.votes())
        rows = asked.shown.rows(asked.votes())
        event = GroupRanked(
            group_id=asked.group.id,
            source=source,
            wins=rows,
            latency_s=latency_s,
            complete=complete,
            segments=asked.segments(),
        )
        self._journal(event)
        if any(item.decided_early for item in asked.items):
            self._figures.saved += max(0.0, self._spec.responses.desired - wins.votes)
        self._figures.waited(latency_s)
        return event.ranked(asked.group)

    def _asked_out(self, asked: Asked, *, incomplete: bool) -> None:
        del self._asked[asked.group.id]
        self._figures.ended += 1
        self._figures.incomplete += incomplete
        self._publish()
        for item in asked.items:
            seen, unseen = item.ended or asked.shown.none(), item.votes if item.ended is None else 0.0
            self._late.add(Seen(asked.shown, item.item_id, seen, self._clock() + DRAIN_S, unseen))

    def _set_aside(self, group: Group, reason: str) -> Unranked:
        self._journal(GroupSetAside(group_id=group.id, reason=reason))
        self._figures.set_aside += 1
        self._figures.decided += 1
        return Unranked(group, reason)

    def _contradicted(self, asked: Asked, item: Item, what: str) -> None:
        self._journal(SnapshotContradicted(group_id=asked.group.id, item_id=item.item_id, what=what))
        self._note(f"The service contradicts itself about item {item.item_id}: {what}.")

    def _running(self) -> float:
        return sum(item.votes for asked in self._asked.values() for item in asked.items if not item.over)

    def _publish(self) -> None:
        self._figures.publish(self._running())
