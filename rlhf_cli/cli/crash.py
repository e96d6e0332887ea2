"""Where the traceback of a bug goes: a file, so that the terminal shows one line."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from rlhf_cli import __version__

_folders: list[Path] = []


def crash_goes_to(run_dir: Path) -> None:
    """From here on, a crash belongs to this run, should its folder exist by then."""
    _folders.append(run_dir)


def write_crash(error: BaseException) -> Path:
    """Write the traceback, without the values of variables: they may hold secrets."""
    text = f"rlhf {__version__}\n\n" + "".join(traceback.format_exception(error))
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in [*reversed(_folders), Path(tempfile.gettempdir())]:
        if folder.is_dir() and os.access(folder, os.W_OK):
            file = folder / name
            file.write_text(text, "utf-8", "backslashreplace")
            return file
    raise error
