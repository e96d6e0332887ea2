"""Watching through a log: one `key=value` line a step, and seldom anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rlhf_cli.journal.events import CheckpointSaved, Event, FlowOpened, RunStopped, StageFinished, StageStarted
from rlhf_cli.live.lines import Lines
from rlhf_cli.text import one_line

PROGRESS_EVERY_S = 10.0
HEARTBEAT_EVERY_S = 30.0

_STEP = {  # short names, because a line should fit a log viewer
    "sft/loss": ("loss", ".4f"),
    "sft/heldout_loss": ("heldout_loss", ".4f"),
    "sft/tokens_per_s": ("tokens_per_s", ".0f"),
    "train_rm/loss": ("loss", ".4f"),
    "train_rm/accuracy": ("accuracy", ".3f"),
    "train_rm/heldout_loss": ("heldout_loss", ".4f"),
    "train_rm/step_s": ("step_s", ".1f"),
    "reward/mean": ("reward", ".3f"),
    "kl/sequence_nats": ("kl", ".2f"),
    "train/loss": ("loss", ".4f"),
    "train/accuracy": ("accuracy", ".3f"),
    "flow/votes_step": ("votes", ".0f"),
    "flow/votes_total": ("votes_total", ".0f"),
    "flow/in_flight": ("in_flight", ".0f"),
    "flow/latency_p95_s": ("latency_p95_s", ".1f"),
    "rm/version": ("rm_version", ".0f"),
    "rm/agreement": ("rm_agreement", ".3f"),
    "drift/z_max": ("drift_z", ".1f"),
    "staleness/mean_steps": ("staleness", ".1f"),
    "reward/length_controlled": ("reward_at_equal_length", ".3f"),
    "length/mean_tokens": ("tokens", ".0f"),
    "length/mean_chars": ("chars", ".0f"),
    "length/reward_correlation": ("length_correlation", ".2f"),
    "time/step_s": ("step_s", ".1f"),
    "time/wait_s": ("wait_s", ".1f"),
    "cost/usd": ("usd", ".2f"),
}
_HEARTBEAT = ("flow/in_flight", "flow/votes_total", "flow/latency_p95_s", "cost/usd")


class PlainLines(Lines):
    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(out)
        self._clock = clock
        self._steps: float | None = None
        self._step = 0
        self._last_line = clock()
        self._last_progress: dict[str, float] = {}

    def write(self, line: str) -> None:
        self._last_line = self._clock()
        super().write(line)

    def on_event(self, event: Event) -> None:
        match event:
            case StageStarted(resumed_from_step=None):
                self.write(f"stage={event.stage} started")
            case StageStarted():
                self.write(f"stage={event.stage} resumed from_step={event.resumed_from_step}")
            case StageFinished():
                figures = " ".join(f"{k}={_value(v)}" for k, v in event.summary.items() if v is not None)
                self.write(f"stage={event.stage} done seconds={event.seconds:.1f} {figures}".rstrip())
            case FlowOpened():
                votes = f"{event.min_votes}/{event.desired_votes}/{event.max_votes}"
                self.write(f"flow={one_line(event.flow_id)} opened votes={votes} ttl_s={event.ttl_s:g}")
            case CheckpointSaved():
                self.write(f"checkpoint={one_line(event.path)}")
            case RunStopped():
                self.write(f"stopped exit_code={event.exit_code} reason={one_line(event.reason)}")
            case _:
                pass

    def on_metrics(self, step: int, row: Mapping[str, float]) -> None:
        self._step = step
        self.write(f"step={self._of_total(step)} {_pairs(row, _STEP)}".rstrip())

    def on_status(self, row: Mapping[str, float]) -> None:
        self._steps = row.get("run/steps_total", self._steps)
        if self._clock() - self._last_line >= HEARTBEAT_EVERY_S:
            line = f"waiting step={self._of_total(self._step + 1)} {_pairs(row, _HEARTBEAT)}".rstrip()
            if unreachable_s := row.get("flow/unreachable_s"):
                line += f" unreachable_s={unreachable_s:.0f}"
            self.write(line)

    def on_progress(self, task: str, done: float, total: float | None) -> None:
        now = self._clock()
        ended = total is not None and done >= total
        if ended or now - self._last_progress.get(task, -PROGRESS_EVERY_S) >= PROGRESS_EVERY_S:
            self._last_progress[task] = now
            self.write(f"{one_line(task)}: {done:g}" + ("" if total is None else f"/{total:g}"))
        if ended:
            del self._last_progress[task]

    def on_note(self, text: str) -> None:
        self.write(f"note: {one_line(text)}")

    def _of_total(self, step: int) -> str:
        return f"{step}" if self._steps is None else f"{step}/{self._steps:.0f}"


def _pairs(row: Mapping[str, float], names: Mapping[str, tuple[str, str]] | tuple[str, ...]) -> str:
    return " ".join(f"{_STEP[n][0]}={row[n]:{_STEP[n][1]}}" for n in names if n in row)


def _value(value: float | str) -> str:
    return one_line(value) if isinstance(value, str) else f"{value:.5g}"
