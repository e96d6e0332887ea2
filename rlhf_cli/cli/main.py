"""The command `rlhf`. Commands check the recipe first and import what they need inside, so that --help is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rlhf_cli import __version__
from rlhf_cli.cli import check, crowd, models, people, report, score, serve, stages, topics, vote, votes
from rlhf_cli.cli.crash import write_crash
from rlhf_cli.cli.options import TASTES
from rlhf_cli.cli.show import err
from rlhf_cli.errors import RecipeError, RlhfError

# Set before anything imports torch; whoever set them already knows better.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

app = typer.Typer(
    name="rlhf",
    help="End-to-end online RLHF from a recipe file: people vote while the model trains.",
    epilog="Exit codes: rlhf help exit-codes",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


check.add_to(app)
stages.add_to(app)
report.add_to(app)
models.add_to(app)
score.add_to(app)
serve.add_to(app)
people.add_to(app)
crowd.add_to(app)
vote.add_to(app)
votes.add_to(app)
topics.add_to(app)


def main() -> None:
    """Run the command line; every way in which it can end is decided here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app(_with_taste(sys.argv[1:]), prog_name="rlhf")
    except RlhfError as error:
        err(f"error: {_headline(error)}{error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        file = write_crash(error)
        err(f"error: unexpected {type(error).__name__}, a bug in rlhf; please report it with {file}")
        sys.exit(1)


def _with_taste(arguments: list[str]) -> list[str]:
    """`--simulate` may stand alone, which typer has no option for: then it says that the taste is the recipe's own."""
    after = [*arguments[1:], ""]
    return [
        f"{word}=own" if word == "--simulate" and following not in TASTES else word
        for word, following in zip(arguments, after, strict=True)
    ]


def _headline(error: RlhfError) -> str:
    """The problems of a recipe keep their lines as they are, for editors that jump to file:line:column."""
    if not isinstance(error, RecipeError):
        return ""
    return "the recipe has a mistake\n" if len(error.problems) == 1 else f"{len(error.problems)} mistakes\n"
