"""What a judge has answered, kept in the run folder: an answer that was paid for is never asked for again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from rlhf_cli.journal.run_dir import sync_folder

_VERDICT = re.compile(r"\W*(?:answer\W+)?(a|b|tie)\W*", re.IGNORECASE)
_FOR_FIRST = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said, in its own words, and the tokens in and out that it took; None where nobody counted them."""

    text: str
    tokens: int | None

    @property
    def for_first(self) -> float | None:
        """1 where its last line names A, 0 for B, one half for a tie; None where it says none of them alone."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        match = _VERDICT.fullmatch(lines[-1]) if lines else None
        return _FOR_FIRST[match[1].lower()] if match else None


class _Line(BaseModel):
    key: str
    text: str
    tokens: int | None


class Answers:
    """The answers on disk at `path`, one JSON line each, and what they add up to.

    A crash can leave half a line at the end; it counts as an answer that never came.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Answer] = {}
        self.tokens = 0
        """Of all answers, as far as they were counted."""
        self.dearest = 0
        """Most tokens of one."""
        before = path.read_bytes() if path.exists() else b""
        for line in before.split(b"\n"):
            try:
                read = _Line.model_validate_json(line)
            except ValidationError:
                continue
            self._count(read.key, Answer(read.text, read.tokens))
        self._torn = bool(before) and not before.endswith(b"\n")

    def __len__(self) -> int:
        return len(self._known)

    @staticmethod
    def key(url: str, model: str, question: str) -> str:
        """Names the answer of this model to this question."""
        return hashlib.sha256(json.dumps([url, model, question]).encode()).hexdigest()

    def get(self, key: str) -> Answer | None:
        return self._known.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; once this returns it survives a crash."""
        created = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = _Line(key=key, text=answer.text, tokens=answer.tokens).model_dump_json().encode() + b"\n"
        with self._path.open("ab") as out:
            out.write(b"\n" + line if self._torn else line)
            out.flush()
            os.fsync(out.fileno())
        self._torn = False
        if created:
            sync_folder(self._path.parent)
        self._count(key, answer)

    def _count(self, key: str, answer: Answer) -> None:
        self._known[key] = answer
        self.tokens += answer.tokens or 0
        self.dearest = max(self.dearest, answer.tokens or 0)
