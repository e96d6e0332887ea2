"""How far to trust the reward model: the section of the report that shows `train_rm/report.json`."""

from __future__ import annotations

from typing import Any

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
    return table(head, [[esc(cell) for cell in row] for row in rows(report)], "scroll whole")


def _reliability(report: dict[str, Any]) -> str:
    calibration = report["calibration"]
    if calibration is None:
        return ""
    temperature = f"At temperature {report['temperature']['value']:.3g}"
    figures = _diagram(calibration["before"], "before", "As trained") + _diagram(
        calibration["after"], "after", temperature
    )
    note = (
        "Each point holds about as many votes as the others, with its 95% interval. On the line it is as often right "
        "as it says; below, it promises too much."
    )
    return (
        f'<h3 style="margin-top:22px">Is it as often right as it says?</h3><p class="soft">{note}</p>'
        f'<div class="charts" style="margin-bottom:14px">{figures}</div>'
    )


def _diagram(measured: dict[str, Any], when: str, title: str) -> str:
    """Share of votes that went the model's way against the probability that it gave them, bin by bin."""
    bins = measured["bins"]
    says = [b["said"] for b in bins]
    right, low, high = ([b["was"][key] for b in bins] for key in ("value", "low", "high"))
    with drawing():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.vlines(says, low, high, color=BLUE, linewidth=1, alpha=0.6)
        axes.plot(says, right, color=BLUE, marker="o", markersize=4)
        axes.set_xlabel("says", fontsize=8.5)
        axes.set_ylabel("is right", fontsize=8.5)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.4, *low) - 0.02, 1.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        said = "; ".join(f"says {a:.0%}, is right {b:.0%}" for a, b in zip(says, right, strict=True))
        svg = svg_of(figure, f"reliability-{when}", f"Reliability, {title.lower()}: {said}")
    cells = []
    for b in bins:
        interval = f"{percent(b['was']['low'])} to {percent(b['was']['high'])}"
        numbers = [f"{b['votes']:,.0f}", f"{b['pairs']:,}"]
        cells.append([percent(b["said"]), percent(b["was"]["value"]), interval, *numbers])
    head = ["says", "is right", "95% interval", "votes", "pairs"]
    return (
        f'<figure class="card"><figcaption><h3>{esc(title)}</h3><p>Calibration error {percent(measured["ece"])}; '
        f"by chance alone {percent(measured['ece_by_chance'])}.</p></figcaption>{svg}"
        f"{details('Numbers', table(head, cells))}</figure>"
    )
