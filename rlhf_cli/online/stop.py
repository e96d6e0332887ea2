"""Asking a run to stop: once to finish the step and checkpoint, twice to stop now."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_cli.errors import Stopped


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the second one interrupts whatever runs."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over SIGINT and SIGTERM until the block ends."""
        self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
            return
        before = self._before[signal.Signals(number)]
        if callable(before):  # whoever listened before us knows which exit code it stands for
            before(number, frame)
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `Stopped` if somebody asked."""
        if self.signal_number is not None:
            raise Stopped(f"stopped by {signal.Signals(self.signal_number).name}", self.signal_number)
