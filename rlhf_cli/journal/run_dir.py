"""The run folder: where everything about a run lies, and who may write to it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from rlhf_cli.errors import RunLocked

_PACKAGES = (
    "rlhf-cli",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "httpx",
    "starlette",
    "uvicorn",
)


class RunDir:
    """Paths of a run folder. Making one touches nothing; `create` makes the folder itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.resolved = path / "resolved.yaml"
        self.environment = path / "environment.json"
        self.journal = path / "journal.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.sft_model = path / "sft" / "model"
        self.sft_checkpoints = path / "sft" / "checkpoints"
        self.sft_metrics = path / "sft" / "metrics.jsonl"
        self.train_rm_model = path / "train_rm" / "model"
        self.train_rm_report = path / "train_rm" / "report.json"
        self.train_rm_checkpoints = path / "train_rm" / "checkpoints"
        self.train_rm_metrics = path / "train_rm" / "metrics.jsonl"
        self.online_model = path / "online" / "model"
        self.checkpoints = path / "online" / "checkpoints"
        self.latest = self.checkpoints / "LATEST"
        self.reward_model_versions = path / "online" / "reward_model"
        self.eval_results = path / "eval" / "results.json"
        self.eval_journal = path / "eval" / "journal.jsonl"
        self.judge_answers = path / "judge" / "answers.jsonl"
        self.samples = path / "samples"
        self.heldout_samples = self.samples / "heldout.jsonl"
        self.sft_samples = self.samples / "sft.jsonl"
        self.flow_store = path / "flow" / "server.sqlite"
        self.flow_bodies = path / "flow" / "bodies.jsonl"
        self.report = path / "report.html"
        self.lock_file = path / "LOCK"

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def create(self) -> RunDir:
        """Make the folder if it is not there yet."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that writes to this run until the block ends.

        The lock is the kernel's, so it dies with its process: what a killed one left in the file is taken over.

        Raises:
            RunLocked: A living process holds it; the message names host, pid and since when.
        """
        self.create()
        fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(
                    f"the run folder {self.path} is in use by {_holder(self.lock_file)}. Wait until it ends, stop it "
                    "with Ctrl-C there, or use another folder with --run-dir."
                ) from None
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            _rewrite(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())
            try:
                yield
            finally:
                _rewrite(fd, b"")
        finally:
            os.close(fd)

    def write_environment(self, seed: int, device: str) -> None:
        """Record what the result may depend on besides the recipe. Holds no environment variables and no host name."""
        record = {
            "seed": seed,
            "device": device,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "git": _git_commit(),
            "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        }
        write_atomic(self.environment, json.dumps(record, indent=2).encode() + b"\n")


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, meets the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.chmod(0o644)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make creations and renames inside `folder` survive power loss."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rewrite(fd: int, body: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, body, 0)


def _holder(lock_file: Path) -> str:
    try:
        body = json.loads(lock_file.read_bytes())
        return f"process {body['pid']} on {body['host']} since {body['since']}"
    except (ValueError, KeyError, TypeError):  # caught between locking and writing
        return "another process that has just started"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` where tracked files differ; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
