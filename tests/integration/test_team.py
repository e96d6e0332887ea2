"""A team's run: the server, the raters and the trainer are processes of their own, as in the README."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_world import ROOT, rlhf, succeeded

from rlhf_cli.journal import journal
from rlhf_cli.journal.events import GroupRanked
from rlhf_cli.server.store import Store
from rlhf_cli.types import WinMatrix

TEAM = ROOT / "recipes" / "team.yaml"
SMALL = ("run_online.steps=2", "run_online.sampling.max_new_tokens=8", "flow.poll_s=0.1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(*arguments: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command of ours in a process, until the block ends; it has to end in order on SIGTERM."""
    command = [sys.executable, "-m", "rlhf_cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 143, said


def answers(port: int, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


def test_a_team_trains_on_the_votes_of_its_own_server(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes, folder, port = tmp_path / "votes", tmp_path / "run", free_port()
    url = f"http://127.0.0.1:{port}"
    client = succeeded(rlhf("tokens", "add", "trainer", "--role", "client", "--data", votes, "--json"))
    owner = succeeded(rlhf("tokens", "add", "boss", "--role", "owner", "--data", votes, "--json"))
    monkeypatch.setenv("RLHF_FLOW_URL", url)
    monkeypatch.setenv("RLHF_CLIENT_ID", client["id"])
    monkeypatch.setenv("RLHF_CLIENT_SECRET", client["secret"])
    crowd = ("crowd", url, "--raters", "16", "--taste", "letters", "--latency-p50-s", "0.05", "--latency-p95-s", "0.2")
    sets = [word for key in (f"model.path={tiny}", *SMALL) for word in ("--set", key)]
    with running("serve", "--bind", f"127.0.0.1:{port}", "--data", votes, "--lease-s", "2"):
        answers(port)
        with running(*crowd, RLHF_OWNER_TOKEN=owner["secret"]):
            result = succeeded(rlhf("run", TEAM, "--run-dir", folder, "--json", *sets))

    assert result["stages"]["run-online"]["steps"] == 2
    assert result["judge"] == "flow"
    assert 0 <= result["win_rate"] <= 1
    store = Store(next(votes.rglob("*.sqlite")))
    ranked = [e.event for e in journal.read(folder / "journal.jsonl") if isinstance(e.event, GroupRanked)]
    assert len(ranked) >= 16
    for event in ranked:
        assert store.matrix(event.source.removeprefix("item:")) == WinMatrix(event.wins)
    store.close()
    secrets = (client["secret"], owner["secret"])
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert json.loads((folder / "eval" / "results.json").read_text())["prompts"] == 32
