"""Watching a run while it happens. Stages report here; `live/` shows it; nothing else depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rlhf_cli.journal.events import Event


class Observer(Protocol):
    """What a stage tells whoever watches. Calls come from any thread and must return at once."""

    def on_event(self, event: Event) -> None:
        """An event that is already on disk."""

    def on_metrics(self, step: int, row: Mapping[str, float]) -> None:
        """The row of `metrics.jsonl` that was just written."""

    def on_status(self, row: Mapping[str, float]) -> None:
        """Figures between two steps, under their metric names (`flow/in_flight`, `flow/votes_total`, ...)."""

    def on_progress(self, task: str, done: float, total: float | None) -> None:
        """A bounded piece of work: loading, supervised steps, answering held-out prompts. `done == total` ends it."""

    def on_note(self, text: str) -> None:
        """A sentence worth a line."""
