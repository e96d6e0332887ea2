"""Which display fits where stderr goes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Protocol

from rlhf_cli.journal.observe import Observer
from rlhf_cli.live.jsonl import JsonLines
from rlhf_cli.live.plain import PlainLines

Output = Literal["auto", "live", "plain", "jsonl"]

MIN_HEIGHT = 15


class Display(Observer, Protocol):
    """An observer that shows what it is told, on stderr, until its block ends."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_display(output: Output, title: str) -> Display:
    """The display for `output`; `auto` is live on a terminal that a person watches, plain everywhere else."""
    if output == "auto":
        interactive = animates(os.environ, sys.stderr.isatty(), shutil.get_terminal_size().lines)
        output = "live" if interactive else "plain"
    if output == "live":
        from rlhf_cli.live.dashboard import Dashboard

        return Dashboard(title)
    return JsonLines(sys.stderr) if output == "jsonl" else PlainLines(sys.stderr)


def animates(environ: Mapping[str, str], terminal: bool, height: int) -> bool:
    """Whether moving text makes sense. FORCE_COLOR and its like are about colour, so they have no say."""
    return terminal and environ.get("TERM") != "dumb" and not environ.get("CI") and height >= MIN_HEIGHT
