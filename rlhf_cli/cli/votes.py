"""`rlhf votes export`: the votes of a run, for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf_cli.cli.show import err, out
from rlhf_cli.errors import UsageError

_votes = typer.Typer(help="The votes of a run.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(_votes, name="votes")


@_votes.callback()
def _group() -> None:
    pass


@_votes.command("export")
def export_votes(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    view: Annotated[
        Literal["matrices", "pairs", "votes", "preferences"],
        typer.Option("--as", help="A row per group, pair or single vote; preferences are TRL's, one per majority."),
    ] = "matrices",
    form: Annotated[
        Literal["jsonl", "csv"], typer.Option("--format", help="JSON lines are exact; CSV is safe in spreadsheets.")
    ] = "jsonl",
    part: Annotated[Literal["run-online", "eval"], typer.Option("--stage", help="Whose votes.")] = "run-online",
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write it here instead of printing it.")] = None,
) -> None:
    """Print the votes of a run that is running, finished or dead."""
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder; `rlhf run RECIPE` makes one")
    from rlhf_cli.stages.votes_export import as_text, export

    rows = export(run, view, part)
    text = as_text(rows, form)
    if file is not None:
        from rlhf_cli.journal.run_dir import write_atomic

        write_atomic(file, text.encode())
    elif rows:
        out(text.removesuffix("\n"))
    err(f"{len(rows)} rows")
