"""A disk that is full ends the run in order; when there is room again, it goes on where it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from cli_world import QUICK, Smoke, assert_every_label_has_its_votes, copy, events, refused, stage, succeeded

from rlhf_cli.journal.events import StepTrained
from rlhf_cli.journal.run_dir import RunDir

SETS = (*QUICK, "run_online.steps=3")


class Disk:
    """Takes `room` more writes to files of this name, then the first half of one, then nothing."""

    def __init__(self, name: str, room: int) -> None:
        self._name, self._room = name, room
        self._write = os.write

    def write(self, fd: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{fd}").resolve().name != self._name:
            return self._write(fd, data)
        self._room -= 1
        if self._room < -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(fd, data if self._room >= 0 else data[: len(data) // 2])


@pytest.mark.parametrize("room", [0, 3, 12, 30])
def test_a_full_disk_under_the_journal_ends_the_run_with_75_and_it_resumes(
    smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    folder = copy(smoke.prepared, tmp_path)
    before = len(events(folder))
    with monkeypatch.context() as full:
        full.setattr(os, "write", Disk("journal.jsonl", room).write)
        refused(stage("run-online", folder, sets=SETS), 75, "journal.jsonl cannot be written", "make room", "resume")

    assert len(events(folder)) == before + room  # whole lines only, read back with their checksums
    succeeded(stage("run-online", folder, "--resume", sets=SETS))
    assert [event.step for event in events(folder) if isinstance(event, StepTrained)][-1] == 3
    assert_every_label_has_its_votes(folder)


def test_a_full_disk_under_a_checkpoint_ends_the_run_with_75_and_it_resumes(
    smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(smoke.prepared, tmp_path)

    def full(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        refused(stage("run-online", folder, sets=SETS), 75, "cannot be written", "make room", "resume")
    assert not RunDir(folder).latest.exists()
    succeeded(stage("run-online", folder, "--resume", sets=SETS))
    assert_every_label_has_its_votes(folder)
