"""What reaches the terminal: results on stdout, everything else on stderr, control characters of strangers nowhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rlhf_cli.text import one_line, visible


def out(text: str) -> None:
    """Print a result. Whoever closed the pipe has seen enough, which is no error."""
    try:
        print(visible(text))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def err(text: str) -> None:
    """Print a diagnosis."""
    print(visible(text), file=sys.stderr)


def out_json(document: object) -> None:
    """Print one JSON document."""
    out(json.dumps(document, indent=2, default=str))


def out_result(result: Mapping[str, Any], as_json: bool) -> None:
    """Print what a stage found: JSON, a table for each part of it on a terminal, `key: value` lines elsewhere."""
    if as_json:
        out_json(result)
    elif not sys.stdout.isatty():
        out("\n".join(f"{key}: {_cell(value)}" for key, value in _flat(result)))
    else:
        for part, rows in groupby(_flat(result), key=lambda row: row[0].partition(".")[0] if "." in row[0] else ""):
            if part:
                out(f"\n{part}")
            out_rows([{"": f"  {key.removeprefix(f'{part}.')}", " ": value} for key, value in rows])


def out_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that share their keys: a table on a terminal, one line each elsewhere."""
    if not rows:
        return
    cells = [[_cell(value) for value in row.values()] for row in rows]
    if not sys.stdout.isatty():
        out("\n".join("\t".join(line) for line in cells))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=any(key.strip() for key in rows[0]))
    for n, key in enumerate(rows[0]):
        table.add_column(key, style="dim" if n == 0 else None, overflow="fold")
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)


def _flat(result: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested figures under dotted keys; what is not known is left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", value))
    return rows


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))
