"""The charts of the report: matplotlib draws, the page decides on colours and letters."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_cli.report.markup import esc
from rlhf_cli.report.record import Record

# Placeholders that matplotlib takes for colours; the page's stylesheet gives them their light and dark values.
_INK, _GRID = "#818182", "#919192"
BLUE, GREEN, AMBER, RED, VIOLET, GREY = "#a10001", "#a10002", "#a10003", "#a10004", "#a10005", "#a10006"
_COLOURS = {
    _INK: "currentColor",
    _GRID: "var(--line)",
    BLUE: "var(--blue)",
    GREEN: "var(--green)",
    AMBER: "var(--amber)",
    RED: "var(--red)",
    VIOLET: "var(--violet)",
    GREY: "var(--soft)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart and the columns of metrics.jsonl that it shows, which are also the columns of its table."""

    key: str
    title: str
    names: tuple[str, ...]
    draw: Callable[[Axes, Record], None]


def chart_svg(chart: Chart, record: Record) -> str:
    """The chart as an `<svg>` element for use inside HTML: no outside reference, the same bytes every time."""
    with drawing():
        figure = Figure(figsize=(5.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        chart.draw(axes, record)
        for step in record.resumed_after:
            axes.axvline(step + 0.5, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        for step in record.rolled_back_to:
            axes.axvline(step + 0.5, color=RED, linewidth=0.9)
        axes.set_xlabel("step", fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            _legend(axes, *axes.get_legend_handles_labels())
        return svg_of(figure, chart.key, chart.title)


def drawing() -> AbstractContextManager[None]:
    """The look of all charts, for as long as one is drawn and made into an SVG."""
    return rc_context(_STYLE)


def svg_of(figure: Figure, key: str, label: str) -> str:
    """The figure as `<svg>`: `key` sets its ids apart from those of others, `label` says it to who cannot see it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _for_html(out.getvalue(), key, label)


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """In one row above the chart, where it never covers a line."""
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=5,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _for_html(svg: str, key: str, label: str) -> str:
    head, _, body = svg[svg.index("<svg") :].strip().partition(">")
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Ids are unique in a page, and several charts share it.
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub("|".join(_COLOURS), lambda match: _COLOURS[match[0]], body)
    return f'{head} role="img" aria-label="{esc(label)}">{body}'


def _series(record: Record, name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in record.rows if _is_number(row.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _line(axes: Axes, record: Record, name: str, colour: str, label: str | None = None) -> None:
    steps, values = _series(record, name)
    if steps:
        marker = "o" if len(steps) < 60 else ""
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=2.8)


def _reward(axes: Axes, record: Record) -> None:
    steps, values = _series(record, "reward/mean")
    axes.plot(steps, values, color=BLUE, linewidth=0.9, alpha=0.5, marker="o", markersize=2.8, label="each step")
    if len(values) >= 5:
        axes.plot(steps, smooth(values), color=BLUE, linewidth=2.2, label="smoothed")
    steps, values = _series(record, "reward/length_controlled")
    if len(values) >= 5:
        axes.plot(steps, smooth(values), color=AMBER, linewidth=1.6, label="at the length of the first step")


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over at most five neighbours, fewer at the ends so that both ends stay where they are."""
    out = []
    for k in range(len(values)):
        reach = min(2, k, len(values) - 1 - k)
        window = values[k - reach : k + reach + 1]
        out.append(sum(window) / len(window))
    return out


def _kl(axes: Axes, record: Record) -> None:
    _line(axes, record, "kl/sequence_nats", VIOLET, "KL per completion")
    highest = max(_series(record, "kl/sequence_nats")[1], default=0.0)
    for name, colour in (("soft", AMBER), ("hard", RED)):
        cap = record.kl_caps.get(name)
        if cap is not None and cap < 4 * max(highest, 1):
            axes.axhline(cap, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), label=f"{name} limit {cap:g}")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_ylabel("nats", fontsize=8.5)


def _votes(axes: Axes, record: Record) -> None:
    steps, values = _series(record, "flow/votes_step")
    axes.bar(steps, values, color=GREEN, alpha=0.55, width=0.8, label="this step")
    axes.set_ylabel("votes a step", fontsize=8.5)
    total = axes.twinx()
    steps, values = _series(record, "flow/votes_total")
    total.plot(steps, values, color=BLUE, label="total")
    total.grid(visible=False)
    total.set_ylim(bottom=0)
    total.set_ylabel("votes in total", fontsize=8.5)
    bars, names = axes.get_legend_handles_labels()
    lines, more = total.get_legend_handles_labels()
    _legend(axes, [*bars, *lines], [*names, *more])


def _latency(axes: Axes, record: Record) -> None:
    _line(axes, record, "flow/latency_p50_s", GREEN, "half of the groups within")
    _line(axes, record, "flow/latency_p95_s", AMBER, "95% within")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds", fontsize=8.5)


def _staleness(axes: Axes, record: Record) -> None:
    _line(axes, record, "staleness/mean_steps", BLUE, "mean")
    _line(axes, record, "staleness/max_steps", GREY, "oldest group")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("steps", fontsize=8.5)


def _length(axes: Axes, record: Record) -> None:
    _line(axes, record, "length/mean_tokens", BLUE)
    axes.set_ylabel("tokens", fontsize=8.5)


def _learning(axes: Axes, record: Record) -> None:
    _line(axes, record, "train/accuracy", GREEN, "votes agreed with")
    axes.axhline(0.5, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)), label="chance")


def _update(axes: Axes, record: Record) -> None:
    _line(axes, record, "train/loss", BLUE, "loss")


def _moved(axes: Axes, record: Record) -> None:
    _line(axes, record, "train/ratio_mean", BLUE, "probability against that of sampling")
    _line(axes, record, "train/clip_frac", AMBER, "share clipped")
    axes.axhline(1, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)))


def _critic(axes: Axes, record: Record) -> None:
    _line(axes, record, "train/value_explained", VIOLET)
    axes.axhline(0, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)))


def _model(axes: Axes, record: Record) -> None:
    _line(axes, record, "rm/agreement", GREEN, "all votes")
    _line(axes, record, "rm/agreement_random", BLUE, "random groups")
    _line(axes, record, "rm/heldout_accuracy", AMBER, "held out")
    axes.axhline(0.5, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)), label="chance")


def _selection(axes: Axes, record: Record) -> None:
    _line(axes, record, "selection/people_total", GREEN, "groups that people saw")
    _line(axes, record, "selection/random_total", GREY, "drawn at random")
    axes.set_ylim(bottom=0)


def _drift(axes: Axes, record: Record) -> None:
    _line(axes, record, "drift/z_max", RED, "standard errors")
    _line(axes, record, "drift/rounds_total", BLUE, "targeted rounds so far")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(1.0, axes.get_ylim()[1]))


def _judge(axes: Axes, record: Record) -> None:
    _line(axes, record, "judge/position_bias", VIOLET, "position bias")
    _line(axes, record, "judge/inconsistent_frac", AMBER, "pairs that contradict")
    _line(axes, record, "judge/unusable_frac", RED, "no usable answer")
    axes.axhline(0, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)))


def _time(axes: Axes, record: Record) -> None:
    steps = [row["step"] for row in record.rows]
    parts = [("generate", BLUE), ("reference", VIOLET), ("wait", AMBER), ("train", GREEN), ("sync", GREY)]
    floor = [0.0] * len(steps)
    for name, colour in parts:
        measured = dict(zip(*_series(record, f"time/{name}_s"), strict=True))
        values = [measured.get(step, 0.0) for step in steps]
        if any(values):
            axes.bar(steps, values, bottom=floor, color=colour, width=0.8, label=name)
            floor = [a + b for a, b in zip(floor, values, strict=True)]
    axes.set_ylabel("seconds", fontsize=8.5)


CHARTS = (
    Chart("reward", "Reward", ("reward/mean", "reward/length_controlled", "reward/std"), _reward),
    Chart("kl", "Distance from the reference", ("kl/sequence_nats", "kl/token_nats"), _kl),
    Chart("votes", "Votes", ("flow/votes_step", "flow/votes_total", "flow/votes_per_group", "cost/usd"), _votes),
    Chart("latency", "How long people take", ("flow/latency_p50_s", "flow/latency_p95_s", "flow/in_flight"), _latency),
    Chart("staleness", "Age of what trains", ("staleness/mean_steps", "staleness/max_steps"), _staleness),
    Chart(
        "length",
        "Length of completions",
        ("length/mean_tokens", "length/mean_chars", "length/ended_frac", "length/reward_correlation"),
        _length,
    ),
    Chart("learning", "Agreement with the votes", ("train/accuracy", "train/margin"), _learning),
    Chart(
        "model",
        "Reward model and people",
        ("rm/agreement", "rm/agreement_random", "rm/heldout_accuracy", "rm/version", "rm/replay_groups"),
        _model,
    ),
    Chart(
        "selection",
        "What people see",
        ("selection/people_total", "selection/random_total", "selection/people_frac"),
        _selection,
    ),
    Chart("drift", "Drift", ("drift/z_max", "drift/cluster_worst", "drift/rounds_total", "drift/round_groups"), _drift),
    Chart(
        "judge",
        "How far the judge contradicts itself",
        ("judge/inconsistent_frac", "judge/position_bias", "judge/unusable_frac", "judge/cached_frac", "judge/usd"),
        _judge,
    ),
    Chart("update", "Updates", ("train/loss", "train/grad_norm", "train/beta", "train/entropy_nats"), _update),
    Chart("moved", "How far what trains has moved", ("train/ratio_mean", "train/clip_frac"), _moved),
    Chart(
        "critic",
        "What the critic foresees",
        ("train/value_explained", "train/value_loss", "train/value_clip_frac", "train/score"),
        _critic,
    ),
    Chart(
        "time",
        "Where the time goes",
        ("time/step_s", "time/generate_s", "time/reference_s", "time/wait_s", "time/train_s", "time/sync_s"),
        _time,
    ),
)
