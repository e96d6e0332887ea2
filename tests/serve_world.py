"""`rlhf serve` and `rlhf crowd` as processes of their own, on a folder that a test can look into."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.server.store import Store

RLHF = (sys.executable, "-m", "rlhf_cli")


@dataclass
class Served:
    """A running server."""

    data: Path
    url: str
    process: subprocess.Popen[str]

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        """Its memory, opened beside it as the commands do."""
        store = Store(self.data / "server.sqlite")
        try:
            yield store
        finally:
            store.close()

    def token(self, role: str, name: str) -> tuple[str, str]:
        with self.store() as store:
            return store.tokens.add(role, name)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def crowd(self, *options: str) -> Iterator[None]:
        """`rlhf crowd` until the block ends."""
        _, secret = self.token("owner", "for the crowd")
        command = [*RLHF, "crowd", self.url, "--token", secret, *options]
        people = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            people.send_signal(signal.SIGTERM)
            assert people.wait(20) == 143


def start(data: Path, *options: str) -> Served:
    process = subprocess.Popen(
        [*RLHF, "serve", "--data", str(data), "--bind", "127.0.0.1:0", *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("serving http://127.0.0.1:"), line
    return Served(data, line.split()[1], process)


@contextlib.contextmanager
def serve(data: Path, *options: str) -> Iterator[Served]:
    """A server that is asked to stop at the end of the block, if it still runs then."""
    served = start(data, *options)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(20) == 143
        assert served.process.stderr is not None
        served.process.stderr.close()
