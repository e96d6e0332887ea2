"""A pair as lines of a terminal. Model text becomes `rich.text.Text` with hidden characters named, never markup."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.text import Text

from rlhf_cli.flow.wire import Lease
from rlhf_cli.text import visible

BESIDE = 90
"""Columns from which the answers stand side by side."""
GAP = 4
KEYS = "1 \u2190 answer 1   2 \u2192 answer 2   0 \u2193 equal   b both bad   s skip   u undo   space k scroll   q quit"
NO_MARKS = "Words of these answers may be marked as good or bad, which only the page in a browser can do."
SHORT_KEYS = "1 2 better  0 equal  b bad  s skip  u undo  q quit"


@dataclass(frozen=True, slots=True)
class View:
    """What fits on the screen, and how far one can scroll."""

    lines: list[Text]
    scroll: int
    """As asked for, but never past the end."""


def view(console: Console, lease: Lease | None, status: str, votes: int, width: int, height: int, scroll: int) -> View:
    """The whole screen: question and prompt on top, answers below, keys and status at the bottom."""
    keys = KEYS if len(KEYS) <= width else SHORT_KEYS
    bottom = [Text(keys[:width], "dim"), Text(f"{votes} votes   {visible(status)}"[:width], "dim")]
    if lease is None:
        lines = [Text("Nothing to vote on right now; new pairs appear here by themselves.")[:width]]
        return View(_tall(lines, height - len(bottom)) + bottom, 0)
    instruction = Text(visible(lease.instruction), "bold").wrap(console, width)
    prompt = Text(visible(lease.prompt)).wrap(console, max(1, width - 2))
    room = max(1, height // 4)
    top = [*instruction[:2], *(Text.assemble(("\u258e ", "blue"), line) for line in prompt[:room])]
    if len(prompt) > room:
        top[-1] = Text("\u258e \u2026 the whole prompt stands below the answers", "blue")
    top.append(Text())
    body = _answers(console, lease, width)
    if len(prompt) > room:
        body += [Text(), Text("Prompt", "dim"), *prompt]
    if lease.segments:
        body += [Text(), *Text(NO_MARKS, "dim").wrap(console, width)]
    space = max(1, height - len(top) - len(bottom) - 1)
    scroll = max(0, min(scroll, len(body) - space))
    shown = body[scroll : scroll + space]
    below = len(body) - scroll - space
    more = Text(f"\u2193 {below} more lines, space to scroll" if below > 0 else "", "yellow")[:width]
    lines = [*top, *_tall(shown, space), more, *bottom][:height]
    for line in lines:
        line.truncate(width)
    return View(lines, scroll)


def _answers(console: Console, lease: Lease, width: int) -> list[Text]:
    texts = [lease.left, lease.right]
    if lease.kind == "image":
        texts = [f"[an image: {path}]\n\nA terminal shows none; skip it, or vote in a browser." for path in texts]
    if width < BESIDE:
        lines: list[Text] = []
        for number, text in enumerate(texts, 1):
            lines += [Text(f"Answer {number}", "bold cyan"), *Text(visible(text)).wrap(console, width), Text()]
        return lines
    column = (width - GAP) // 2
    columns = [Text(visible(text)).wrap(console, column) for text in texts]
    lines = [_beside(Text("Answer 1", "bold cyan"), Text("Answer 2", "bold cyan"), column)]
    for i in range(max(map(len, columns))):
        left, right = (lines_[i] if i < len(lines_) else Text() for lines_ in columns)
        lines.append(_beside(left, right, column))
    return lines


def _beside(left: Text, right: Text, column: int) -> Text:
    left = left.copy()
    left.truncate(column, pad=True)
    return Text.assemble(left, " " * GAP, right)


def _tall(lines: list[Text], height: int) -> list[Text]:
    return [*lines, *(Text() for _ in range(height - len(lines)))]


def renderable(shown: View) -> RenderableType:
    """For a console; no line wraps, because each already fits."""
    for line in shown.lines:
        line.no_wrap, line.overflow = True, "crop"
    return Group(*shown.lines)
