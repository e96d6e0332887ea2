"""Watching by another program: one JSON object a line, pure ASCII."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from rlhf_cli.journal.events import Event, GroupSampled
from rlhf_cli.live.lines import Lines

_TOKENS: dict[str, Any] = {
    "prompt_ids": True,
    "completions": {"__all__": {"token_ids", "logps", "ref_logps", "start_logp"}},
}


class JsonLines(Lines):
    """Each line has `kind` (event, metrics, status, progress, note) and `at`. Token ids stay in the journal."""

    def on_event(self, event: Event) -> None:
        exclude = _TOKENS if isinstance(event, GroupSampled) else None
        self._object("event", event=event.model_dump(mode="json", exclude=exclude))

    def on_metrics(self, step: int, row: Mapping[str, float]) -> None:
        self._object("metrics", step=step, **row)

    def on_status(self, row: Mapping[str, float]) -> None:
        self._object("status", **row)

    def on_progress(self, task: str, done: float, total: float | None) -> None:
        self._object("progress", task=task, done=done, total=total)

    def on_note(self, text: str) -> None:
        self._object("note", text=text)

    def _object(self, kind: str, **fields: object) -> None:
        self.write(json.dumps({"kind": kind, "at": time.time(), **fields}))
