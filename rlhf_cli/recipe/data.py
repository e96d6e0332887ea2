"""The data that a recipe names, as rows that were checked.

Every reader reports what is wrong as `file:line: what`, the first ten mistakes at once, and returns nothing half-read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from rlhf_cli.errors import DataError
from rlhf_cli.recipe.rows import Row, Turn, completion_of, prompt_of, text_of, turns_of, wrong
from rlhf_cli.recipe.sources import Complaint, Hub, draw, is_held_out, mixture, scan
from rlhf_cli.recipe.votes import VotedGroup, VoteRow, alone, voted_groups, voted_row

if TYPE_CHECKING:  # the nouns bring numpy, which `rlhf validate` does without
    from rlhf_cli.recipe.schema import Part, Recipe
    from rlhf_cli.types import Message, Prompt

Dataset: TypeAlias = "Path | str | list[Part]"
"""A file, a hub id, or a mixture."""
Heldout = float | Path | str | None
"""A share of the prompts, or a source of its own."""

MAX_SHOWN = 10

T = TypeVar("T")
S = TypeVar("S", bound=Path | str)
Rows = list[tuple[int, T]]
"""Rows of a file, each with its line."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """Supervised rows, a raw text as a str, and where each stands."""

    rows: list[tuple[Message, ...] | str]
    wheres: list[str]

    def __len__(self) -> int:
        return len(self.rows)


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


def read_conversations(
    dataset: Dataset, heldout: Heldout = None, *, seed: int = 0, hub: Hub | None = None
) -> tuple[Conversations, Conversations]:
    """Read rows of `{"messages"}` or `{"prompt", "completion"}`, or of `{"text"}`: raw text comes back as a str.

    Args:
        dataset: A source, or a mixture: the largest with these shares in which no row comes twice.
        heldout: A source; or the share of the prompts of `dataset` to keep apart, chosen by their hash; or nothing.
        seed: Says which rows of a part go into the mixture.

    Returns:
        Training rows and held-out rows.

    Raises:
        DataError: Malformed, empty, a conversation that does not end with the assistant's turn, or raw text among them.
    """

    def load(source: Path | str) -> list[tuple[str, tuple[Turn, ...] | str]]:
        return [(place(source, n), row) for n, row in _sound(source, _conversation_row, _one_kind, hub)]

    train, kept_apart = _split(dataset, heldout, load, lambda row: _asked(row[1]), seed)
    for where, row in [*train, *kept_apart]:
        if isinstance(row, str) is not isinstance(train[0][1], str):
            raise DataError(
                f"{where}: raw text and conversations together (the first row is {train[0][0]}); train on one kind"
            )
    return _conversations(train), _conversations(kept_apart)


def _conversations(rows: Sequence[tuple[str, tuple[Turn, ...] | str]]) -> Conversations:
    from rlhf_cli.types import Message

    texts = [row if isinstance(row, str) else tuple(Message(*turn) for turn in row) for _, row in rows]
    return Conversations(texts, [where for where, _ in rows])


def read_votes(
    dataset: Dataset, heldout: Heldout = None, *, seed: int = 0, hub: Hub | None = None
) -> tuple[list[VotedGroup], list[VotedGroup]]:
    """Groups to train on and held-out groups, from sources, mixtures and shares as in `read_conversations`.

    Raises:
        DataError: As `read_voted_groups`.
    """
    return _split(dataset, heldout, lambda source: read_voted_groups(source, hub), lambda group: group.key, seed)


def read_voted_groups(source: Path | str, hub: Hub | None = None) -> list[VotedGroup]:
    """Read votes in any of the shapes of `recipe.votes`; the name of the file is the source of rows that name none.

    Raises:
        DataError: Malformed, empty, a matrix that does not fit its completions, or a group without any vote.
    """
    rows = _sound(source, voted_row, _in_company, hub)
    name = source if isinstance(source, str) else source.stem
    return voted_groups([(place(source, line), row) for line, row in rows], name)


def check_files(recipe: Recipe) -> list[Complaint]:
    """Every mistake in the data files that the recipe names, without numpy or torch.

    Rows of Parquet files and of the hub are looked at when they are loaded.
    """
    found: dict[Path, list[Complaint]] = {}
    for prompts in filter(None, (recipe.data.prompts, recipe.data.heldout_prompts) if recipe.data else ()):
        found[prompts] = _checked(prompts, _prompt_row, _ids_once)[1]
    for texts in _files(recipe.sft.dataset, recipe.sft.heldout) if recipe.sft else ():
        found[texts] = [*found.get(texts, []), *_checked(texts, _conversation_row, _one_kind)[1]]
    for votes in _files(recipe.train_rm.dataset, recipe.train_rm.heldout) if recipe.train_rm else ():
        found[votes] = [*found.get(votes, []), *_checked(votes, voted_row, _in_company)[1]]
    return [complaint for bad in found.values() for complaint in _first(bad)]


def _files(dataset: Dataset | None, heldout: Heldout) -> list[Path]:
    """The files that can be read line by line, each once."""
    sources = [source for source, _ in parts_of(dataset)] if dataset is not None else []
    return list(dict.fromkeys(s for s in [*sources, heldout] if isinstance(s, Path) and s.suffix != ".parquet"))


def parts_of(dataset: Dataset) -> list[tuple[Path | str, float]]:
    """Sources and weights."""
    return [(part.source, part.weight) for part in dataset] if isinstance(dataset, list) else [(dataset, 1.0)]


def _split(
    dataset: Dataset, heldout: Heldout, load: Callable[[Path | str], list[T]], key: Callable[[T], str], seed: int
) -> tuple[list[T], list[T]]:
    """What to train on, mixed, and what is held out: the rows of its own source, or the share chosen by `key`."""
    share = heldout if isinstance(heldout, float) else 0.0
    train: list[list[T]] = []
    kept_apart: list[T] = []
    for source, _ in parts_of(dataset):
        rows = load(source)
        train.append([row for row in rows if not is_held_out(key(row), share)])
        kept_apart += [row for row in rows if is_held_out(key(row), share)]
    if isinstance(heldout, Path | str):
        kept_apart = load(heldout)
    elif share and not kept_apart:
        raise DataError(f"a held-out share of {share:g} leaves no row to measure on; make it larger")
    counts = mixture([len(part) for part in train], [weight for _, weight in parts_of(dataset)])
    mixed = [
        part[k]
        for n, (part, count) in enumerate(zip(train, counts, strict=True))
        for k in draw(len(part), count, f"{seed}/{n}")
    ]
    if not mixed:
        raise DataError("no row is left to train on; make the held-out share smaller, or look at the weights")
    return mixed, kept_apart


def place(source: Path | str, line: int) -> str:
    """A row in messages: the name of its file and its line."""
    return f"{source if isinstance(source, str) else source.name}:{line}"


def _first(bad: list[Complaint]) -> list[Complaint]:
    """The mistakes that are worth showing of one file."""
    more = [Complaint(bad[0].file, 0, f"... and {len(bad) - MAX_SHOWN} more")] if len(bad) > MAX_SHOWN else []
    return bad[:MAX_SHOWN] + more


def _asked(row: tuple[Turn, ...] | str) -> str:
    return row if isinstance(row, str) else json.dumps(row[:-1])


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


def _ids_once(path: Path, rows: Rows[tuple[str | None, tuple[Turn, ...]]]) -> list[Complaint]:
    first: dict[str, int] = {}
    ids = [(line, name or f"{path.stem}-{line}") for line, (name, _) in rows]
    return [
        Complaint(path, line, f"id {name!r} is used in line {first[name]} already")
        for line, name in ids
        if first.setdefault(name, line) != line
    ]


def _one_kind(path: Path | str, rows: Rows[tuple[Turn, ...] | str]) -> list[Complaint]:
    return [
        Complaint(path, line, "raw text and conversations in one file; keep them apart")
        for line, row in rows
        if isinstance(row, str) is not isinstance(rows[0][1], str)
    ]


def _in_company(path: Path | str, rows: Rows[VoteRow]) -> list[Complaint]:
    return [Complaint(path, line, what) for line, what in alone(rows)]


def _checked(
    path: S, row: Callable[[Row], T], across: Callable[[S, Rows[T]], list[Complaint]], hub: Hub | None = None
) -> tuple[Rows[T], list[Complaint]]:
    """Every sound row with its line, and every mistake: in a row, or `across` the rows."""
    rows: Rows[T] = []
    bad: list[Complaint] = []
    for line, found in scan(path, row, hub):
        if isinstance(found, Complaint):
            bad.append(found)
        else:
            rows.append((line, found))
    return rows, bad + across(path, rows)


def _sound(
    path: S, row: Callable[[Row], T], across: Callable[[S, Rows[T]], list[Complaint]], hub: Hub | None = None
) -> Rows[T]:
    rows, bad = _checked(path, row, across, hub)
    if bad:
        raise DataError("\n".join(map(str, _first(bad))))
    return rows
