"""The recipe with every default filled in, as YAML that loads to the same recipe again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rlhf_cli.recipe.load import LoadedRecipe

_PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9_./-]*")
_WORDS = {"null", "true", "false"}
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def resolved_json(loaded: LoadedRecipe) -> dict[str, Any]:
    """The values of the recipe; sections that were not written are null."""
    return loaded.recipe.model_dump(mode="json")


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """The recipe as YAML, each value with a comment that says where it came from."""
    lines = list(_lines(resolved_json(loaded), (), loaded.origins))
    width = min(60, max(len(line) for line, _ in lines))
    return "".join(f"{line:<{width}}  # {origin}\n" if origin else f"{line}\n" for line, origin in lines)


def _lines(section: dict[str, Any], path: tuple[str, ...], origins: dict[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        start = f"{'  ' * len(path)}{key}:"
        if isinstance(value, dict):
            yield start, ""
            yield from _lines(value, (*path, key), origins)
        else:
            yield f"{start} {_value(value)}", " ".join(origins[".".join((*path, key))].split())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(item)}' for key, item in value.items())}}}"
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.startswith("."):
        return value
    # JSON is YAML, but for characters that YAML wants escaped, and `${` that would be read as a variable
    text = json.dumps(value.replace("${", "$${"), ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
