"""`rlhf report`: a run folder as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.show import out
from rlhf_cli.errors import UsageError


def add_to(app: typer.Typer) -> None:
    app.command()(report)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    file: Annotated[Path | None, typer.Option("--out", "-o", help="The page.  [default: report.html in it]")] = None,
) -> None:
    """Make one HTML page of a run, running or finished, that needs no network to read."""
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder; `rlhf run RECIPE` makes one")
    from rlhf_cli.report.build import build_report

    out(str(build_report(run, file)))
