"""`rlhf help TOPIC`: what is not about one command."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_cli.cli.show import out
from rlhf_cli.errors import UsageError

_EXIT_CODES = """\
code      meaning                                                        a script should
0         done                                                           go on
1         a bug; the traceback file is named                             report it
2         wrong usage                                                    fix the call
3         recipe or data invalid, or an earlier stage is missing         fix the recipe
4         credentials missing or refused                                 fix the secret
5         finished, a gate failed                                        treat it as a failed test
6         budget or deadline reached; checkpoint saved                   raise it, resume
7         diverged (NaN, hard KL limit); last good checkpoint kept       change the recipe
8         run folder locked by a living process, or damaged              wait, or look at the folder
75        outside failure past the retry deadline; checkpoint saved      resume later
130, 143  SIGINT, SIGTERM; checkpoint saved                              resume"""

_ENVIRONMENT = """\
HF_HUB_OFFLINE=1    never ask the model hub; packaged models and folders need no hub anyway
NO_COLOR=1          no colours
CI                  set to anything: progress as plain lines, never as a live view
any other           recipes read ${env:NAME} or ${env:NAME:-default}; secrets are only ever named, as in `token_env`"""

_TOPICS = {"exit-codes": _EXIT_CODES, "environment": _ENVIRONMENT}


def add_to(app: typer.Typer) -> None:
    app.command("help")(show_topic)


def show_topic(
    topic: Annotated[str, typer.Argument(help=f"One of: {', '.join(_TOPICS)}.", show_default=False)],
) -> None:
    """Explain what is not about one command: exit-codes, environment."""
    if topic not in _TOPICS:
        raise UsageError(f"no help on '{topic}'; there is help on {' and '.join(_TOPICS)}")
    out(_TOPICS[topic])
