"""What the fields of one row of data may hold, whatever file it came from."""

from __future__ import annotations

import re
from typing import Any, NoReturn

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("system", "user", "assistant")

Row = dict[str, Any]
Turn = tuple[str, str]
"""Role and content."""


def prompt_of(row: Row) -> tuple[Turn, ...]:
    if "prompt" not in row:
        wrong("'prompt' is missing")
    if isinstance(row["prompt"], str):
        return (("user", text_of(row["prompt"], "'prompt'")),)
    turns = turns_of(row["prompt"], "'prompt'")
    if turns[-1][0] != "user":
        wrong("'prompt' has to end with the user's turn")
    return turns


def completion_of(row: Row, key: str, *, empty: bool = True) -> str:
    """A completion, as text or as a list of one assistant turn. A model may have answered with nothing."""
    if key not in row:
        wrong(f"'{key}' is missing")
    value = row[key]
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            wrong(f"'{key}' has to be text or a list of one assistant turn")
        value = value[0].get("content")
    return text_of(value, f"'{key}'", empty=empty)


def turns_of(value: object, name: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        wrong(
            f"{name} has to be text or a list of turns" if name == "'prompt'" else f"{name} has to be a list of turns"
        )
    turns = []
    for n, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            wrong(f'turn {n} of {name} has to be {{"role": {", ".join(_ROLES)}, "content": text}}')
        if turn["role"] == "system" and n > 1:
            wrong(f"turn {n} of {name} is the system's, which comes first or not at all")
        turns.append((turn["role"], text_of(turn.get("content"), f"the content of turn {n} of {name}")))
    return tuple(turns)


def text_of(value: object, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        wrong(f"{name} has to be text")
    if not value.strip() and not empty:
        wrong(f"{name} is empty")
    if _SURROGATE.search(value):
        wrong(f"{name} holds half of a character (a lone surrogate)")
    return value


class Wrong(Exception):
    """What is wrong with a row; whoever reads the file adds the place."""


def wrong(what: str) -> NoReturn:
    raise Wrong(what)
