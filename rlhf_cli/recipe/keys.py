"""Looking keys up in the schema by path: what a key holds, which keys there are, which one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf_cli.recipe.kinds import Section
from rlhf_cli.recipe.schema import Recipe

KeyPath = tuple[str, ...]


def atoms(annotation: Any) -> Iterator[Any]:
    """The types inside an annotation: members of unions, items of lists; a Literal stays whole."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from atoms(inner)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds; None where it holds a value."""
    return next((a for a in atoms(field.annotation) if isinstance(a, type) and issubclass(a, Section)), None)


def section_at(path: KeyPath) -> type[Section] | None:
    """The section at `path`; the recipe itself at ()."""
    section: type[Section] | None = Recipe
    for key in path:
        if key.isdigit():  # an item of a list of sections
            continue
        field = section.model_fields.get(key) if section else None
        section = section_of(field) if field else None
    return section


def field_at(path: KeyPath) -> FieldInfo | None:
    """The key at `path`, None where the schema has none."""
    section = section_at(path[:-1])
    return section.model_fields.get(path[-1]) if section and path else None


def is_file(field: FieldInfo) -> bool:
    return Path in atoms(field.annotation)


def is_source(field: FieldInfo) -> bool:
    """Whether the key names a file or a hub id."""
    kinds = list(atoms(field.annotation))
    return Path in kinds and str in kinds


def takes_text(field: FieldInfo) -> bool:
    """Whether `12` in quotes and `12` mean the same to this key."""
    return any(a in (str, Path) or get_origin(a) is Literal for a in atoms(field.annotation))


@cache
def all_paths() -> tuple[KeyPath, ...]:
    """Every key of the schema, sections before their keys."""

    def below(section: type[Section], path: KeyPath) -> Iterator[KeyPath]:
        for name, field in section.model_fields.items():
            yield (*path, name)
            inner = section_of(field)
            if inner is not None:
                yield from below(inner, (*path, name))

    return tuple(below(Recipe, ()))


def suggestion(path: KeyPath, values: Sequence[str] = (), got: object = None) -> str:
    """`; did you mean '...'?` for an unknown key, or for an unknown value of a key; empty when nothing is near."""
    if values:
        near = difflib.get_close_matches(str(got), values, n=1)
    else:
        section = section_at(path[:-1])
        near = difflib.get_close_matches(path[-1], list(section.model_fields) if section else [], n=1)
        # a key in the wrong section, or --set with the end of a path
        near = near or [
            ".".join(known) for known in all_paths() if known[-len(path) :] == path or known[-1] == path[-1]
        ]
    return f"; did you mean '{near[0]}'?" if near else ""
