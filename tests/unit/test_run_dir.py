"""A run folder has one writer at a time and never shows half a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_cli.errors import RunLocked
from rlhf_cli.journal.metrics import METRICS, MetricsWriter, read_metrics
from rlhf_cli.journal.run_dir import RunDir, write_atomic

HOLD = """
import sys
from pathlib import Path
from rlhf_cli.journal.run_dir import RunDir

with RunDir(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunLocked, match=rf"in use by process {other.pid} on .* since 20.*--run-dir"), run.lock():
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()

        assert json.loads(run.lock_file.read_bytes())["pid"] == other.pid  # its name is still there ...
        with run.lock():  # ... and taken over
            assert json.loads(run.lock_file.read_bytes())["pid"] == os.getpid()
    assert run.lock_file.read_bytes() == b""


def test_the_lock_is_given_back_when_the_block_raises(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass


def test_a_reader_never_meets_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"a" * 100_000)
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    for letter in (b"b", b"c", b"d"):
        write_atomic(path, letter * 100_000)
    stop.set()
    reader.join()

    assert all(len(set(data)) == 1 and len(data) == 100_000 for data in seen)
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_atomic_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_the_environment_names_versions_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPIDATA_CLIENT_SECRET", "s3cr3t-value")
    run = RunDir(tmp_path)
    run.write_environment(seed=7, device="cpu")

    text = run.environment.read_text()
    record = json.loads(text)
    assert (record["seed"], record["device"]) == (7, "cpu")
    assert record["packages"]["numpy"]
    assert record["python"].startswith("3.")
    assert "s3cr3t" not in text
    assert "RAPIDATA" not in text


def test_the_last_figure_of_a_step_wins_and_a_torn_row_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.append(2, {"reward/mean": 0.5, "train/loss": float("nan")})
    writer.append(1, {"reward/mean": 0.25})
    writer.append(2, {"reward/mean": 0.75})
    writer.append(2, {"train/loss": 0.1})  # trained again after a crash, with nothing sampled for it
    with path.open("ab") as out:
        out.write(b'{"step": 3, "rew\xc3')

    assert [(row["step"], row["reward/mean"]) for row in read_metrics(path)] == [(1, 0.25), (2, 0.75)]
    assert read_metrics(path)[-1]["train/loss"] == 0.1

    MetricsWriter(path).append(3, {"reward/mean": 1.0})  # after the crash: not glued to the torn row
    assert read_metrics(path)[-1]["reward/mean"] == 1.0


def test_a_value_that_is_no_number_becomes_a_gap(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "metrics.jsonl").append(1, {"train/loss": float("nan")})

    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] is None


def test_every_metric_has_a_name_with_an_area_and_a_usable_format() -> None:
    for name, metric in METRICS.items():
        assert "/" in name
        assert metric.label
        assert metric.help
        assert format(1.5, metric.form)
