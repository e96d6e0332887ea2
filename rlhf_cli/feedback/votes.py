"""People compare the completions: every group becomes one item at a flow service, never two.

The asking runs in a thread of its own with an asyncio loop, so the trainer never waits for it, nor for a lock: the two
sides hand each other groups through queues. The asking itself is in `asking`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from rlhf_cli.feedback.asking import DRAIN_S, SLACK_S, Asking, Incomplete, Terms
from rlhf_cli.feedback.figures import Figures
from rlhf_cli.flow.base import Flow, FlowSpec
from rlhf_cli.journal.events import Event
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.types import Group, RankedGroup, Unranked

__all__ = ["DRAIN_S", "SLACK_S", "VotesFeedback"]


class VotesFeedback:
    """`Feedback` by people, or by whoever votes at a flow service.

    Args:
        connect: Makes the client; called in the thread that uses it.
        flow_id: The open flow that items go to.
        spec: What that flow asks.
        journal: Puts an event on disk before it returns; called from the asking thread.
        run_id: Makes the keys of this run's items its own.
        incomplete: What becomes of a group that ended below the minimum: its votes are used, it is set aside, or it is
            asked about once more and the votes of both times are used.
        stop_when_decided: Ends an item early once its leader is the best with this probability.
        settle_s: How long a service without idempotency keys may take to list an item that it made.
        poll_s: Seconds between two looks at the items while something happens; up to four times that otherwise.
        votes_before: Votes that earlier processes of the run brought in, for `flow/votes_total`.
        note: Takes a sentence that whoever watches should read.
        clock: Seconds that never jump.
        wall: Unix time; no deadline depends on it.
        loop_factory: Makes the loop that all asking runs in.
    """

    def __init__(
        self,
        connect: Callable[[], Flow],
        flow_id: str,
        spec: FlowSpec,
        journal: Callable[[Event], object],
        *,
        run_id: str,
        incomplete: Incomplete = "use",
        stop_when_decided: float | None = None,
        settle_s: float = 10.0,
        poll_s: float = 1.0,
        votes_before: float = 0.0,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self._connect = connect
        self._figures = Figures(votes=votes_before)
        self._figures.publish(0.0)
        self._decided: queue.SimpleQueue[RankedGroup | Unranked] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._begun = 0
        self._inbox: queue.SimpleQueue[Group | GroupState] = queue.SimpleQueue()
        self._flow: Flow | None = None
        self._asking: Asking | None = None
        terms = Terms(run_id, incomplete, stop_when_decided, settle_s, poll_s)
        self._make = partial(
            Asking,
            flow_id=flow_id,
            spec=spec,
            terms=terms,
            journal=journal,
            decided=self._decided.put,
            figures=self._figures,
            note=note,
            clock=clock,
            wall=wall,
        )
        self._end = asyncio.Event()
        self._loop = loop_factory()
        self._thread = threading.Thread(target=self._run, name="rlhf-votes", daemon=True)
        self._thread.start()

    # The trainer's side; none of this waits for the network or the disk.

    def submit(self, group: Group) -> None:
        self._begun += 1
        self._hand_over(group)

    def resume(self, groups: Iterable[GroupState]) -> None:
        """Go on with the open ones of `groups` from what the journal knows of each, and keep an eye on the others."""
        for state in groups:
            self._begun += state.open
            self._hand_over(state)

    def collect(self) -> list[RankedGroup | Unranked]:
        decided: list[RankedGroup | Unranked] = []
        while not self._decided.empty():
            decided.append(self._decided.get_nowait())
        if self._failure is not None and not decided:
            raise self._failure
        return decided

    def status(self) -> dict[str, float]:
        in_flight = self._begun - self._figures.decided
        in_vote = self._asking.in_vote if self._asking is not None else 0
        return {
            "flow/in_flight": float(in_flight),
            "flow/backlog": float(max(0, in_flight - in_vote)),
            **self._figures.row,
            **(self._flow.health() if self._flow is not None else {}),
        }

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._close)
            self._thread.join()

    def _hand_over(self, group: Group | GroupState) -> None:
        self._inbox.put(group)
        self._loop.call_soon_threadsafe(self._take_over)

    # The asking thread.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        try:
            self._flow = self._connect()
            asking = self._make(self._flow)
            await asking.check()
            self._asking = asking
            self._take_over()
            if self._end.is_set():
                asking.end()
            await asking.run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._failure = error  # `collect` tells
            await self._end.wait()
        finally:
            if self._flow is not None:
                await self._flow.close()

    def _take_over(self) -> None:
        if self._asking is None:
            return
        while not self._inbox.empty():
            match self._inbox.get_nowait():
                case GroupState() as state if state.open:
                    self._asking.begin(state.sampled.group(), state)
                case GroupState() as state:
                    self._asking.remember(state)
                case group:
                    self._asking.begin(group)

    def _close(self) -> None:
        self._end.set()
        if self._asking is not None:
            self._asking.end()
