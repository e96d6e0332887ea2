"""What a service said about items that have ended, word for word, in the run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

MAX_BODY_BYTES = 1024 * 1024


def keep_bodies(path: Path) -> Callable[[str, str, bytes], None]:
    """What `FlowClient` takes as `on_body`: appends a line for each body to the JSONL file at `path`.

    Members: `at` (UTC), `kind`, `item_id`, `body` (a string, the bytes as UTF-8) and, where the body was longer than
    1 MiB and its end is missing, `cut`. The file holds nothing that the journal needs, so it is not flushed to disk.
    """

    def keep(kind: str, item_id: str, body: bytes) -> None:
        row: dict[str, object] = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            "item_id": item_id,
            "body": body[:MAX_BODY_BYTES].decode("utf-8", "replace"),
        }
        if len(body) > MAX_BODY_BYTES:
            row["cut"] = True
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as out:
            # After half a line, as a crash leaves it, begins a new one.
            begin = b"" if _ends_a_line(out) else b"\n"
            out.write(begin + json.dumps(row).encode() + b"\n")

    return keep


def _ends_a_line(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
