"""`rlhf models`: weights that come from a package registry and need no model hub."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_cli.cli.options import AsJson
from rlhf_cli.cli.show import out, out_json, out_rows

_models = typer.Typer(help="Packaged models: weights without a model hub.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(_models, name="models")


@_models.command()
def pull(name: Annotated[str, typer.Argument(help="As shown by `rlhf models ls`.", show_default=False)]) -> None:
    """Download a packaged model, check it, and make it loadable, once."""
    from rlhf_cli.live.open import open_display
    from rlhf_cli.policy import packaged

    with open_display("auto", f"models pull {name}") as display:
        folder = packaged.pull(name, display.on_progress)
    out(str(folder))


@_models.command()
def ls(as_json: AsJson = False) -> None:
    """List packaged models, and which of them are here."""
    from rlhf_cli.policy import packaged

    models = packaged.listing()
    if as_json:
        out_json(models)
    else:
        out_rows(models)
