"""Small pieces of HTML. Every text passes through `esc`, so what a model wrote is never more than text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_cli.journal.metrics import METRICS
from rlhf_cli.text import visible


def esc(text: object) -> str:
    """`text` for use between tags or inside a quoted attribute; hidden characters become visible names."""
    return html.escape(visible(str(text)), quote=True)


def model_text(text: str, css: str = "model") -> str:
    """A block of model text with its line breaks, in the direction of its own script."""
    return f'<p class="{css}" dir="auto">{esc(text)}</p>'


def section(title: str, lead: str, body: str) -> str:
    return f'<section>\n<h2>{esc(title)}</h2>\n<p class="soft">{lead}</p>\n{body}\n</section>'


def details(title: str, body: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{body}</details>"


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values; values that are None are left out."""
    cells = "".join(f"<tr><td>{esc(k)}</td><td>{esc(v)}</td></tr>" for k, v in rows if v is not None)
    return f'<table class="facts">{cells}</table>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "scroll") -> str:
    """A table of cells that are already HTML; it scrolls where it is too large, up and down too unless `whole`."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="{css}"><table><tr>{top}</tr>{body}</table></div>'


def figure_of(name: str, value: object) -> str:
    """A metric's value in the metric's own format; a dash where there is none."""
    if isinstance(value, int | float) and math.isfinite(value):
        return format(value, METRICS[name].form if name in METRICS else ".4g")
    return "\u2013"


def known(values: dict[str, Any], *names: str) -> list[float] | None:
    """The numbers of these names, or None unless all of them are there and finite."""
    numbers = [values.get(name) for name in names]
    if all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return [float(n) for n in numbers if n is not None]
    return None


def interval_bar(low: float, mean: float, high: float, axis: tuple[float, float], mark: float, css: str = "bar") -> str:
    """An interval as a band with its middle on `axis`, with a tick at `mark`."""
    left, right = axis
    scale = 100 / (right - left)
    x_low, x, x_high, x_mark = ((min(max(v, left), right) - left) * scale for v in (low, mean, high, mark))
    colour = "var(--green)" if low > mark else "var(--red)" if high < mark else "var(--soft)"
    return (
        f'<svg class="{css}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="M0 5H100" stroke="var(--line)" vector-effect="non-scaling-stroke"/>'
        f'<path d="M{x_mark:.2f} 0V10" stroke="currentColor" opacity=".45" vector-effect="non-scaling-stroke"/>'
        f'<path d="M{x_low:.2f} 5H{x_high:.2f}" stroke="{colour}" stroke-width="6" opacity=".4" '
        f'vector-effect="non-scaling-stroke"/>'
        f'<path d="M{x:.2f} 1.5V8.5" stroke="{colour}" stroke-width="3" vector-effect="non-scaling-stroke"/></svg>'
    )
