"""The folder of `rlhf serve`: database, images, a lock, and where the server can be reached."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import RunLocked, UsageError
from rlhf_cli.server.store import Store

DEFAULT_URL = "http://127.0.0.1:8080"


class DataDir:
    """Everything a server knows lives in here. Other commands may use `store_file` while the server runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store_file = path / "server.sqlite"
        self._address_file = path / "address.json"
        self._lock_file = path / "LOCK"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only server on this folder; made where it is not there, readable by its owner alone.

        Raises:
            RunLocked: Another one is running; its process is named.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's, so it dies with its process
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace") or "that has just started"
                raise RunLocked(
                    f"{self.path} is served already, by process {holder}; stop it or use another --data."
                ) from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(fd)

    def remember_url(self, url: str) -> None:
        """Where people reach the server, for the links of `rlhf raters add`."""
        temporary = self._address_file.with_suffix(".new")
        temporary.write_text(json.dumps({"url": url}) + "\n", "utf-8")
        temporary.rename(self._address_file)

    def url(self) -> str:
        """Where the server was reached when it last ran."""
        if not self._address_file.exists():
            return DEFAULT_URL
        return str(json.loads(self._address_file.read_text("utf-8"))["url"])

    @contextmanager
    def store(self, *, create: bool = False) -> Iterator[Store]:
        """The store, for commands that work beside a server or without one.

        Raises:
            UsageError: The folder holds none, and `create` was not asked for.
        """
        if create:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not self.store_file.exists():
            raise UsageError(f"{self.path} holds no server's data; is --data right? `rlhf serve --data` makes it.")
        store = Store(self.store_file)
        try:
            yield store
        finally:
            store.close()
