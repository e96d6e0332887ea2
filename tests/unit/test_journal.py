"""The journal keeps what it acknowledged, and says so when somebody changed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import RunDamaged
from rlhf_cli.journal.events import Event, GroupIntended, GroupRanked, RunStarted, StepTrained
from rlhf_cli.journal.journal import Journal, read

EVENTS: list[Event] = [
    RunStarted(run_id="r1", name="demo", seed=7, version="0.1.0"),
    GroupIntended(group_id="g0", key="k0"),
    GroupRanked(group_id="g0", source="item:1", wins=((0, 2.5), (1, 0)), latency_s=2.25, complete=True),
    StepTrained(step=1, group_ids=("g0",)),
    GroupIntended(group_id="süß\u202e\n\x1b[31m", key="k1"),
]


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.notes: list[str] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def on_metrics(self, step: int, row: Mapping[str, float]) -> None: ...

    def on_status(self, row: Mapping[str, float]) -> None: ...

    def on_progress(self, task: str, done: float, total: float | None) -> None: ...

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def write(path: Path, events: list[Event]) -> bytes:
    with Journal.open(path, clock=lambda: 1700000000.25) as journal:
        for event in events:
            journal.append(event)
    return path.read_bytes()


def events_of(path: Path) -> list[Event]:
    return [entry.event for entry in read(path)]


def read_anyway(path: Path) -> list[Event]:
    """What a reader would act on; nothing where it refuses."""
    try:
        return events_of(path)
    except RunDamaged:
        return []


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    write(tmp_path / "journal.jsonl", EVENTS)

    entries = read(tmp_path / "journal.jsonl")

    assert [e.event for e in entries] == EVENTS
    assert [e.seq for e in entries] == list(range(len(EVENTS)))
    assert entries[0].at == 1700000000.25


def test_every_line_is_json_for_other_tools(tmp_path: Path) -> None:
    lines = write(tmp_path / "journal.jsonl", EVENTS).splitlines()

    assert [list(json.loads(line)) for line in lines] == [["crc", "seq", "at", "event"]] * len(EVENTS)


def test_observers_see_an_event_only_when_it_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"

    class OnDisk(Recorder):
        def on_event(self, event: Event) -> None:
            assert events_of(path)[-1] == event
            super().on_event(event)

    observer = OnDisk()
    with Journal.open(path, [observer]) as journal:
        for event in EVENTS:
            journal.append(event)

    assert observer.events == EVENTS


def test_a_reopened_journal_goes_on_counting_and_hands_over_what_it_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, EVENTS[:2])
    with Journal.open(path) as journal:
        assert [e.event for e in journal.entries] == EVENTS[:2]
        journal.append(EVENTS[2])

    assert [e.seq for e in read(path)] == [0, 1, 2]


def test_every_truncation_point_recovers_the_full_prefix(tmp_path: Path) -> None:
    data = write(tmp_path / "whole.jsonl", EVENTS)
    for cut in range(len(data) + 1):
        path = tmp_path / str(cut) / "journal.jsonl"
        path.parent.mkdir()
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        tail = data[:cut].rpartition(b"\n")[2]
        observer = Recorder()

        assert events_of(path) == EVENTS[:whole]
        assert path.read_bytes() == data[:cut]  # reading alone never writes

        with Journal.open(path, [observer]) as journal:
            journal.append(EVENTS[0])

        assert events_of(path) == [*EVENTS[:whole], EVENTS[0]]
        assert len(observer.notes) == (1 if tail else 0)
        if tail:
            assert (path.parent / "journal.torn-0").read_bytes() == tail


def test_a_second_torn_tail_does_not_overwrite_the_first(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for tail in (b'{"crc":"1', b'{"crc":"2'):
        with path.open("ab") as out:
            out.write(tail)
        Journal.open(path).close()

    assert (tmp_path / "journal.torn-0").read_bytes() == b'{"crc":"1'
    assert (tmp_path / "journal.torn-1").read_bytes() == b'{"crc":"2'


def test_a_hole_of_zero_bytes_at_the_end_is_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    data = write(path, EVENTS[:3])
    path.write_bytes(data[:-40] + b"\0" * 39 + b"\n")

    assert events_of(path) == EVENTS[:2]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, place: float, bit: int) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    data = bytearray(write(path, EVENTS))
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    observer = Recorder()
    try:
        Journal.open(path, [observer]).close()
    except RunDamaged as error:
        observer.notes.append(str(error))

    assert len(observer.notes) == 1
    assert EVENTS[: len(read_anyway(path))] == read_anyway(path)


@given(line=st.integers(0, len(EVENTS) - 2), keep=st.sampled_from([0, 2]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_deleted_and_repeated_lines_are_found(tmp_path: Path, line: int, keep: int) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    lines = write(path, EVENTS).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:line], *[lines[line]] * keep, *lines[line + 1 :]]))

    with pytest.raises(RunDamaged, match=rf"journal.jsonl:{line + 1 + (keep > 1)}: "):
        Journal.open(path)


def test_damage_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    damaged = write(path, EVENTS).replace(b"item:1", b"item:2") + b"torn"
    path.write_bytes(damaged)

    with pytest.raises(RunDamaged, match=r"journal.jsonl:3: .*checksum"):
        Journal.open(path)

    assert path.read_bytes() == damaged
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_an_event_of_a_newer_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    rest = b'"seq":0,"at":1.0,"event":{"type":"group_teleported"}}'
    path.write_bytes(b'{"crc":"%08x",%s\n' % (zlib.crc32(rest), rest))

    with pytest.raises(RunDamaged, match=r"journal.jsonl:1: .*'group_teleported'.*newer version"):
        read(path)


def test_an_event_that_would_not_read_back_is_never_written(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        bad = GroupRanked(group_id="g", source="item:1", wins=((0, 1), (0, 0)), latency_s=float("nan"), complete=True)
        with pytest.raises(ValueError, match="group_ranked"):
            journal.append(bad)
        journal.append(EVENTS[0])

    assert events_of(tmp_path / "journal.jsonl") == EVENTS[:1]


FILL = """
import resource, signal, sys
from pathlib import Path
from rlhf_cli.errors import DiskFull
from rlhf_cli.journal.events import StepTrained
from rlhf_cli.journal.journal import Journal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
size = path.stat().st_size
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with Journal.open(path) as journal:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    for _ in range(2):
        try:
            journal.append(StepTrained(step=1, group_ids=()))
        except DiskFull as error:
            print(error.exit_code, "make room" in str(error), path.stat().st_size - size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.append(StepTrained(step=2, group_ids=()))
"""


def test_a_full_disk_leaves_no_half_line_and_the_next_append_works(tmp_path: Path) -> None:
    """The kernel's limit on file size gives a short write and then errors, like a full disk."""
    path = tmp_path / "journal.jsonl"
    write(path, EVENTS[:2])

    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["75 True 0", "75 True 0"]
    assert events_of(path) == [*EVENTS[:2], StepTrained(step=2, group_ids=())]


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.open(path) as journal:
        threads = [
            threading.Thread(
                target=lambda n=n: [journal.append(GroupIntended(group_id=f"{n}", key="k" * 500)) for _ in range(25)]
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(e.event.group_id for e in read(path)) == sorted("0123" * 25)  # type: ignore[union-attr]


def test_a_missing_journal_reads_as_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "journal.jsonl") == []
