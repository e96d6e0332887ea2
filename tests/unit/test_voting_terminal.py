"""`rlhf vote`: a real process in a pseudo-terminal against a real server, and the screen it draws."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from flow_world import until
from rich.console import Console

from rlhf_cli.cli.vote_screen import view
from rlhf_cli.flow.base import Responses
from rlhf_cli.flow.wire import Lease
from rlhf_cli.server.embedded import EmbeddedFlow

HOSTILE = "[red]markup[/red] [link=http://x]y[/link] \x1b]0;title\x07 \x1b[2J \u202edesrever :smile:"


class Terminal:
    """A process with a terminal of its own, and all that it wrote there."""

    def __init__(self, *arguments: str, columns: int = 100, lines: int = 30, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns, lines, slave)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_cli", "vote", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            start_new_session=True,
        )
        self.output = ""

    def resize(self, columns: int, lines: int, fd: int | None = None) -> None:
        ioctl(self._master if fd is None else fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        time.sleep(0.5)  # past the time in which keys are taken for the pair before
        os.write(self._master, keys.encode())

    def read(self) -> str:
        while select.select([self._master], [], [], 0)[0]:
            self.output += os.read(self._master, 65536).decode("utf-8", "replace")
        return self.output

    def shows(self, text: str) -> None:
        until(lambda: text in self.read())

    def end(self) -> int:
        until(lambda: (self.read(), self.process.poll() is not None)[1])
        self.read()
        return self.process.returncode

    def settings(self) -> list[object]:
        return termios.tcgetattr(self._slave)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def flow(tmp_path: Path) -> Iterator[EmbeddedFlow]:
    with EmbeddedFlow(tmp_path / "server.sqlite") as flow:
        yield flow


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


def item(flow: EmbeddedFlow, texts: list[str]) -> None:
    store = flow.store
    flow_id = store.create_flow("f", "Which is better?", Responses(1, 20, 20))
    dataset_id = store.create_dataset("d")
    for i, text in enumerate(texts):
        store.add_datapoint(dataset_id, i, text)
    store.create_item(flow_id, dataset_id, "Why is it so?", 600)


def link(flow: EmbeddedFlow) -> str:
    rater_id, _ = flow.store.tokens.add("rater", "Ada")
    return f"{flow.url}/join/{flow.store.tokens.add_link(rater_id)}"


def test_keys_vote_undo_and_quit_and_the_terminal_is_as_it_was(flow: EmbeddedFlow, opened: list[Terminal]) -> None:
    item(flow, [f"text {i} {HOSTILE}" for i in range(6)])
    opened.append(terminal := Terminal(link(flow)))
    terminal.shows("Answer 1")
    terminal.press("1")
    terminal.shows("Answer 1 it is.")
    terminal.press("\x1b[C")
    terminal.shows("Answer 2 it is.")
    terminal.press("u")
    terminal.shows("Taken back.")
    terminal.press("0")
    terminal.resize(60, 24)
    until(lambda: len(flow.store.votes()) == 3)
    terminal.press("q")
    assert terminal.end() == 0
    assert [(v.outcome, v.undone) for v in flow.store.votes()] == [("left", False), ("right", True), ("tie", False)]
    assert "2 votes" in terminal.output
    assert terminal.output.count("\x1b[?25l") == terminal.output.count("\x1b[?25h") == 1
    assert terminal.output.rindex("\x1b[?1049l") > terminal.output.rindex("\x1b[?1049h")
    assert terminal.settings() == terminal.before
    assert "[red]markup[/red]" in terminal.output
    for forbidden in ("\x1b]0;", "\x1b[2J", "\u202e", "\x07"):
        assert forbidden not in terminal.output


def test_ctrl_c_ends_it_cleanly(flow: EmbeddedFlow, opened: list[Terminal]) -> None:
    item(flow, ["one", "two"])
    opened.append(terminal := Terminal(link(flow)))
    terminal.shows("Answer 1")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "\x1b[?25h" in terminal.output
    assert "Traceback" not in terminal.output
    assert terminal.settings() == terminal.before


def test_a_token_from_the_environment_will_do_and_a_used_link_will_not(
    flow: EmbeddedFlow, opened: list[Terminal]
) -> None:
    item(flow, ["one", "two", "three"])
    _, secret = flow.store.tokens.add("rater", "Bob")
    opened.append(terminal := Terminal(flow.url, "--token-env", "RATER", RATER=secret))
    terminal.shows("Answer 2")
    terminal.press("b")
    until(flow.store.votes)
    terminal.press("q")
    assert terminal.end() == 0
    used = link(flow)
    flow.store.tokens.redeem_link(used.rpartition("/")[2])
    for arguments, environment in (((used,), {}), ((flow.url, "--token-env", "RATER"), {"RATER": "wrong"})):
        opened.append(terminal := Terminal(*arguments, **environment))
        assert terminal.end() == 4
        assert "does not let you in" in terminal.output


def test_without_a_terminal_it_refuses_with_exit_2() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rlhf_cli", "vote", "http://127.0.0.1:9"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "terminal" in run.stderr


def pair(left: str, right: str, prompt: str = "Why?") -> Lease:
    return Lease(lease="x", prompt=prompt, instruction="Which?", left=left, right=right, expires=0)


@pytest.mark.parametrize(("width", "height"), [(120, 40), (90, 24), (60, 24), (40, 12), (20, 8)])
def test_the_screen_fits_whatever_the_size(width: int, height: int) -> None:
    long = pair("left words " * 300, "right words " * 200, "prompt words " * 100)
    for scroll in (0, 7, 10_000):
        shown = view(Console(width=width), long, "status", 3, width, height, scroll)
        assert len(shown.lines) <= height
        assert all(line.cell_len <= width for line in shown.lines)


def test_answers_stand_side_by_side_where_there_is_room_and_below_each_other_where_not() -> None:
    def at(width: int) -> list[str]:
        return [line.plain for line in view(Console(), pair("AAA", "BBB"), "", 0, width, 24, 0).lines]

    assert any("AAA" in line and "BBB" in line for line in at(120))
    assert not any("AAA" in line and "BBB" in line for line in at(60))
    assert any("BBB" in line for line in at(60))


def test_every_line_of_a_long_answer_can_be_scrolled_to() -> None:
    words = [f"word{i}" for i in range(400)]
    seen = ""
    scroll = 0
    while True:
        shown = view(Console(), pair(" ".join(words), "short"), "", 0, 60, 20, scroll)
        seen += "\n".join(line.plain for line in shown.lines)
        if shown.scroll < scroll:
            break
        scroll += 5
    assert all(word in seen for word in words)


def test_model_text_is_never_markup_and_hides_nothing() -> None:
    plain = "\n".join(line.plain for line in view(Console(), pair(HOSTILE, "x"), "", 0, 200, 24, 0).lines)
    assert "[red]markup[/red]" in plain
    assert "<U+202E>" in plain
    assert "\x1b" not in plain


def test_a_terminal_says_that_it_cannot_mark_anything_where_the_page_can() -> None:
    one = pair("AAA", "BBB")
    for asks in (False, True):
        lease = one.model_copy(update={"segments": asks})
        lines = [line.plain for line in view(Console(), lease, "", 0, 120, 24, 0).lines]
        assert any("only the page in a browser" in line for line in lines) == asks
