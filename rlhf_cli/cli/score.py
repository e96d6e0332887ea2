"""`rlhf score`: rewards for a file of completions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.options import AsJson
from rlhf_cli.cli.show import out_result
from rlhf_cli.errors import UsageError


def add_to(app: typer.Typer) -> None:
    app.command()(score)


def score(
    model: Annotated[
        str, typer.Argument(metavar="RM", help="Run folder, folder of a reward model, or hub id.", show_default=False)
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Rows of prompt and completion or completions.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write here and go on from what is there.  [default: stdout]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the rewards of a file of completions, one JSON line a row."""
    if as_json and output is None:
        raise UsageError("--json says how it went, so the rows need a place of their own: --output FILE")
    if output is not None and output.resolve() == file.resolve():
        raise UsageError(f"{file} would be overwritten by its own rewards; name another --output")
    from rlhf_cli.live.open import open_display
    from rlhf_cli.stages import score as stage

    with open_display("auto", f"score {file.name}") as display:
        result = stage.run(model, file, output, sys.stdout, display.on_progress)
    if output is not None:
        out_result(result, as_json)
