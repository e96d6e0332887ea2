"""Where rows come from: JSONL, CSV and Parquet files, datasets of the hub, and mixtures of several.

A JSONL file holds one object a line, in UTF-8, blank lines allowed. In a CSV file the first line names the keys; an
empty cell is a key that is not there, and a cell that is a JSON list is that list (turns, matrices, ratings).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from rlhf_cli.recipe.rows import Row, Wrong, wrong

T = TypeVar("T")

Hub = Callable[[str], Iterable[Row]]
"""Rows of a dataset of the hub, by its id; given by those who may import what fetches them."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong in one line of a data file; line 0 is the file as a whole. In tables, lines are rows from 1."""

    file: Path | str
    line: int
    what: str

    def __str__(self) -> str:
        return ": ".join([f"{self.shown}:{self.line}" if self.line else self.shown, self.what])

    @property
    def shown(self) -> str:
        """The file as a person in the working folder would type it."""
        if isinstance(self.file, str):
            return self.file
        near = os.path.relpath(self.file)
        return str(self.file) if near.startswith("..") else near


def scan(source: Path | str, row: Callable[[Row], T], hub: Hub | None = None) -> Iterator[tuple[int, T | Complaint]]:
    """Each row of a source with its line, as `row` reads it, or what is wrong with it."""
    empty = True
    try:
        for number, raw in _raw(source, hub):
            empty = False
            try:
                yield number, row(raw())
            except Wrong as mistake:
                yield number, Complaint(source, number, str(mistake))
    except OSError as error:
        yield 0, Complaint(source, 0, f"cannot be read: {error.strerror or error}")
    except Wrong as mistake:
        yield 0, Complaint(source, 0, str(mistake))
    else:
        if empty:
            yield 0, Complaint(source, 0, "holds no rows")


def mixture(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows each part gives: the largest mixture with these shares in which no row comes twice.

    The part that is smallest for its weight is used up; of the others, what is left over stays out.
    """
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, round(weight * total)) for size, weight in zip(sizes, weights, strict=True)]


def draw(size: int, count: int, seed: str) -> list[int]:
    """Which `count` of `size` rows a part gives, in the order of the part; the same for the same seed everywhere."""
    return sorted(random.Random(seed).sample(range(size), count))


def is_held_out(key: str, share: float) -> bool:
    """Whether what `key` says belongs to the held-out share; by its hash, so on every machine alike."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def _raw(source: Path | str, hub: Hub | None) -> Iterator[tuple[int, Callable[[], Row]]]:
    if isinstance(source, str):
        assert hub is not None, f"{source} is on the hub, and nobody here fetches from it"
        return ((n, _given(row)) for n, row in enumerate(hub(source), 1))
    readers = {".csv": _csv, ".parquet": _parquet}
    return readers.get(source.suffix.lower(), _jsonl)(source)


def _given(row: Row) -> Callable[[], Row]:
    return lambda: {key: value for key, value in row.items() if value is not None}


def _jsonl(path: Path) -> Iterator[tuple[int, Callable[[], Row]]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if line:
                yield number, lambda line=line: _object(line)  # type: ignore[misc]


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


def _not_a_number(text: str) -> NoReturn:
    raise Wrong(f"{text} is not JSON and not a number that means anything here")


def _csv(path: Path) -> Iterator[tuple[int, Callable[[], Row]]]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            line = 2
            for row in rows:
                yield line, lambda row=row: _cells(row)  # type: ignore[misc]
                line = rows.line_num + 1  # a cell may span lines: a row stands where it begins
    except UnicodeDecodeError:
        wrong("is not UTF-8 text")
    except csv.Error as error:
        wrong(f"not valid CSV after line {rows.line_num}: {error}")


def _cells(row: dict[str | None, str | None]) -> Row:
    if None in row or None in row.values():
        wrong("has more or fewer cells than the first line has names")
    cells: Row = {}
    for key, cell in row.items():
        if cell:
            cells[str(key)] = _list_or_text(cell)
    return cells


def _list_or_text(cell: str) -> object:
    """A JSON list where the cell is one; brackets around anything else are text."""
    if cell.lstrip().startswith("[") and cell.rstrip().endswith("]"):
        try:
            return json.loads(cell, parse_constant=_not_a_number)
        except (ValueError, RecursionError):
            return cell
    return cell


def _parquet(path: Path) -> Iterator[tuple[int, Callable[[], Row]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                    yield number, _given(row)
    except pyarrow.ArrowInvalid as error:
        wrong(f"not a Parquet file: {error}")
