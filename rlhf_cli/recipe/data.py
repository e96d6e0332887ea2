"""The data files that a recipe names: JSONL in UTF-8, one JSON object a line, blank lines allowed.

Every reader reports what is wrong as `file:line: what`, the first ten mistakes at once, and returns nothing half-read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rlhf_cli.errors import DataError

if TYPE_CHECKING:  # the nouns bring numpy, which `rlhf validate` does without
    from rlhf_cli.recipe.schema import Recipe
    from rlhf_cli.types import Message, Prompt, WinMatrix

MAX_SHOWN = 10
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("system", "user", "assistant")

Row = dict[str, Any]
Turn = tuple[str, str]
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


@dataclass(frozen=True, slots=True)
class VotedGroup:
    """Completions of one prompt and the votes between them."""

    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    wins: WinMatrix


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
    """Read rows of `{"prompt", "chosen", "rejected"}` or `{"prompt", "completions", "wins"}`.

    Raises:
        DataError: Malformed, empty, a matrix that does not fit its completions, or a group without any vote.
    """
    from rlhf_cli.types import Message, WinMatrix

    return [
        VotedGroup(tuple(Message(*turn) for turn in turns), completions, WinMatrix(wins))
        for _, (turns, completions, wins) in _sound(path, _voted_row)
    ]


def check_files(recipe: Recipe) -> list[Complaint]:
    """Every mistake in the data files that the recipe names, without numpy or torch."""
    found: dict[Path, list[Complaint]] = {}
    for prompts in filter(None, (recipe.data.prompts, recipe.data.heldout_prompts) if recipe.data else ()):
        found[prompts] = _checked(prompts, _prompt_row, _ids_once)[1]
    for texts in filter(None, (recipe.sft.dataset, recipe.sft.heldout) if recipe.sft else ()):
        found[texts] = [*found.get(texts, []), *_checked(texts, _conversation_row, _one_kind)[1]]
    for votes in filter(None, (recipe.train_rm.dataset, recipe.train_rm.heldout) if recipe.train_rm else ()):
        found[votes] = [*found.get(votes, []), *_checked(votes, _voted_row)[1]]
    return [complaint for bad in found.values() for complaint in _first(bad)]


def _first(bad: list[Complaint]) -> list[Complaint]:
    """The mistakes that are worth showing of one file."""
    more = [Complaint(bad[0].file, 0, f"... and {len(bad) - MAX_SHOWN} more")] if len(bad) > MAX_SHOWN else []
    return bad[:MAX_SHOWN] + more


def _prompt_row(row: Row) -> tuple[str | None, tuple[Turn, ...]]:
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int) or name == ""):
        _wrong("'id' has to be text")
    return None if name is None else str(name), _prompt(row)


def _conversation_row(row: Row) -> tuple[Turn, ...] | str:
    kinds = [kind for kind in ("messages", "prompt", "text") if kind in row]
    if len(kinds) != 1:
        _wrong('expected one of {"messages"}, {"prompt", "completion"} or {"text"}')
    if kinds == ["text"]:
        return _text(row["text"], "'text'")
    if kinds == ["prompt"]:
        return (*_prompt(row), ("assistant", _completion(row, "completion", empty=False)))
    turns = _turns(row["messages"], "'messages'")
    if turns[-1][0] != "assistant":
        _wrong("'messages' has to end with the assistant's turn")
    return turns


def _voted_row(row: Row) -> tuple[tuple[Turn, ...], tuple[str, ...], list[list[float]]]:
    turns = _prompt(row)
    if "completions" not in row:
        return turns, (_completion(row, "chosen"), _completion(row, "rejected")), [[0.0, 1.0], [0.0, 0.0]]
    completions, wins = row["completions"], row.get("wins")
    if not isinstance(completions, list) or len(completions) < 2:
        _wrong("'completions' has to be a list of at least two texts")
    texts = tuple(_text(text, f"completion {n}", empty=True) for n, text in enumerate(completions, 1))
    if not isinstance(wins, list) or any(not isinstance(line, list) or len(line) != len(wins) for line in wins):
        _wrong("'wins' has to be a square list of lists: wins[i][j] votes preferred completion i over j")
    if len(wins) != len(texts):
        _wrong(f"'wins' is {len(wins)} x {len(wins)} for {len(texts)} completions")
    counts = [count for line in wins for count in line]
    if any(isinstance(c, bool) or not isinstance(c, int | float) or not math.isfinite(c) or c < 0 for c in counts):
        _wrong("'wins' holds counts of votes: numbers from 0 up")
    if any(wins[i][i] for i in range(len(wins))):
        _wrong("a completion cannot win against itself: the diagonal of 'wins' has to be 0")
    if not any(counts):
        _wrong("'wins' holds no vote")
    return turns, texts, wins


def _prompt(row: Row) -> tuple[Turn, ...]:
    if "prompt" not in row:
        _wrong("'prompt' is missing")
    if isinstance(row["prompt"], str):
        return (("user", _text(row["prompt"], "'prompt'")),)
    turns = _turns(row["prompt"], "'prompt'")
    if turns[-1][0] != "user":
        _wrong("'prompt' has to end with the user's turn")
    return turns


def _completion(row: Row, key: str, *, empty: bool = True) -> str:
    """A completion, as text or as a list of one assistant turn. A model may have answered with nothing."""
    if key not in row:
        _wrong(f"'{key}' is missing")
    value = row[key]
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            _wrong(f"'{key}' has to be text or a list of one assistant turn")
        value = value[0].get("content")
    return _text(value, f"'{key}'", empty=empty)


def _turns(value: object, name: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        _wrong(
            f"{name} has to be text or a list of turns" if name == "'prompt'" else f"{name} has to be a list of turns"
        )
    turns = []
    for n, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            _wrong(f'turn {n} of {name} has to be {{"role": {", ".join(_ROLES)}, "content": text}}')
        if turn["role"] == "system" and n > 1:
            _wrong(f"turn {n} of {name} is the system's, which comes first or not at all")
        turns.append((turn["role"], _text(turn.get("content"), f"the content of turn {n} of {name}")))
    return tuple(turns)


def _text(value: object, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        _wrong(f"{name} has to be text")
    if not value.strip() and not empty:
        _wrong(f"{name} is empty")
    if _SURROGATE.search(value):
        _wrong(f"{name} holds half of a character (a lone surrogate)")
    return value


class _Wrong(Exception):
    pass


def _wrong(what: str) -> NoReturn:
    raise _Wrong(what)


def _not_a_number(text: str) -> NoReturn:
    raise _Wrong(f"{text} is not JSON and not a number that means anything here")


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
                except _Wrong as wrong:
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
        _wrong("is not UTF-8 text")
    except json.JSONDecodeError as error:
        _wrong(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        _wrong("not JSON that can be read: a number or a nesting without measure")
    if not isinstance(value, dict):
        _wrong('expected a JSON object such as {"prompt": "..."}')
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
