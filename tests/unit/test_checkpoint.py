"""Checkpoints: whole or not there, verified byte by byte, the newest few kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import RunDamaged
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.online import checkpoint as module
from rlhf_cli.online.checkpoint import MANIFEST, latest, partial_dir, publish


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir(parents=True)
    return run


def written(run: RunDir, step: int) -> None:
    """What a trainer leaves for `step`."""
    folder = partial_dir(run) / f"checkpoint-{step}"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(200)) + bytes([step]))
    (folder / "nested" / "optimizer.pt").write_bytes(b"moments of %d" % step)


def consumed(step: int) -> dict[int, tuple[str, ...]]:
    return {s: (f"g{2 * s}", f"g{2 * s + 1}") for s in range(1, step + 1)}


def made(run: RunDir, step: int, keep: int = 2) -> Path:
    written(run, step)
    return publish(run, step, consumed(step), keep)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_there_is_none_before_the_first(run: RunDir) -> None:
    assert latest(run) is None


def test_what_is_published_is_found_again(run: RunDir) -> None:
    path = made(run, 3)
    found = latest(run)
    assert found is not None
    assert (found.path, found.step, found.consumed) == (path, 3, consumed(3))
    assert files(path)["nested/optimizer.pt"] == b"moments of 3"
    assert set(json.loads((path / MANIFEST).read_bytes())) == set(files(path)) - {MANIFEST}
    assert not any(partial_dir(run).iterdir())


def test_only_the_newest_are_kept(run: RunDir) -> None:
    for step in (2, 4, 6, 8):
        made(run, step, keep=2)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-000006", "step-000008"]


def test_a_repeated_step_replaces_its_checkpoint(run: RunDir) -> None:
    made(run, 3)
    made(run, 3)
    found = latest(run)
    assert found is not None
    assert found.step == 3


class Died(BaseException):
    pass


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("dies_in", ["write_text", "sha256", "manifest", "rename", "sync", "latest", "prune"])
def test_a_crash_anywhere_in_publishing_leaves_the_previous_or_the_new_one(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, dies_in: str, keep: int
) -> None:
    """Every call that touches the disk, one after the other; then the run goes on from what is there."""
    before = made(run, 3)
    content = files(before)
    written(run, 6)

    def die(*_: object, **__: object) -> None:
        raise Died

    real = module.write_atomic
    with monkeypatch.context() as patch:
        if dies_in == "write_text":
            patch.setattr(Path, "write_text", die)
        elif dies_in == "sha256":
            patch.setattr(module, "_sync_and_hash", die)
        elif dies_in == "rename":
            patch.setattr(Path, "rename", die)
            patch.setattr(module, "write_atomic", lambda path, data: path.write_bytes(data))
        elif dies_in == "sync":
            patch.setattr(module, "sync_folder", die)
        elif dies_in == "prune":
            patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else die())
        else:
            dying = MANIFEST if dies_in == "manifest" else "LATEST"
            patch.setattr(module, "write_atomic", lambda path, data: die() if path.name == dying else real(path, data))
        try:
            publish(run, 6, consumed(6), keep)
        except Died:
            pass
        else:
            assert (dies_in, keep) == ("prune", 2)  # nothing to prune yet

    found = latest(run)
    assert found is not None
    if dies_in == "prune":
        assert found.step == 6
    else:
        assert (found.step, found.path) == (3, before)
        assert files(before) == content

    shutil.rmtree(partial_dir(run), ignore_errors=True)  # as run-online does when it starts
    step = found.step + 2  # a stop that was asked for comes at another step than the crash
    made(run, step, keep)
    again = latest(run)
    assert again is not None
    assert (again.step, again.consumed) == (step, consumed(step))
    assert len(list(run.checkpoints.glob("step-*"))) == keep


@pytest.mark.parametrize("victim", ["model.safetensors", "nested/optimizer.pt", "consumed.json", MANIFEST])
def test_a_missing_file_is_damage(run: RunDir, victim: str) -> None:
    (made(run, 3) / victim).unlink()
    with pytest.raises(RunDamaged, match="step-000003"):
        latest(run)


def test_a_missing_checkpoint_is_damage(run: RunDir) -> None:
    shutil.rmtree(made(run, 3))
    with pytest.raises(RunDamaged, match="--fresh"):
        latest(run)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_a_flipped_bit_is_damage(run: RunDir, place: int, bit: int) -> None:
    """In any file of the checkpoint or in the pointer to it: refused, or without any effect on what is loaded."""
    path = run.checkpoints / "step-000003"
    if not path.exists():
        made(run, 3)
    sound = latest(run)
    every = [run.latest, *sorted(p for p in path.rglob("*") if p.is_file())]
    bytes_of = {file: file.read_bytes() for file in every}
    place %= sum(map(len, bytes_of.values()))
    for file, data in bytes_of.items():  # noqa: B007
        if place < len(data):
            break
        place -= len(data)
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    file.write_bytes(changed)
    try:
        found = latest(run)
    except RunDamaged as error:
        assert "--fresh" in str(error)  # noqa: PT017
    else:
        assert found == sound
        assert file.name == MANIFEST or file == run.latest  # a space for another space
    finally:
        file.write_bytes(data)
