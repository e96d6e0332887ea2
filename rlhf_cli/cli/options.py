"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as run_online.steps=10; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
RunFolder = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Run folder.  [default: runs/NAME-OF-RECIPE]")
]
Output = Annotated[
    Literal["auto", "live", "plain", "jsonl"],
    typer.Option(help="How progress shows on stderr; auto is live on a terminal, plain elsewhere."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier attempt stopped.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again, whatever an earlier attempt left.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would ask and cost, as `rlhf plan` does.")]
TASTES = ("kind", "brief", "letters")
"""Of simulated raters, as in `flow.crowd.taste`."""
Simulate = Annotated[
    Literal["own", "kind", "brief", "letters"] | None,
    typer.Option(
        metavar="[TASTE]",
        show_choices=False,
        help="Rehearse with simulated raters in place of whoever compares, without money; their taste is that of the "
        "recipe's crowd, or TASTE: kind, brief or letters. The run folder is runs/NAME-OF-RECIPE-simulated.",
    ),
]
Data = Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of the server.", show_default=False)]
