"""What `rlhf train-rm` says at its end: how far to trust the reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_cli.evaluation.verdict import rows
from rlhf_cli.text import one_line


def print_honesty(report: Mapping[str, Any], file: TextIO) -> None:
    """Show a `train_rm/report.json` on `file`: sentences, a table and warnings on a terminal, plain lines elsewhere."""
    if file.isatty():
        _on_terminal(Console(file=file), report)
        return
    for text in report["words"]:
        file.write(f"{one_line(text)}\n")
    for name, value, interval, of in rows(dict(report)):
        beside = ", ".join(filter(None, (interval, of)))
        file.write(one_line(f"{name}: {value}{f' ({beside})' if beside else ''}") + "\n")
    for text in report["warnings"]:
        file.write(f"WARNING: {one_line(text)}\n")


def _on_terminal(console: Console, report: Mapping[str, Any]) -> None:
    console.print(Text("\nHow far to trust this reward model", "bold"))
    for text in report["words"]:
        console.print(Text(one_line(text)))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("on held-out votes", overflow="fold")
    for title in ("", "95% interval", "measured on"):
        table.add_column(title, justify="right")
    for row in rows(dict(report)):
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print()
    console.print(table)
    for text in report["warnings"]:
        console.print(Text(f"\nWARNING: {one_line(text)}", "bold yellow"))
    if not report["warnings"]:
        console.print(Text("\nNothing in these figures speaks against using it.", "green"))
