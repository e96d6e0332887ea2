"""The journal: one JSON line per event, on disk before anybody acts on it.

A line is `{"crc":"8 hex","seq":n,"at":unix_seconds,"event":{...}}`. The checksum covers every byte after it, so a
changed line is found; `seq` counts from 0 without gaps, so a missing, repeated or foreign line is found. A crash can
only leave an unfinished last line: it was never acknowledged and is cut off when the journal is opened again.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from rlhf_cli.errors import DiskFull, RunDamaged
from rlhf_cli.journal.events import Event, event_adapter
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.run_dir import sync_folder

_HEAD = len(b'{"crc":"00000000",')


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal; `at` is Unix time in seconds."""

    seq: int
    at: float
    event: Event


class Journal:
    """The open journal of a run, for the one process that holds the run's lock. Use `Journal.open`."""

    def __init__(
        self, path: Path, fd: int, entries: tuple[Entry, ...], observers: Sequence[Observer], clock: Callable[[], float]
    ) -> None:
        self.path = path
        self.entries = entries
        """What was on disk when the journal was opened."""
        self._fd = fd
        self._seq = len(entries)
        self._observers = tuple(observers)
        self._clock = clock
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, observers: Sequence[Observer] = (), clock: Callable[[], float] = time.time) -> Journal:
        """Open or create the journal at `path`; an unfinished last line is moved to `journal.torn-<n>` and noted.

        Raises:
            RunDamaged: A line other than an unfinished last one is wrong; the message names file and line.
        """
        created = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if created:
                sync_folder(path.parent)
            entries, good, torn = _parse(path, path.read_bytes())
            if torn:
                _cut(path, fd, good, torn, observers)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, tuple(entries), observers, clock)

    def append(self, event: Event) -> Entry:
        """Record `event` on disk, then show it. Once this returns it survives a crash. Safe from any thread.

        Raises:
            ValueError: The event would not read back as it is (NaN in a field); nothing was written.
            DiskFull: The disk did not take it; nothing of it is left in the file and the next append may succeed.
        """
        body = event.model_dump_json()
        try:
            same = event_adapter.validate_json(body) == event
        except ValidationError:
            same = False
        if not same:
            raise ValueError(f"this {event.type} event does not survive being written: {body[:200]}")
        with self._lock:
            entry = Entry(self._seq, self._clock(), event)
            try:
                self._write(_line(entry, body))
            except OSError as error:
                raise DiskFull(
                    f"{self.path} cannot be written: {error.strerror}. Everything before is kept; "
                    "make room on the disk and resume."
                ) from error
            self._seq += 1
            for observer in self._observers:
                observer.on_event(event)
        return entry

    def _write(self, line: bytes) -> None:
        good = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(
                    errno.ENOSPC, f"only {written} of {len(line)} bytes were written, is the disk full?", str(self.path)
                )
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, good)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[Entry]:
    """Every finished line of the journal at `path`, which may still be growing; never writes. Empty without a file.

    Raises:
        RunDamaged: A finished line is wrong; the message names file and line.
    """
    return _parse(path, path.read_bytes())[0] if path.exists() else []


def _line(entry: Entry, body: str) -> bytes:
    rest = f'"seq":{entry.seq},"at":{json.dumps(entry.at)},"event":{body}}}'.encode()
    return b'{"crc":"%08x",%s\n' % (zlib.crc32(rest), rest)


def _parse(path: Path, data: bytes) -> tuple[list[Entry], int, bytes]:
    """Entries, the offset behind the last good line, and the unfinished rest (empty if there is none)."""
    entries: list[Entry] = []
    offset = 0
    while offset < len(data):
        end = data.find(b"\n", offset) + 1
        line = data[offset : end or len(data)]
        # A finished line never holds a zero byte: one at the very end is a hole that power loss left.
        if not end or (end == len(data) and b"\0" in line):
            return entries, offset, line
        entries.append(_entry(path, len(entries), line))
        offset = end
    return entries, offset, b""


def _entry(path: Path, seq: int, line: bytes) -> Entry:
    place = f"{path}:{seq + 1}"
    head, rest = line[:_HEAD], line[_HEAD:-1]
    if head != b'{"crc":"%08x",' % zlib.crc32(rest):
        raise RunDamaged(
            f"{place}: this line of the journal was changed after it was written (checksum does not match). "
            "Nothing was touched; restore the file from a copy, or start anew in another run folder with --run-dir."
        )
    fields = json.loads(b"{" + rest)
    if fields["seq"] != seq:
        raise RunDamaged(
            f"{place}: the journal has entry {fields['seq']} where {seq} must stand: lines were removed, repeated or "
            "come from another run. Restore the file from a copy, or start anew in another run folder with --run-dir."
        )
    try:
        event = event_adapter.validate_python(fields["event"])
    except ValidationError as error:
        raise RunDamaged(
            f"{place}: an event that this version of rlhf does not know, {fields['event'].get('type')!r}; was the run "
            f"written by a newer version? ({error.error_count()} problems, first: {error.errors()[0]['msg']})"
        ) from error
    return Entry(seq, float(fields["at"]), event)


def _cut(path: Path, fd: int, good: int, torn: bytes, observers: Sequence[Observer]) -> None:
    n = 0
    while True:
        kept = path.with_name(f"{path.stem}.torn-{n}")
        try:
            with kept.open("xb") as out:
                out.write(torn)
                out.flush()
                os.fsync(out.fileno())
            break
        except FileExistsError:
            n += 1
    sync_folder(path.parent)
    os.ftruncate(fd, good)
    os.fsync(fd)
    for observer in observers:
        observer.on_note(
            f"The journal ended in half a line ({len(torn)} bytes), as after a crash; it is kept in {kept.name}."
        )
