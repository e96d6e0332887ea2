"""A circuit breaker: a service that is down, or asks us to slow down, is asked by one call at a time.

While calls are answered the circuit is *closed* and up to `AT_ONCE` of them are under way. After `OPENS_AFTER` failures
in a row, over all calls, it is *open*: calls wait, and one at a time goes out as a probe, after pauses that grow. The
first answer closes it. So an outage costs a handful of requests, however many calls wait for its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal, TypeVar

OPENS_AFTER = 3
AT_ONCE = 16
LONGEST_PAUSE_S = 30.0

Answer = TypeVar("Answer")


class Transient(Exception):
    """Worth another attempt. `effect` is True where the service may have done what was asked."""

    def __init__(self, what: str, *, effect: bool, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.effect = effect
        self.wait_s = wait_s
        """What the service asked us to wait, seconds."""


class Outage(Exception):
    """The service was unreachable for too long; the cause is the last failure."""


class Circuit:
    """Used within one event loop, whose time it keeps; `state` and `open_for_s` may be read from any thread.

    Args:
        outage_s: How long the circuit may be open before the calls that wait fail.
        pause_s: The first pause before a probe; each failed probe doubles it.
    """

    def __init__(self, outage_s: float, pause_s: float, rng: random.Random | None = None) -> None:
        self._outage_s, self._first_pause_s = outage_s, pause_s
        self._rng = rng or random.Random()
        self._failures = 0
        self._since: float | None = None
        """Time of the first failure in a row."""
        self._closed = asyncio.Event()
        self._closed.set()
        self._probing = False
        self._pause_s = pause_s
        self._not_before = 0.0
        self._outages = 0
        self._last: Transient | None = None
        self._turn = asyncio.Lock()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._time: Callable[[], float] = lambda: 0.0

    @property
    def state(self) -> Literal["closed", "open", "probing"]:
        return "closed" if self._closed.is_set() else "probing" if self._probing else "open"

    @property
    def open_for_s(self) -> float:
        """Seconds since the service last failed to answer for the first time; 0 while closed."""
        since = self._since
        return 0.0 if since is None or self._closed.is_set() else max(0.0, self._time() - since)

    def jittered(self, pause_s: float) -> float:
        return pause_s * self._rng.uniform(0.75, 1.25)

    async def through(
        self, send: Callable[[], Awaitable[Answer]], look: Callable[[], Awaitable[object]] | None = None
    ) -> Answer:
        """`send()` once it may go out.

        Args:
            look: Given where sending is not safe to repeat: goes out as the probe instead, so that nothing is created
                at a service that is not known to answer. A doubtful failure of such a call opens the circuit at once.

        Raises:
            Transient: This attempt failed; others may follow.
            Outage: The circuit was open for too long.
        """
        self._time = asyncio.get_running_loop().time
        outages = self._outages
        while True:
            while not self._closed.is_set():
                async with self._turn:
                    if self._outages != outages:  # found out by another while this call waited
                        raise Outage from self._last
                    if await self._closes_by_itself():
                        break
                    if look is None:
                        return await self._probe(send)
                    await self._probe(look)
            async with self._slots:
                if self._closed.is_set():  # it may have opened while this call waited for a slot
                    return await self._counted(send, doubt_opens=look is not None)

    async def _closes_by_itself(self) -> bool:
        """Wait until the next probe is due; True if a call that was under way is answered before."""
        with suppress(TimeoutError):  # then the probe is due
            async with asyncio.timeout_at(self._not_before):
                await self._closed.wait()
        return self._closed.is_set()

    async def _probe(self, send: Callable[[], Awaitable[Answer]]) -> Answer:
        assert self._since is not None
        began, self._probing = self._time(), True
        try:
            return await self._counted(send)
        except Transient as error:
            # Measured where the probe began: a process that was stopped for longer than an outage may last asks again.
            if began - self._since >= self._outage_s:
                self._outages += 1
                raise Outage from error
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._pause(error.wait_s)
            raise
        finally:
            self._probing = False

    async def _counted(self, send: Callable[[], Awaitable[Answer]], *, doubt_opens: bool = False) -> Answer:
        try:
            answer = await send()
        except Transient as error:
            self._last = error
            self._failures += 1
            if self._since is None:
                self._since = self._time()
            if self._closed.is_set() and (self._failures >= OPENS_AFTER or (doubt_opens and error.effect)):
                self._closed.clear()
                self._pause(error.wait_s)
            raise
        self._failures, self._since, self._pause_s = 0, None, self._first_pause_s
        self._closed.set()
        return answer

    def _pause(self, wait_s: float | None) -> None:
        """No probe for a while: what the service asked for, else our own pause, but one at the end of the patience."""
        assert self._since is not None
        now = self._time()
        own_s = min(self.jittered(self._pause_s), max(0.0, self._since + self._outage_s - now))
        self._not_before = now + (own_s if wait_s is None else max(own_s, wait_s))
