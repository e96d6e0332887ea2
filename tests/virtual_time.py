"""An asyncio loop whose clock jumps to the next timer when there is nothing else to do: hours pass in milliseconds."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

EPOCH = 1_800_000_000.0
"""Unix time at which a virtual loop starts."""


class _Jumping(selectors.DefaultSelector):
    """Never waits for time, only for other threads."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.loop.stands_still or timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready and timeout > 0:
            self.loop.jump(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """`asyncio.Runner(loop_factory=VirtualLoop)` runs any coroutine in virtual time.

    Timers of the loop, `asyncio.sleep` and `asyncio.timeout` follow `time()`. What measures time by itself has to be
    handed a clock: `loop.time` for deadlines, `loop.wall` for Unix time.
    """

    def __init__(self, now: float = 1000.0) -> None:
        selector = _Jumping()
        selector.loop = self
        self.stands_still = False
        """True: timers wait, only what comes from other threads is done. Set it when the world has ended."""
        self.wall_offset_s = 0.0
        """Turn this for a wall clock that jumps."""
        self._now = now
        super().__init__(selector)

    def time(self) -> float:
        return self._now

    def wall(self) -> float:
        return EPOCH + self._now + self.wall_offset_s

    def jump(self, seconds: float) -> None:
        # The smallest step that is one: a timer a rounding error away would be asked about for ever.
        self._now = max(self._now + seconds, math.nextafter(self._now, math.inf))


def run_virtually(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end in virtual time, in this thread."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
