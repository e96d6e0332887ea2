"""`rlhf vote`: the voting page in a terminal, for one person at a keyboard."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cli.cli.show import err
from rlhf_cli.errors import CredentialsError, UsageError

if TYPE_CHECKING:
    from rlhf_cli.cli.ballot import Ballot
    from rlhf_cli.flow.wire import Outcome

BLIND_S = 0.4
"""Keys pressed right after a pair appears were meant for the one before."""
TICK_S = 0.2
PAGE = 10
_ACTS: dict[str, Outcome] = {
    "1": "left",
    "\x1b[D": "left",
    "\x1bOD": "left",
    "2": "right",
    "\x1b[C": "right",
    "\x1bOC": "right",
    "0": "tie",
    "\x1b[B": "tie",
    "\x1bOB": "tie",
    "b": "both_bad",
    "s": "skip",
}
_UNDO = ("u", "\x7f", "\x08")
_SCROLL = {" ": PAGE, "j": 1, "k": -1, "\x1b[A": -1, "\x1bOA": -1, "\x1b[5~": -PAGE, "\x1b[6~": PAGE}


def add_to(app: typer.Typer) -> None:
    app.command()(vote)


def vote(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A one-time link, or a server's address.", show_default=False)
    ],
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds a rater's token.")
    ] = None,
) -> None:
    """Vote in this terminal: two answers, one key. q or Ctrl-C ends it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        raise UsageError("rlhf vote needs a terminal to show pairs and to read keys; people can vote in a browser too")
    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise CredentialsError(f"{token_env} is not set; it has to hold a rater's token")

    from rlhf_cli.cli.ballot import Ballot, connect

    with closing(connect(url, token)) as http:
        ballot = Ballot(http)
        try:
            _run(ballot)
        finally:
            if ballot.waiting:
                ballot.tick()
            lost = f"; {ballot.waiting} could not be sent" if ballot.waiting else ""
            err(f"{ballot.votes} votes{lost}")


def _run(ballot: Ballot) -> None:
    import shutil
    import time

    from rich.console import Console

    from rlhf_cli.cli.vote_screen import renderable, view

    console = Console(markup=False, highlight=False, emoji=False)
    drawn: object = None
    on_screen, since, scroll = None, 0.0, 0
    with _raw_keys(sys.stdin.fileno()) as keys, console.screen(hide_cursor=True) as screen:
        while True:
            ballot.tick()
            if ballot.current is not on_screen:
                on_screen, since, scroll = ballot.current, time.monotonic(), 0
            width, height = shutil.get_terminal_size()
            state = (id(on_screen), ballot.status, ballot.votes, width, height, scroll)
            if state != drawn:
                lease = on_screen.lease if on_screen else None
                shown = view(console, lease, ballot.status, ballot.votes, width, height, scroll)
                scroll, drawn = shown.scroll, (*state[:5], shown.scroll)
                screen.update(renderable(shown))
            key = next(keys)
            if key in ("q", "\x04"):
                return
            scroll += _SCROLL.get(key, 0)
            if time.monotonic() - since < BLIND_S:
                continue
            if key in _UNDO:
                ballot.undo()
            elif key in _ACTS:
                ballot.answer(_ACTS[key])


@contextmanager
def _raw_keys(fd: int) -> Iterator[Iterator[str]]:
    """Keys as they are pressed, an empty string when none is for a while. The terminal is put back as it was."""
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)  # Ctrl-C stays a signal
        yield _keys(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


def _keys(fd: int) -> Iterator[str]:
    import select

    while True:
        if not select.select([fd], [], [], TICK_S)[0]:
            yield ""
            continue
        pressed = os.read(fd, 64).decode("utf-8", "replace")
        if not pressed:
            yield "\x04"  # the terminal has gone
        # A special key arrives in one piece and starts with an escape; anything else is one key a character.
        yield from [pressed] if pressed.startswith("\x1b") else pressed.lower()
