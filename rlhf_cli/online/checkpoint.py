"""Checkpoints that are whole or not there: weights, optimizer and the groups consumed become visible in one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import RunDamaged
from rlhf_cli.journal.run_dir import RunDir, sync_folder, write_atomic

MANIFEST, CONSUMED = "MANIFEST.json", "consumed.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint; `consumed` lists the groups of each step that its weights have seen."""

    path: Path
    step: int
    consumed: dict[int, tuple[str, ...]]


def partial_dir(run: RunDir) -> Path:
    """Where the trainer writes a checkpoint before it is published."""
    return run.checkpoints / ".partial"


def publish(run: RunDir, step: int, consumed: Mapping[int, Sequence[str]], keep: int) -> Path:
    """Make what the trainer wrote for `step` the latest checkpoint; it and those before it, `keep` in all, stay.

    Whatever dies in here leaves the previous checkpoint or this one, never a mix: the folder gets its final name only
    when every file in it is on disk.
    """
    source = partial_dir(run) / f"checkpoint-{step}"
    target = run.checkpoints / _name(step)
    (source / CONSUMED).write_text(json.dumps({"step": step, "consumed": {k: list(v) for k, v in consumed.items()}}))
    files = sorted(p for p in source.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(source)): {"bytes": p.stat().st_size, "sha256": _sync_and_hash(p)} for p in files}
    write_atomic(source / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)
    sync_folder(run.checkpoints)
    write_atomic(run.latest, target.name.encode())
    published = sorted(run.checkpoints.glob("step-*"))
    # A later one than this was renamed by a process that died before it could say so: nothing leads there any more.
    kept = [path for path in published if path <= target][-keep:]
    for path in published:
        if path not in kept:
            shutil.rmtree(path)
    return target


def latest(run: RunDir) -> Checkpoint | None:
    """The newest published checkpoint, every byte of it verified; None where there is none yet.

    Raises:
        RunDamaged: A file is missing or not what the manifest says.
    """
    if not run.latest.exists():
        return None
    return _verified(run.checkpoints / run.latest.read_text("utf-8", errors="replace").strip())


def before(run: RunDir, step: int) -> Checkpoint | None:
    """The newest published checkpoint of fewer than `step` steps, verified; None where there is none left.

    Raises:
        RunDamaged: As `latest`.
    """
    earlier = [path for path in sorted(run.checkpoints.glob("step-*")) if path.name < _name(step)]
    return _verified(earlier[-1]) if earlier else None


def discard_after(run: RunDir, step: int) -> None:
    """Remove the checkpoints of more than `step` steps, so that the one of `step` is the latest; 0 leaves none.

    Can be done again, whatever died in here before.
    """
    if step:
        write_atomic(run.latest, _name(step).encode())
    else:
        run.latest.unlink(missing_ok=True)
    for path in run.checkpoints.glob("step-*"):
        if path.name > _name(step):
            shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _verified(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, expected in manifest.items():
            if (path / name).stat().st_size != expected["bytes"] or _hash(path / name) != expected["sha256"]:
                raise RunDamaged(
                    f"{path / name} is not what {MANIFEST} says: the checkpoint is damaged; restore it, or start over "
                    "with --fresh"
                )
        consumed = json.loads((path / CONSUMED).read_bytes())
    except (OSError, ValueError, KeyError) as error:
        raise RunDamaged(
            f"the checkpoint {path} is incomplete: {error}; restore it, or start over with --fresh"
        ) from error
    return Checkpoint(path, consumed["step"], {int(k): tuple(v) for k, v in consumed["consumed"].items()})


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
