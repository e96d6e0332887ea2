"""Checkpoints of the supervised stages: whole or not there, and a run that goes on from one ends in the same weights.

For that, the order of the rows has to follow from seed and epoch alone: transformers skips what was trained of an
epoch, it does not restore a generator that a data loader was given.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_cli.journal.run_dir import sync_folder

ABOUT = "rlhf.json"
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint; `finished` where no step is left to take."""

    path: Path
    step: int
    finished: bool


def newest(folder: Path, inputs: str) -> Checkpoint | None:
    """The latest checkpoint in `folder` that was made from `inputs` (the stage's fingerprint), None without one."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        about = json.loads((path / ABOUT).read_bytes())
        if about["inputs"] == inputs:
            return Checkpoint(path, about["step"], about["finished"])
    return None


def clear(folder: Path) -> None:
    """Forget all checkpoints: the stage starts over, or its result is in place."""
    shutil.rmtree(folder, ignore_errors=True)


def train(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Take the steps that are left: all of them, those after `checkpoint`, or none."""
    if checkpoint is not None and checkpoint.finished:
        trainer._load_from_checkpoint(str(checkpoint.path))
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)


class Checkpoints(TrainerCallback):
    """Saves every `every` steps, after the last one, and when somebody asks to stop. To be the last of the callbacks.

    Args:
        folder: Holds `step-000010` and so on, each with its final name only when every byte of it is on disk.
        inputs: Fingerprint of what the stage is made from; a checkpoint of other inputs is never gone on from.
        every: Steps between two checkpoints; None for only the others.
        stopping: Whether somebody asked to stop.
        stop: Called with the step of the checkpoint that was made because of that; raises.
        extra: Writes what the trainer does not know of into the folder of a checkpoint before it is published.
    """

    def __init__(
        self,
        folder: Path,
        inputs: str,
        every: int | None,
        stopping: Callable[[], bool],
        stop: Callable[[int], None],
        extra: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self.folder, self.inputs, self.every = folder, inputs, every
        self.stopping, self.stop, self.extra = stopping, stop, extra
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the trainer has to be told."""
        return {"output_dir": str(self.folder / PARTIAL), "save_strategy": "no"}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = self.every is not None and state.global_step % self.every == 0
        control.should_save = due or control.should_training_stop or self.stopping()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_training_stop:  # an early stop is decided here, after the step has ended
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        source = self.folder / PARTIAL / f"checkpoint-{state.global_step}"
        self.extra(source)
        about = {"inputs": self.inputs, "step": state.global_step, "finished": control.should_training_stop}
        (source / ABOUT).write_text(json.dumps(about))
        publish(source, self.folder / f"step-{state.global_step:06d}")
        if self.stopping():
            self.stop(state.global_step)


def publish(source: Path, target: Path) -> None:
    """Give a folder its final name once all of it is on disk; what had the name, and older checkpoints, go away."""
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(source)
    old = [path for path in target.parent.glob("step-*") if path <= target]
    if target in old:
        _remove(target)
        old.remove(target)
    source.rename(target)
    sync_folder(target.parent)
    for path in old:
        _remove(path)


def _remove(path: Path) -> None:
    """Take the name away first, so that no half checkpoint is ever found under it."""
    gone = path.parent / PARTIAL / f"old-{path.name}"
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)
