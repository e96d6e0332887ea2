"""The command line in this process, where torch is loaded once, and the smoke recipe run through all of its stages."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rlhf_cli.journal import journal
from rlhf_cli.journal.events import Event, GroupRanked, StepTrained
from rlhf_cli.journal.replay import RunState, replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.server.store import Store
from rlhf_cli.types import WinMatrix

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "recipes" / "smoke.yaml"
STAGES = ("sft", "train-rm", "open-flow", "run-online", "eval")
QUICK = ("flow.poll_s=0.05", "flow.crowd.latency_s.p50=0.02", "flow.crowd.latency_s.p95=0.1")
"""Raters in a hurry. Part of what people's votes follow from, so the same in every call on one run folder."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)  # type: ignore[no-any-return]


def rlhf(*arguments: str | Path) -> Ended:
    """Run `rlhf` in this process, as the installed command would."""
    from rlhf_cli.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["rlhf", *map(str, arguments)]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Ended(code, out.getvalue(), err.getvalue())


def stage(name: str, folder: Path, *options: str, sets: tuple[str, ...] = ()) -> Ended:
    """Run a stage of the smoke recipe in a run folder."""
    changes = [word for key in sets for word in ("--set", key)]
    return rlhf(name, SMOKE, "--run-dir", folder, "--json", *options, *changes)


def succeeded(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    return ended.document


def refused(ended: Ended, code: int, *words: str) -> None:
    """The command ended with this exit code and one message that has these words in it."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1
    message = ended.err[ended.err.index("error: ") :]
    for word in words:
        assert word in message


@dataclass(frozen=True)
class Smoke:
    """The smoke recipe after all five stages."""

    folder: Path
    prepared: Path
    """The same as it was before run-online."""
    results: dict[str, dict[str, Any]]
    """What each stage printed."""


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """Shared by all tests: work on `copy` of its folders."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    prepared, results = folder.with_name("prepared"), {}
    for name in STAGES:
        if name == "run-online":
            shutil.copytree(folder, prepared)
        results[name] = succeeded(stage(name, folder))
    return Smoke(folder, prepared, results)


def copy(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into / "run")
    return into / "run"


def state(folder: Path) -> RunState:
    return replay(journal.read(RunDir(folder).journal))


def events(folder: Path) -> list[Event]:
    return [entry.event for entry in journal.read(RunDir(folder).journal)]


class Process:
    """A stage of the smoke recipe in a process of its own, to be ended by a signal when the journal says so."""

    def __init__(self, name: str, folder: Path, *options: str, sets: tuple[str, ...] = ()) -> None:
        changes = [word for key in sets for word in ("--set", key)]
        command = [sys.executable, "-m", "rlhf_cli", name, str(SMOKE), "--run-dir", str(folder), *options, *changes]
        self.folder, self._before = folder, len(events(folder))
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    def send(self, number: signal.Signals, when: Callable[[list[Event]], bool], seconds: float = 120) -> None:
        """Wait until `when` holds for what this process has written to the journal, then send the signal."""
        end = time.monotonic() + seconds
        while not when(events(self.folder)[self._before :]):
            if self._process.poll() is not None:
                raise AssertionError(f"ended too early: {self._process.communicate()}")
            assert time.monotonic() < end, "what was waited for did not happen"
            time.sleep(0.005)
        self._process.send_signal(number)

    def ended(self) -> Ended:
        out, err = self._process.communicate(timeout=60)
        return Ended(self._process.returncode, out, err)


def count(kind: type, events: list[Event]) -> int:
    return sum(isinstance(event, kind) for event in events)


def assert_every_label_has_its_votes(folder: Path) -> None:
    """No group trained twice, one item per group at the server, and every trained label is what people said.

    The win matrices are worked out here from the raw votes, not by the code that made them.
    """
    known = state(folder)
    steps = [event for event in events(folder) if isinstance(event, StepTrained)]
    for step in {event.step for event in steps}:
        assert len({event.group_ids for event in steps if event.step == step}) == 1
    trained = [group_id for event in known.steps.values() for group_id in event.group_ids]
    assert len(trained) == len(set(trained))

    server = Store(RunDir(folder).flow_store)
    try:
        assert known.flow is not None
        _, items = server.items(known.flow.flow_id, 0, 10_000, newest_first=False)
        assert len({item.dataset_id for item in items}) == len(items)
        compared = replay(journal.read(RunDir(folder).eval_results.with_name("journal.jsonl"))).groups
        groups = [*known.groups.values(), *compared.values()]
        submitted = {group.item_id: group for group in groups if group.item_id is not None}
        assert {item.id for item in items} == set(submitted)
        for item in items:
            group = submitted[item.id]
            if item.ended_at is None and group.ranked is None:
                continue
            texts = [c.text.strip() for c in group.sampled.group().completions]
            place = [texts.index(candidate.text) for candidate in server.candidates(item.id)]
            wins = [[0.0] * len(texts) for _ in texts]
            for vote in server.votes(item.id):
                if vote.late or vote.outcome == "skip":
                    continue
                left, right = place[vote.left], place[vote.right]
                share = {"left": 1.0, "right": 0.0}.get(vote.outcome, 0.5)
                wins[left][right] += share
                wins[right][left] += 1 - share
            if WinMatrix(wins).votes:
                assert group.ranked is not None
                assert group.ranked.matrix() == WinMatrix(wins)
                assert group.ranked.source == f"item:{item.id}"
        for group_id in trained:
            ranked = known.groups[group_id].ranked
            assert isinstance(ranked, GroupRanked)
            assert known.groups[group_id].item_id in submitted
            assert ranked.matrix().votes > 0
    finally:
        server.close()
