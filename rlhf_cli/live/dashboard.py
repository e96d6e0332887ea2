"""The live view: what a run is doing right now, redrawn in place on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from rlhf_cli.journal.events import Event, StageFinished
from rlhf_cli.live.panel import Seen, panel
from rlhf_cli.text import one_line

REFRESH_S = 0.25
CPU_SHARE = 0.01


class Dashboard:
    """Shows `Seen` through rich's Live; redraws only on news, and never spends more than 1 % of a core on it."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._seen = Seen(title)
        self._lock = threading.RLock()
        self._news = threading.Event()
        self._end = threading.Event()
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(),
            auto_refresh=False,
        )
        self._live = Live(
            get_renderable=self.frame,
            console=self._console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # a piped stdout carries results and must not be touched
        )
        self._thread = threading.Thread(target=self._redraw, name="rlhf-live", daemon=True)

    def __enter__(self) -> Dashboard:
        self._live.start(refresh=True)
        # Rich hides the cursor and could not bring it back after a kill, so it simply stays on.
        self._console.show_cursor(True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._news.set()
        self._thread.join()
        self._live.stop()

    def frame(self) -> RenderableType:
        """The picture as it would be drawn now."""
        with self._lock:
            lines = panel(self._seen, self._console.width)
            return Group(*lines, self._progress.get_renderable()) if self._tasks else Group(*lines)

    def _redraw(self) -> None:
        while not self._end.is_set():
            self._news.wait(timeout=1.0)  # the elapsed time moves even when nothing else does
            self._news.clear()
            before = time.thread_time()
            self._live.refresh()
            spent = time.thread_time() - before
            self._end.wait(max(REFRESH_S, spent / CPU_SHARE))

    def on_event(self, event: Event) -> None:
        with self._lock:
            self._seen.event(event)
        if isinstance(event, StageFinished):
            self._say(f"{event.stage} done in {event.seconds:.0f} s", "green")
        self._news.set()

    def on_metrics(self, step: int, row: Mapping[str, float]) -> None:
        with self._lock:
            self._seen.metrics(step, row)
        self._news.set()

    def on_status(self, row: Mapping[str, float]) -> None:
        with self._lock:
            self._seen.status(row)
        self._news.set()

    def on_progress(self, task: str, done: float, total: float | None) -> None:
        with self._lock:
            count = f"{done:g}" if total is None else f"{done:g}/{total:g}"
            if task not in self._tasks:
                self._tasks[task] = self._progress.add_task(one_line(task), total=total, count=count)
            self._progress.update(self._tasks[task], completed=done, total=total, count=count)
            if total is not None and done >= total:
                self._progress.remove_task(self._tasks.pop(task))
        self._news.set()

    def on_note(self, text: str) -> None:
        self._say(text, "yellow")

    def _say(self, text: str, style: str) -> None:
        """A line that stays, above the picture."""
        self._console.print(Text("\u2022 ", style) + Text(one_line(text)))
