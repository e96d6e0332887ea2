"""What is wrong with a recipe, where it was typed, in words for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.recipe.keys import suggestion
from rlhf_cli.text import without_userinfo

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SECRET = re.compile(r"token_|_token$|^token$|secret|passw|api_?key", re.IGNORECASE)
_ENVIRONMENT_NAME = re.compile(r"[A-Z]+(_[A-Z0-9]+)*")


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where something was written; places sort in the order in which a person would look at them."""

    rank: int
    """0 for the recipe, 1 for the one it extends and so on, then --set, then data files."""
    line: int
    """From 1; 0 where a line means nothing."""
    column: int
    file: str

    def __str__(self) -> str:
        return ":".join([self.file, *(str(n) for n in (self.line, self.column) if n)])


@dataclass(frozen=True, order=True, slots=True)
class Problem:
    """One mistake; prints as `file:line:column: key: what is wrong`."""

    place: Place
    key: str
    what: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "what", without_userinfo(self.what))

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.what) if part)


def looks_secret(key: str, value: str) -> bool:
    """Whether `value` seems to be a credential itself, not the name of the variable that holds it."""
    if not _SECRET.search(key) or len(value) < 16 or _is_a_name(value):
        return False
    frequencies = [value.count(c) / len(value) for c in set(value)]
    return -sum(f * math.log2(f) for f in frequencies) > 3


def _is_a_name(value: str) -> bool:
    return _ENVIRONMENT_NAME.fullmatch(value) is not None and "_" in value


def describe(errors: Iterable[ErrorDetails], written: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], str]]:
    """Turn pydantic's errors into (path of the key, what is wrong with it).

    Args:
        errors: From `ValidationError.errors()`.
        written: The paths of everything in the recipe file, list items included.
    """
    there = set(written)
    found: dict[tuple[str, ...], list[str]] = {}
    of_unions: set[tuple[str, ...]] = set()
    for error in errors:
        path, in_union = _path(error, there)
        if in_union:
            of_unions.add(path)
        what = _what(error, path)
        if what not in found.setdefault(path, []):
            found[path].append(what)
    deeper = {path[:n] for path in found for n in range(len(path))}
    return [
        (path, _joined(whats))
        for path, whats in found.items()
        if not (path in of_unions and path in deeper)  # another member of the union fits better
    ]


def _path(error: ErrorDetails, there: set[tuple[str, ...]]) -> tuple[tuple[str, ...], bool]:
    """The path as written: pydantic's own, less the names of union members."""
    path: tuple[str, ...] = ()
    loc = [str(part) for part in error["loc"]]
    for part in loc:
        if (*path, part) in there:
            path = (*path, part)
    if error["type"] == "missing":
        return (*path, loc[-1]), False
    in_union = len(path) < len(loc)
    if error["type"] == "problem":
        keys = [(*path, key) for key in error["ctx"]["keys"]]
        path = next((key for key in keys if key in there), path)
    return path, in_union


def _joined(whats: list[str]) -> str:
    """`expected a number, got 'x'` and `expected a list, got 'x'` become one sentence."""
    expected = [what.removeprefix("expected ").split(", got ", 1) for what in whats if what.startswith("expected ")]
    if len(expected) == len(whats) > 1 and len({rest[-1] for rest in expected}) == 1:
        return f"expected {' or '.join(first for first, *_ in expected)}, got {expected[0][-1]}"
    return "; ".join(whats)


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "path_type": "the path of a file",
    "model_type": "keys and values such as `key: value`",
    "model_attributes_type": "keys and values such as `key: value`",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _what(error: ErrorDetails, path: tuple[str, ...]) -> str:
    kind, ctx, shown = error["type"], error.get("ctx", {}), _shown(error["input"], path)
    if kind == "problem":
        return str(ctx["text"])
    if kind == "extra_forbidden":
        return "unknown key" + suggestion(path)
    if kind == "missing":
        return "missing key"
    if kind in _EXPECTED:
        hint = "; put it in quotes" if kind == "string_type" and isinstance(error["input"], int | float) else ""
        return f"expected {_EXPECTED[kind]}, got {shown}{hint}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {ctx[bound]:g}, got {shown}"
    if kind == "literal_error":
        values = re.findall(r"'([^']*)'", ctx["expected"])
        return f"expected {' or '.join(values)}, got {shown}" + suggestion(path, values, error["input"])
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_too_long":
        return f"longer than {ctx['max_length']} characters"
    if kind == "string_pattern_mismatch":
        return f"expected text that matches {ctx['pattern']}, got {shown}"
    return error["msg"][:1].lower() + error["msg"][1:]


def _shown(value: Any, path: tuple[str, ...]) -> str:
    """A value in a message: short, printable, and never one that may be a secret."""
    if path and _SECRET.search(path[-1]) and isinstance(value, str):
        return "a value that is not shown here"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    text = without_userinfo(repr(value))  # before the end is cut off, which would hide where the password ends
    return text if len(text) <= 60 else text[:57] + "..."
