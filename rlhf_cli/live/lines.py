"""What the two line-by-line displays share: whole lines to one stream, from any thread, until nobody reads them."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self, TextIO


class Lines:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._read = True

    def write(self, line: str) -> None:
        """Write one line at once; a reader that went away does not end the run."""
        with self._lock:
            if self._read:
                try:
                    self._out.write(line + "\n")
                    self._out.flush()
                except BrokenPipeError:
                    self._read = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
