"""The data files that a recipe names: JSONL in UTF-8, one JSON object a line, blank lines allowed.

Every reader reports what is wrong as `file:line: what`, the first ten mistakes at once, and returns nothing half-read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rlhf_cli.errors import DataError
from rlhf_cli.recipe.rows import Row, Turn, Wrong, completion_of, prompt_of, text_of, turns_of, wrong
from rlhf_cli.recipe.votes import VotedGroup, VoteRow, alone, voted_groups, voted_row

if TYPE_CHECKING:  # the nouns bring numpy, which `rlhf validate` does without
    from rlhf_cli.recipe.schema import Recipe
    from rlhf_cli.types import Message, Prompt

MAX_SHOWN = 10

T = TypeVar("T")
Rows = list[tuple[int, T]]
"""Rows of a file, each with its line."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong in one line of a data file; line 0 is the file as a whole."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return ": ".join([f"{self.shown}:{self.line}" if self.line else self.shown, self.what])

    @property
    def shown(self) -> str:
        """The file as a person in the working folder would type it."""
        near = os.path.relpath(self.file)
        return str(self.file) if near.startswith("..") else near


def read_prompts(path: Path) -> list[Prompt]:
    """Read rows of `{"prompt": text or messages, "id"?: text}`; a row without an id is named after its line.

    Raises:
        DataError: Malformed, empty, two rows with one id, or a prompt that does not end with the user's turn.
    """
    from rlhf_cli.types import Message, Prompt

    return [
        Prompt(name or f"{path.stem}-{line}", tuple(Message(*turn) for turn in turns))
        for line, (name, turns) in _sound(path, _prompt_row, _ids_once)
    ]


def read_conversations(path: Path) -> list[tuple[Message, ...] | str]:
    """Read rows of `{"messages"}` or `{"prompt", "completion"}`, or of `{"text"}`: raw text comes back as a str.

    Raises:
        DataError: Malformed, empty, a conversation that does not end with the assistant's turn, or raw text among them.
    """
    from rlhf_cli.types import Message

    return [
        row if isinstance(row, str) else tuple(Message(*turn) for turn in row)
        for _, row in _sound(path, _conversation_row, _one_kind)
    ]


def read_voted_groups(path: Path) -> list[VotedGroup]:
    """Read votes in any of the shapes of `recipe.votes`; the name of the file is the source of rows that name none.

    Raises:
        DataError: Malformed, empty, a matrix that does not fit its completions, or a group without any vote.
    """
    rows = _sound(path, voted_row, _in_company)
    return voted_groups([(f"{path.name}:{line}", row) for line, row in rows], path.stem)


def check_files(recipe: Recipe) -> list[Complaint]:
    """Every mistake in the data files that the recipe names, without numpy or torch."""
    found: dict[Path, list[Complaint]] = {}
    for prompts in filter(None, (recipe.data.prompts, recipe.data.heldout_prompts) if recipe.data else ()):
        found[prompts] = _checked(prompts, _prompt_row, _ids_once)[1]
    for texts in filter(None, (recipe.sft.dataset, recipe.sft.heldout) if recipe.sft else ()):
        found[texts] = [*found.get(texts, []), *_checked(texts, _conversation_row, _one_kind)[1]]
    for votes in filter(None, (recipe.train_rm.dataset, recipe.train_rm.heldout) if recipe.train_rm else ()):
        found[votes] = [*found.get(votes, []), *_checked(votes, voted_row, _in_company)[1]]
    return [complaint for bad in found.values() for complaint in _first(bad)]


def _first(bad: list[Complaint]) -> list[Complaint]:
    """The mistakes that are worth showing of one file."""
    more = [Complaint(bad[0].file, 0, f"... and {len(bad) - MAX_SHOWN} more")] if len(bad) > MAX_SHOWN else []
    return bad[:MAX_SHOWN] + more


def _prompt_row(row: Row) -> tuple[str | None, tuple[Turn, ...]]:
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int) or name == ""):
        wrong("'id' has to be text")
    return None if name is None else str(name), prompt_of(row)


def _conversation_row(row: Row) -> tuple[Turn, ...] | str:
    kinds = [kind for kind in ("messages", "prompt", "text") if kind in row]
    if len(kinds) != 1:
        wrong('expected one of {"messages"}, {"prompt", "completion"} or {"text"}')
    if kinds == ["text"]:
        return text_of(row["text"], "'text'")
    if kinds == ["prompt"]:
        return (*prompt_of(row), ("assistant", completion_of(row, "completion", empty=False)))
    turns = turns_of(row["messages"], "'messages'")
    if turns[-1][0] != "assistant":
        wrong("'messages' has to end with the assistant's turn")
    return turns


def _not_a_number(text: str) -> NoReturn:
    raise Wrong(f"{text} is not JSON and not a number that means anything here")


def _scan(path: Path, row: Callable[[Row], T]) -> Iterator[tuple[int, T | Complaint]]:
    """Each row with its line, or what is wrong with it."""
    empty = True
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
                if not line:
                    continue
                empty = False
                try:
                    yield number, row(_object(line))
                except Wrong as wrong:
                    yield number, Complaint(path, number, str(wrong))
    except OSError as error:
        yield 0, Complaint(path, 0, f"cannot be read: {error.strerror}")
    else:
        if empty:
            yield 0, Complaint(path, 0, "holds no rows")


def _object(line: bytes) -> Row:
    try:
        value = json.loads(line.decode(), parse_constant=_not_a_number)
    except UnicodeDecodeError:
        wrong("is not UTF-8 text")
    except json.JSONDecodeError as error:
        wrong(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        wrong("not JSON that can be read: a number or a nesting without measure")
    if not isinstance(value, dict):
        wrong('expected a JSON object such as {"prompt": "..."}')
    return value


def _nothing_across(path: Path, rows: Rows[Any]) -> list[Complaint]:
    return []


def _ids_once(path: Path, rows: Rows[tuple[str | None, tuple[Turn, ...]]]) -> list[Complaint]:
    first: dict[str, int] = {}
    ids = [(line, name or f"{path.stem}-{line}") for line, (name, _) in rows]
    return [
        Complaint(path, line, f"id {name!r} is used in line {first[name]} already")
        for line, name in ids
        if first.setdefault(name, line) != line
    ]


def _one_kind(path: Path, rows: Rows[tuple[Turn, ...] | str]) -> list[Complaint]:
    return [
        Complaint(path, line, "raw text and conversations in one file; keep them apart")
        for line, row in rows
        if isinstance(row, str) is not isinstance(rows[0][1], str)
    ]


def _in_company(path: Path, rows: Rows[VoteRow]) -> list[Complaint]:
    return [Complaint(path, line, what) for line, what in alone(rows)]


def _checked(
    path: Path, row: Callable[[Row], T], across: Callable[[Path, Rows[T]], list[Complaint]] = _nothing_across
) -> tuple[Rows[T], list[Complaint]]:
    """Every sound row with its line, and every mistake: in a row, or `across` the rows."""
    rows: Rows[T] = []
    bad: list[Complaint] = []
    for line, found in _scan(path, row):
        if isinstance(found, Complaint):
            bad.append(found)
        else:
            rows.append((line, found))
    return rows, bad + across(path, rows)


def _sound(
    path: Path, row: Callable[[Row], T], across: Callable[[Path, Rows[T]], list[Complaint]] = _nothing_across
) -> Rows[T]:
    rows, bad = _checked(path, row, across)
    if bad:
        raise DataError("\n".join(map(str, _first(bad))))
    return rows
