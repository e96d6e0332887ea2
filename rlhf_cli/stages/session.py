"""One stage at work in one run folder: the lock, the journal, what is done already, and how it ends."""

from __future__ import annotations

import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from rlhf_cli import __version__
from rlhf_cli.errors import DiskFull, MissingStage, RlhfError, Stopped, disk_full
from rlhf_cli.journal.events import Event, RunStarted, RunStopped, StageFinished, StageStarted
from rlhf_cli.journal.journal import Journal, read
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.replay import RunState, replay
from rlhf_cli.journal.run_dir import RunDir, sync_folder, write_atomic
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.policy.runtime import prepare
from rlhf_cli.recipe.fingerprint import Stage, stage_fingerprint
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.resolved import resolved_yaml

Result = dict[str, Any]
"""What a stage says at its end: figures by name, fit for JSON."""


class Session:
    """What a stage needs to know and to write. Made by `open_session`."""

    def __init__(
        self, stage: Stage, loaded: LoadedRecipe, run: RunDir, journal: Journal, observers: Sequence[Observer]
    ) -> None:
        self.stage, self.loaded, self.recipe, self.run, self.journal = stage, loaded, loaded.recipe, run, journal
        self.observers = observers
        self.state: RunState = replay(journal.entries)
        self.fingerprint = stage_fingerprint(loaded, stage)
        self.began = False
        self._clock_start = time.monotonic()

    def done(self, artefact: Path) -> Result | None:
        """The result of an earlier run of this stage with the same inputs, if there is one."""
        finished = self.state.stages.get(self.stage)
        if finished is None or finished.fingerprint != self.fingerprint or not artefact.exists():
            return None
        self.note(f"{self.stage}: done already with the same inputs, skipped")
        return {"stage": self.stage, "skipped": True, "seconds": finished.seconds, **finished.summary}

    def require(self, stage: Stage, artefact: Path | None = None) -> None:
        """Make sure that an earlier stage was run with the inputs of this recipe.

        Raises:
            MissingStage: It was not, or with other inputs; says which command to run.
        """
        finished = self.state.stages.get(stage)
        command = self.loaded.command(stage, "--run-dir", str(self.run.path))
        if finished is None or (artefact is not None and not artefact.exists()):
            raise MissingStage(f"{self.stage} needs {stage}, which has not been run in {self.run.path}; run: {command}")
        if finished.fingerprint != stage_fingerprint(self.loaded, stage):
            raise MissingStage(f"{stage} was run with other inputs than this recipe has now; run again: {command}")

    def start_model(self) -> str:
        """Where the policy starts: the supervised model of this run, or `model.path` where the recipe has no `sft`."""
        if self.recipe.sft is None:
            assert self.recipe.model.path is not None  # a recipe without it is refused unless it has sft
            return self.recipe.model.path
        self.require("sft", self.run.sft_model)
        return str(self.run.sft_model)

    def start(self, attempt: int = 1, resumed_from_step: int | None = None) -> None:
        """Record that the stage begins, and with what. Until here nothing of the run was touched."""
        self.began = True
        write_atomic(self.run.recipe, self.loaded.text.encode())
        write_atomic(self.run.resolved, resolved_yaml(self.loaded).encode())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.run.write_environment(self.recipe.seed, device)
        recipe, events = self.recipe, list[Event]()
        if self.state.started is None:
            events.append(
                RunStarted(run_id=uuid.uuid4().hex[:12], name=recipe.name, seed=recipe.seed, version=__version__)
            )
        events.append(
            StageStarted(
                stage=self.stage, fingerprint=self.fingerprint, attempt=attempt, resumed_from_step=resumed_from_step
            )
        )
        for event in events:
            self.journal.append(event)
        self.state = replay(read(self.journal.path))

    def finish(self, summary: dict[str, float | str | None]) -> Result:
        """Record that the stage is done; its artefacts are in place."""
        seconds = time.monotonic() - self._clock_start
        self.journal.append(
            StageFinished(stage=self.stage, fingerprint=self.fingerprint, seconds=seconds, summary=summary)
        )
        return {"stage": self.stage, "skipped": False, "seconds": seconds, **summary}

    def stopped(self, stop: StopRequest, steps: int) -> NoReturn:
        """End a supervised stage that was asked to stop, after the checkpoint of so many steps.

        Raises:
            Stopped: Always; says how to go on.
        """
        assert stop.signal_number is not None
        again = self.loaded.command(self.stage, "--run-dir", str(self.run.path))
        name = signal.Signals(stop.signal_number).name
        raise Stopped(f"stopped by {name}; {steps} steps are saved\ngo on with: {again}", stop.signal_number)

    def progress(self, task: str, done: float, total: float | None) -> None:
        for observer in self.observers:
            observer.on_progress(task, done, total)

    def note(self, text: str) -> None:
        for observer in self.observers:
            observer.on_note(text)


@contextmanager
def open_session(stage: Stage, loaded: LoadedRecipe, path: Path, observers: Sequence[Observer]) -> Iterator[Session]:
    """Lock the run folder and open its journal for one stage.

    Raises:
        RunLocked, RunDamaged: As their names say; nothing was changed.
        DiskFull: A file of the run could not be written; what was recorded before is kept.
    """
    prepare(loaded.recipe.compute.threads)
    run = RunDir(path)
    with run.lock(), Journal.open(run.journal, observers) as journal:
        session = Session(stage, loaded, run, journal, observers)
        try:
            yield session
        except BaseException as caught:
            error = disk_full(caught)
            if session.began:
                with suppress(DiskFull):  # then what stopped the run is all the more what has to be told
                    journal.append(RunStopped(exit_code=_exit_code(error), reason=_reason(error)))
            if error is caught:
                raise
            raise error from caught


def _exit_code(error: BaseException) -> int:
    if isinstance(error, RlhfError):
        return error.exit_code
    return 128 + _signal(error) if isinstance(error, KeyboardInterrupt) else 1


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {signal.Signals(_signal(error)).name}"
    return str(error) or type(error).__name__


def _signal(interrupt: KeyboardInterrupt) -> int:
    """The signal behind an interrupt: whoever raises one for another signal than SIGINT names it."""
    return int(interrupt.args[0]) if interrupt.args else signal.SIGINT


def put_in_place(made: Path, target: Path) -> None:
    """Move a finished folder to its place in the run; an older one there is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    made.rename(target)
    sync_folder(target.parent)
