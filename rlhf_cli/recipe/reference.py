"""The recipe language described by its schema: `docs/recipes.md` for people, JSON Schema for editors.

`python -m rlhf_cli.recipe.reference > docs/recipes.md` writes the page.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import WithJsonSchema
from pydantic.fields import FieldInfo

from rlhf_cli.recipe.keys import atoms, is_source, section_of
from rlhf_cli.recipe.kinds import NotYet, Section
from rlhf_cli.recipe.schema import Recipe

_EXTENDS = "Another recipe to build on, relative to this file: mappings merge key by key, anything else replaces."

_INTRODUCTION = """\
# Recipe reference

One YAML file drives all stages. This page is made from `rlhf_cli/recipe/schema.py`; `rlhf schema` prints the same as
JSON Schema for editors, and `rlhf config RECIPE` shows a recipe with every default filled in.

- YAML is read by the 1.2 core rules: `1e-5` is a number, `on` and `yes` are text, `010` is ten. A key written twice is
  a mistake, and so is a key that is not on this page.
- `extends: other.yaml` at the top builds on another recipe: mappings merge key by key, anything else replaces, and
  `section: null` leaves a section of the other recipe out.
- `${env:NAME}` and `${env:NAME:-default}` in a text are replaced from the environment; `$${` stands for `${`.
- `--set run_online.steps=10` overrides one key, by the same YAML rules.
- Paths are relative to the recipe that names them; in `--set`, to the working folder.
- A secret is never written here: name the environment variable that holds it.
- Values marked *later* are part of the language, and refused until the stage honours them.
"""

_KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "file"}
_SIGNS = {"gt": "> {}", "ge": "\u2265 {}", "lt": "< {}", "le": "\u2264 {}"}


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, `extends` included."""
    schema = Recipe.model_json_schema()
    sections = {section.__name__: section for section in _all_sections(Recipe)}
    for name, described in {"Recipe": schema, **schema["$defs"]}.items():
        for key, text in meanings(sections[name]).items():
            described["properties"][key]["description"] = text
    schema["properties"] = {"extends": {"type": "string", "description": _EXTENDS}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _all_sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        if inner := section_of(field):
            yield from _all_sections(inner)


@cache
def meanings(section: type[Section]) -> dict[str, str]:
    """The docstring under each key of a section.

    pydantic could collect them while the classes are made, at a sixth of the time that `rlhf validate` may take.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        key.target.id: " ".join(text.value.value.split())
        for key, text in itertools.pairwise(tree.body)
        if isinstance(key, ast.AnnAssign)
        and isinstance(key.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def reference_page() -> str:
    """Every section with its keys, as Markdown."""
    return _INTRODUCTION + "".join(_section(Recipe, ""))


def _section(section: type[Section], path: str) -> Iterator[str]:
    yield f"\n## {f'`{path}`' if path else 'The file'}\n\n{_meaning(section)}\n"
    yield "\n| key | value | default | meaning |\n| --- | --- | --- | --- |"
    if not path:
        yield f"\n| `extends` | text |  | {_EXTENDS} |"
    below = []
    for name, field in section.model_fields.items():
        inner, dotted = section_of(field), f"{path}.{name}" if path else name
        if inner is not None:
            below.append((inner, dotted))
        value = f"[section](#{dotted.replace('.', '')})" if inner else _value(field)
        if inner and is_source(field):
            value = f"file, hub id, or list of [parts](#{dotted.replace('.', '')})"
        meaning = meanings(section).get(name) or (_meaning(inner) if inner else "")
        yield f"\n| `{name}` | {value} | {_default(field)} | {meaning} |"
    yield "\n"
    for inner, dotted in below:
        yield from _section(inner, dotted)


def _meaning(section: type[Section]) -> str:
    return " ".join(inspect.cleandoc(section.__doc__ or "").split())


def _value(field: FieldInfo) -> str:
    kinds = list(atoms(field.annotation))
    words = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if words:
        later = [word for mark in field.metadata if isinstance(mark, NotYet) for word in words if mark.refused(word)]
        shown = ", ".join(f"`{word}`" for word in words if word not in later)
        return shown + (f"; later: {', '.join(f'`{word}`' for word in later)}" if later else "")
    if any(isinstance(mark, WithJsonSchema) for mark in kinds):
        return "duration"
    names = list(dict.fromkeys(_KINDS[kind] for kind in kinds if kind in _KINDS))
    if is_source(field):
        names = ["hub id" if name == "text" else name for name in names]
    if get_origin(field.annotation) is list or any(get_origin(kind) is list for kind in get_args(field.annotation)):
        names.append("list")
    bounds = [
        sign.format(f"{getattr(mark, at):,}")
        for mark in field.metadata
        for at, sign in _SIGNS.items()
        if hasattr(mark, at)
    ]
    return " ".join([" or ".join(names), ", ".join(bounds)]).strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default_factory is not None:
        return ""
    return f"`{json.dumps(field.default)}`" if not isinstance(field.default, str) else f"`{field.default}`"


if __name__ == "__main__":
    print(reference_page(), end="")
