"""YAML text -> a tree that remembers where each key was typed. YAML 1.2 core rules, on PyYAML's parser.

`1e-5` is a number, `on`, `yes`, `12:30` and dates are text, `010` is ten; a key written twice is a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.recipe.problems import Place, Problem

_MAX_NODES = 10_000
_MAX_DEPTH = 30

_CORE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("null", re.compile(r"null|Null|NULL|~|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")),
    ("float", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
)
_PREFIX = "tag:yaml.org,2002:"

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Written:
    """A value and where it came from. A mapping holds one `Written` a key, placed at the key."""

    value: dict[str, Written] | list[Written] | Scalar
    place: Place
    folder: Path
    """What relative paths start from."""
    empty: bool = False
    """Nothing at all was typed after the key."""
    env: str | None = None
    """The environment variable that the value came from."""

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Written]]:
        """Everything below, with its path, in the order written; this node first."""
        yield path, self
        items = self.value.items() if isinstance(self.value, dict) else ()
        if isinstance(self.value, list):
            items = {str(n): item for n, item in enumerate(self.value)}.items()
        for key, item in items:
            yield from item.walk((*path, key))


class Unreadable(Exception):
    """The text is no YAML that a recipe can be; holds the one problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _CoreLoader(yaml.SafeLoader):
    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PREFIX + _core_tag(value)
        return _PREFIX + {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}[kind]


def _core_tag(text: str) -> str:
    return next((tag for tag, pattern in _CORE if pattern.fullmatch(text)), "str")


def scalar(text: str) -> Scalar:
    """What an unquoted `text` means.

    Raises:
        ValueError: A number of more digits than Python reads.
    """
    return _convert(text, _core_tag(text))


def _convert(text: str, tag: str) -> Scalar:
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if tag == "float":
        return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1].isalpha() else text)
    return text


def read(text: str, place: Place, folder: Path) -> tuple[Written, list[Problem]]:
    """Read one YAML document.

    Args:
        text: The document.
        place: Of the document: its file and rank. A line of 0 (as --set has) gives everything in it that one place.
        folder: What relative paths in it start from.

    Returns:
        The tree, and the mistakes that leave the rest of it readable: keys written twice, tags.

    Raises:
        Unreadable: Not YAML, nested too deeply, or expanding without end.
    """
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(_syntax(place, text, mark.index if mark else 0, error.problem or "not YAML")) from error
    except yaml.reader.ReaderError as error:
        what = (
            f"the character {chr(error.character)!r} cannot stand in YAML" if isinstance(error.character, int) else ""
        )
        raise Unreadable(_syntax(place, text, error.position, what or str(error.reason))) from error
    except RecursionError as error:
        raise Unreadable(Problem(place, "", "nested too deeply")) from error
    if node is None:
        return Written(None, place, folder, empty=True), []
    reader = _Reader(place, folder)
    return reader.written(node, node, ()), reader.problems


def _syntax(place: Place, text: str, index: int, what: str) -> Problem:
    before = text[:index]
    if place.line:
        place = Place(place.rank, before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1, place.file)
    return Problem(place, "", f"not valid YAML: {what}")


class _Reader:
    def __init__(self, place: Place, folder: Path) -> None:
        self.document, self.folder = place, folder
        self.problems: list[Problem] = []
        self.nodes = 0

    def place(self, node: yaml.Node) -> Place:
        if not self.document.line:
            return self.document
        mark = node.start_mark
        return Place(self.document.rank, mark.line + 1, mark.column + 1, self.document.file)

    def complain(self, node: yaml.Node, path: tuple[str, ...], what: str) -> None:
        self.problems.append(Problem(self.place(node), ".".join(path), what))

    def written(self, node: yaml.Node, key: yaml.Node, path: tuple[str, ...]) -> Written:
        self.nodes += 1
        if self.nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            what = "nested too deeply" if len(path) > _MAX_DEPTH else "its aliases expand to too much"
            raise Unreadable(Problem(self.place(key), ".".join(path[:3]), what))
        value: dict[str, Written] | list[Written] | Scalar
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            value = self.mapping(node, path)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            value = [self.written(item, item, (*path, str(n))) for n, item in enumerate(node.value)]
        else:
            value = self.scalar(node, path)
        return Written(value, self.place(key), self.folder, empty=node.start_mark.index == node.end_mark.index)

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Written]:
        items: dict[str, Written] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.complain(key, path, "a key has to be text")
                continue
            below = (*path, key.value)
            item = self.written(value, key, below)
            if key.value in items:
                self.complain(key, below, f"written twice; first at {items[key.value].place}")
            else:
                items[key.value] = item
        return items

    def scalar(self, node: yaml.Node, path: tuple[str, ...]) -> Scalar:
        tag = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.ScalarNode) and (tag == "str" or any(t == tag for t, _ in _CORE)):
            try:
                if tag == "str" or any(t == tag and pattern.fullmatch(node.value) for t, pattern in _CORE):
                    return _convert(node.value, tag)
            except ValueError:
                pass  # Python refuses numbers of thousands of digits
            self.complain(node, path, f"cannot be read as {tag}")
        else:
            self.complain(node, path, f"the tag {node.tag} means nothing in a recipe")
        return None
