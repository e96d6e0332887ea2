"""A recipe file -> a checked recipe, or every mistake in it at once.

What happens in order: read the file and those it extends, apply --set, fill in environment variables and paths, check
types and bounds, check the rules between sections. A mistake never hides one of a later step.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf_cli.errors import RecipeError, UsageError
from rlhf_cli.recipe.keys import KeyPath, field_at, is_file, is_source, section_of, suggestion, takes_text
from rlhf_cli.recipe.kinds import SUFFIXES, Section
from rlhf_cli.recipe.problems import Place, Problem, describe, looks_secret
from rlhf_cli.recipe.rules import broken_rules
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.simulated import simulated
from rlhf_cli.recipe.written import Scalar, Unreadable, Written, read, scalar
from rlhf_cli.text import without_userinfo

OWN = "own"
"""For `--simulate`: the taste of the recipe's own crowd."""
_SET_RANK = 1000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.\[\]%:+-]+)?")
_VARIABLE = re.compile(r"\$\$\{|\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A valid recipe and how it came about."""

    recipe: Recipe
    path: Path
    text: str
    """The file as it was read."""
    origins: dict[str, str]
    """Where each value came from, by dotted key: `file:line:column`, `--set`, `env NAME` or `default`."""
    places: dict[str, Place]
    """Where each written key was typed, by dotted key."""
    sets: tuple[str, ...] = ()
    """The `--set` overrides, as typed."""
    simulate: str | None = None
    """The taste of `--simulate`, `own` where none was named; None without it."""

    def command(self, name: str, *more: str) -> str:
        """`rlhf NAME` on this recipe as it has to be typed again, with the same overrides."""
        sets = [word for key in self.sets for word in ("--set", key)]
        taste = "" if self.simulate == OWN else f"={self.simulate}"
        simulate = [f"--simulate{taste}"] if self.simulate is not None else []
        return shlex.join(["rlhf", name, str(self.path), *sets, *simulate, *more])


def load_recipe(path: Path, sets: Sequence[str] = (), simulate: str | None = None) -> LoadedRecipe:
    """Read and check the recipe at `path`, with `--set` overrides such as `run_online.steps=10`.

    Args:
        simulate: The taste of simulated raters who take the place of whoever compares; `own` for that of the recipe's
            own crowd, None to leave the recipe as it is.

    Raises:
        RecipeError: Every mistake found, in the order of the file.
        UsageError: An override is not `key=value`.
    """
    loaded, problems = check_recipe(path, sets, simulate)
    if loaded is None:
        raise RecipeError([str(problem) for problem in problems])
    return loaded


def check_recipe(
    path: Path, sets: Sequence[str] = (), simulate: str | None = None
) -> tuple[LoadedRecipe | None, list[Problem]]:
    """Like `load_recipe`, but returns the mistakes; the recipe is None where there is one."""
    try:
        text, tree, problems = _read_file(str(path), 0, ())
    except Unreadable as error:
        return None, [error.problem]
    tree, more = _apply(sets, tree)
    problems += more
    if simulate is not None:
        tree = simulated(tree, None if simulate == OWN else simulate)
    found: dict[KeyPath, Problem] = {}
    tree = _settle(tree, (), found)
    nodes = dict(tree.walk())
    recipe, mistakes = _validated(tree, nodes)
    unread = {problem.key for problem in problems}
    rules = list(broken_rules(tree.plain()))
    for key, what in [*mistakes, *rules]:
        nearest = next(nodes[key[:n]] for n in range(len(key), -1, -1) if key[:n] in nodes)
        if ".".join(key) in unread and nearest.value is None:
            continue
        problem = Problem(nearest.place, ".".join(key), what)
        if (key, what) in rules:
            problems.append(problem)
        else:
            found.setdefault(key, problem)
    problems = sorted({*problems, *found.values()})
    if recipe is None or problems:
        return None, problems
    places = {".".join(key): node.place for key, node in nodes.items() if key}
    return LoadedRecipe(recipe, Path(path), text, _origins(nodes), places, tuple(sets), simulate), []


def _validated(tree: Written, nodes: dict[KeyPath, Written]) -> tuple[Recipe | None, list[tuple[KeyPath, str]]]:
    """Check types and bounds; the recipe is None where there are mistakes."""
    try:
        return Recipe.model_validate(tree.plain()), []
    except ValidationError as error:
        mistakes = describe(error.errors(include_url=False), list(nodes))
    # pydantic compares the keys of a section only where each of them is fine: look again without the wrong ones
    wrong = {key for key, _ in mistakes if key in nodes and not isinstance(nodes[key].value, dict)}
    try:
        Recipe.model_validate(_without(tree, wrong).plain())
    except ValidationError as error:
        between = [e for e in error.errors(include_url=False) if e["type"] == "problem"]
        keys = [{(*map(str, e["loc"]), key) for key in e["ctx"]["keys"]} for e in between]
        mistakes += describe([e for e, about in zip(between, keys, strict=True) if not about & wrong], list(nodes))
    return None, mistakes


def _without(node: Written, keys: set[KeyPath], path: KeyPath = ()) -> Written:
    if not isinstance(node.value, dict):
        return node
    kept = {key: item for key, item in node.value.items() if (*path, key) not in keys}
    return replace(node, value={key: _without(item, keys, (*path, key)) for key, item in kept.items()})


def _read_file(file: str, rank: int, above: tuple[Path, ...]) -> tuple[str, Written, list[Problem]]:
    """Read a recipe and, below it, those that it extends."""
    path = Path(file)
    text = _text(path, Place(rank, 0, 0, file))
    folder = Path(os.path.abspath(path)).parent
    tree, problems = read(text, Place(rank, 1, 1, file), folder)
    if tree.value is None:
        raise Unreadable(Problem(tree.place, "", "the recipe is empty"))
    if not isinstance(tree.value, dict):
        raise Unreadable(Problem(tree.place, "", "expected sections such as `model:` and `data:`"))
    extends = tree.value.pop("extends", None)
    if extends is None:
        return text, tree, problems
    above = (*above, path.resolve())
    found: dict[KeyPath, Problem] = {}
    base = _interpolated(extends, ("extends",), found, as_text=True)
    if found:
        raise Unreadable(found[("extends",)])
    if not isinstance(base.value, str):
        raise Unreadable(Problem(extends.place, "extends", "expected the path of the recipe to build on"))
    base_file = os.path.normpath(os.path.join(path.parent, os.path.expanduser(base.value)))
    if not os.path.isfile(base_file):
        raise Unreadable(Problem(extends.place, "extends", f"no such file: {base_file}"))
    if Path(base_file).resolve() in above:
        raise Unreadable(Problem(extends.place, "extends", f"goes round in a circle: {base_file} builds on this file"))
    _, base_tree, base_problems = _read_file(base_file, rank + 1, above)
    return text, _merged(base_tree, tree), problems + base_problems


def _text(path: Path, place: Place) -> str:
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise Unreadable(Problem(place, "", "is a folder; name the recipe file in it")) from None
    except FileNotFoundError:
        raise Unreadable(Problem(place, "", "no such file")) from None
    except (OSError, ValueError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else str(error)
        raise Unreadable(Problem(place, "", f"cannot be read: {reason}")) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        place = Place(place.rank, before.count(b"\n") + 1, column, place.file)
        raise Unreadable(Problem(place, "", "is not UTF-8 text")) from error


def _merged(base: Written, over: Written) -> Written:
    """`over` on top of `base`: mappings merge key by key, anything else replaces."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    both = {key: _merged(item, over.value[key]) if key in over.value else item for key, item in base.value.items()}
    return replace(over, value={**both, **{k: v for k, v in over.value.items() if k not in both}})


def _apply(sets: Sequence[str], tree: Written) -> tuple[Written, list[Problem]]:
    """Put `--set` values into the tree; later ones win. Relative paths in them start from the working folder."""
    problems = []
    for n, override in enumerate(sets):
        shown = f"--set {without_userinfo(override)}"
        place = Place(_SET_RANK + n, 0, 0, shown)
        name, equals, text = override.partition("=")
        path = tuple(name.strip().split("."))
        if not equals or not all(path):
            raise UsageError(f"{shown}: write it as key=value, such as --set run_online.steps=10")
        unknown = next((path[:n] for n in range(1, len(path) + 1) if field_at(path[:n]) is None), None)
        if unknown is not None:
            problems.append(Problem(place, "", "unknown key" + suggestion(unknown)))
            continue
        try:
            value, more = read(text, place, Path.cwd())
        except Unreadable as error:
            problems.append(error.problem)
        else:
            tree = _with(tree, path, replace(value, empty=False))
            problems += more
    return tree, problems


def _with(tree: Written, path: KeyPath, value: Written) -> Written:
    """`tree` with the value at `path` replaced, and the sections on the way there made where they are missing."""
    if not path:
        return value
    items = dict(tree.value) if isinstance(tree.value, dict) else {}
    below = items.get(path[0], Written({}, value.place, value.folder))
    return replace(tree, value={**items, path[0]: _with(below, path[1:], value)}, empty=False)


def _settle(node: Written, path: KeyPath, found: dict[KeyPath, Problem], list_of: FieldInfo | None = None) -> Written:
    """Fill in environment variables and paths, and find what only the text shows: secrets, missing files."""

    def complain(what: str) -> None:
        found.setdefault(path, Problem(node.place, ".".join(path), what))

    field = list_of or field_at(path)
    if isinstance(node.value, dict):
        return replace(node, value={key: _settle(item, (*path, key), found) for key, item in node.value.items()})
    if isinstance(node.value, list):
        items = enumerate(node.value)
        return replace(node, value=[_settle(item, (*path, str(n)), found, field) for n, item in items])
    if node.empty and field is not None and section_of(field) is not None:
        complain("nothing is written below it; fill it in, write `{}` for its defaults, or `null` to leave it out")
    if not isinstance(node.value, str):
        return node
    node = _interpolated(node, path, found, as_text=field is None or takes_text(field))
    if path and isinstance(node.value, str) and node.value:
        if looks_secret(path[-1], node.value):
            complain("looks like a secret; name an environment variable that holds it, such as FLOW_TOKEN")
        elif path in (("model", "path"), ("train_rm", "model")):
            return replace(node, value=_model_path(node.value, node.folder, complain))
        elif path in (("flow", "recording"), ("train_rm", "votes")):
            folder = os.path.abspath(node.folder / os.path.expanduser(node.value))
            if not os.path.isfile(os.path.join(folder, "journal.jsonl")):
                complain(f"is no run folder, it has no journal.jsonl: {folder}")
            return replace(node, value=folder)
        elif field is not None and is_source(field) and path not in found:
            return replace(node, value=_source(node.value, node.folder, complain))
        elif field is not None and is_file(field) and path not in found:
            file = os.path.abspath(node.folder / os.path.expanduser(node.value))
            if not os.path.isfile(file):
                complain(f"is a folder, not a file: {file}" if os.path.isdir(file) else f"no such file: {file}")
            return replace(node, value=file)
    return node


def _interpolated(node: Written, path: KeyPath, found: dict[KeyPath, Problem], *, as_text: bool) -> Written:
    """Replace `${env:NAME}` and `${env:NAME:-default}`; `$${` stands for `${`."""
    if not isinstance(node.value, str):
        return node
    name = None

    def value(match: re.Match[str]) -> str:
        nonlocal name
        if match[0] == "$${":
            return "${"
        if match[1] is None:
            what = "expected ${env:NAME} or ${env:NAME:-default}; write $${ for a plain ${"
        elif (known := os.environ.get(match[1]) or match[2]) is not None or match[1] in os.environ:
            name = match[1]
            return known or ""
        else:
            what = f"the environment variable {match[1]} is not set"
        found.setdefault(path, Problem(node.place, ".".join(path), what))
        return match[0]

    text = _VARIABLE.sub(value, node.value)
    if name is None:
        return replace(node, value=text)
    read_as: Scalar = text
    if not as_text:
        with suppress(ValueError):  # then it stays text, and is refused as such
            read_as = scalar(text)
    return replace(node, value=read_as, env=name)


def _model_path(value: str, folder: Path, complain: Callable[[str], None]) -> str:
    """A folder where there is one or where `value` can only mean one; else a packaged name or a hub id."""
    expanded = os.path.expanduser(value)
    for start in (folder, Path.cwd()):
        candidate = os.path.abspath(start / expanded)
        if os.path.isdir(candidate):
            return candidate
    if value.startswith(("./", "../", "/", "~")) or value in (".", ".."):
        complain(f"no such folder: {os.path.abspath(folder / expanded)}")
    return value


def _source(value: str, folder: Path, complain: Callable[[str], None]) -> str:
    """The path of a file of rows, or a hub id as it is written."""
    file = os.path.abspath(folder / os.path.expanduser(value))
    suffix = os.path.splitext(value)[1].lower()
    if _HUB_ID.fullmatch(value) and not re.fullmatch(r"\.[a-z]+", suffix) and not os.path.exists(os.path.dirname(file)):
        return value
    if suffix not in SUFFIXES:
        complain(f"expected a {', '.join(SUFFIXES)} file or a hub id such as org/name:train, got {value!r}")
    elif not os.path.isfile(file):
        complain(f"is a folder, not a file: {file}" if os.path.isdir(file) else f"no such file: {file}")
    return file


def _origins(nodes: dict[KeyPath, Written]) -> dict[str, str]:
    """Where the value of every key that holds one came from."""

    def below(section: type[Section], path: KeyPath) -> Iterator[tuple[str, str]]:
        for name, field in section.model_fields.items():
            here = (*path, name)
            inner, node = section_of(field), nodes.get(here)
            if inner is not None and (isinstance(node.value, dict) if node else field.default_factory):
                yield from below(inner, here)
            elif node is None:
                yield ".".join(here), "default"
            elif node.env is not None:
                yield ".".join(here), f"env {node.env}"
            else:
                yield ".".join(here), str(node.place) if node.place.line else node.place.file.split()[0]

    return dict(below(Recipe, ()))
