"""How far to trust the reward model: the section of the report that shows `train_rm/report.json`."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_cli.evaluation.verdict import percent, rows
from rlhf_cli.report.markup import details, esc, section, table
from rlhf_cli.report.plots import BLUE, GREY, drawing, svg_of

_LEAD = (
    "Measured on votes that it never saw. The temperature is fitted on one half of their prompts, its effect shown on "
    "the other half."
)


def reward_model_section(report: dict[str, Any]) -> str:
    """Words, warnings, the reliability plot and the table; nothing where the run has no report."""
    if not report:
        return ""
    words = "".join(f"<p>{esc(text)}</p>" for text in report["words"])
    warnings = "".join(
        f'<div class="card problem"><p><b>Warning.</b> {esc(text)}</p></div>' for text in report["warnings"]
    )
    body = f'<div class="card">{words}</div>{warnings}{_reliability(report)}<div class="card">{_table(report)}</div>'
    return section("Reward model: how far to trust it", _LEAD, body)


def _table(report: dict[str, Any]) -> str:
    head = ["on held-out votes", "", "95% interval", "measured on"]
    return table(head, [[esc(cell) for cell in row] for row in rows(report)])


def _reliability(report: dict[str, Any]) -> str:
    calibration = report["calibration"]
    if calibration is None:
        return ""
    with drawing():
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        both = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, when in zip(both, ("before", "after"), strict=True):
            _diagram(axes, calibration[when], _title(report, when))
        both[0].set_ylabel("is right", fontsize=8.5)
        svg = svg_of(figure, "reliability", _in_words(report))
    cells = []
    for when in ("before", "after"):
        for b in calibration[when]["bins"]:
            says, was, low, high = map(percent, (b["said"], b["was"]["value"], b["was"]["low"], b["was"]["high"]))
            cells.append([when, says, was, f"{low} to {high}", f"{b['votes']:,.0f}", f"{b['pairs']:,}"])
    head = ["scaling", "says", "is right", "95% interval", "votes", "pairs"]
    return (
        '<figure class="card" style="margin:14px 0"><figcaption><h3>Is it as right as it is sure?</h3>'
        "<p>Each point is a tenth of the votes or more, with its 95% interval. On the line it is as often right as it "
        f"says; below the line it promises too much.</p></figcaption>{svg}{details('Numbers', table(head, cells))}"
        "</figure>"
    )


def _title(report: dict[str, Any], when: str) -> str:
    ece = f"calibration error {percent(report['calibration'][when]['ece'])}"
    if when == "before":
        return f"as trained: {ece}"
    return f"at temperature {report['temperature']['value']:.3g}: {ece}"


def _diagram(axes: Axes, measured: dict[str, Any], title: str) -> None:
    said = [b["said"] for b in measured["bins"]]
    was = [b["was"]["value"] for b in measured["bins"]]
    below = [b["was"]["value"] - b["was"]["low"] for b in measured["bins"]]
    above = [b["was"]["high"] - b["was"]["value"] for b in measured["bins"]]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.errorbar(said, was, yerr=[below, above], color=BLUE, marker="o", markersize=4, linewidth=1.4, elinewidth=1)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel("says", fontsize=8.5)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.4, *(b["was"]["low"] for b in measured["bins"])) - 0.02, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _in_words(report: dict[str, Any]) -> str:
    """The plot for those who cannot see it."""

    def points(when: str) -> str:
        bins = report["calibration"][when]["bins"]
        return ", ".join(f"says {b['said']:.0%} is right {b['was']['value']:.0%}" for b in bins)

    return f"Reliability, {_title(report, 'before')}: {points('before')}; {_title(report, 'after')}: {points('after')}"
