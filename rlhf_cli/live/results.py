"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_cli.text import one_line


def results_table(result: Mapping[str, Any]) -> Table:
    """`eval/results.json`, to which the caller adds `cost_usd`, `seconds` and `report`; unknown rows are left out."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value, style in _rows(result):
        table.add_row(Text(label), Text(value, style))
    return table


def print_results(result: Mapping[str, Any], file: TextIO) -> None:
    """Show the results on `file`: a table on a terminal, `label: value` lines elsewhere."""
    if file.isatty():
        Console(file=file).print(results_table(result))
        return
    for label, value, _ in _rows(result):
        file.write(f"{label}: {value}\n")


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and style of every row whose figures are known."""

    def say(form: str, *keys: str) -> str:
        return form.format(*(result[key] for key in keys)) if all(result.get(key) is not None for key in keys) else ""

    reward = say("{:.3f} \u2192 {:.3f}", "reward_before", "reward_after")
    gain = say("  gain {:+.3f}", "reward_gain") + say(
        " (95%: {:+.3f} to {:+.3f})", "reward_gain_low", "reward_gain_high"
    )
    rate = say("{:.1%}", "win_rate") + say(" (95%: {:.1%} to {:.1%})", "win_rate_low", "win_rate_high")
    judge = say(" judged by {}", "judge") + say(", {:.0f} held-out prompts", "prompts")
    rows = [
        ("win rate", rate and rate + judge, "bold"),
        ("reward", reward + gain, "bold"),
        ("KL", say("{:.2f} nats a completion", "kl_sequence_nats") + say(", {:.4f} a token", "kl_token_nats"), ""),
        ("length", say("{:.0f} \u2192 {:.0f} tokens", "length_before_tokens", "length_after_tokens"), ""),
        ("votes used", say("{:,.0f}", "votes"), ""),
        (
            "judge",
            say("position bias {:+.1%}", "judge_position_bias")
            + say(", {:.0%} of pairs contradict", "judge_inconsistent_frac")
            + say(", ${:,.2f}", "judge_usd"),
            "",
        ),
        ("cost", say("${:,.2f}", "cost_usd"), ""),
        ("time", say("{:,.0f} s", "seconds"), ""),
    ]
    for name, gate in (result.get("gates") or {}).items():
        verdict = "passed" if gate["passed"] else "FAILED"
        value = f"{verdict}: {_short(gate['value'])} against {_short(gate['limit'])}"
        rows.append((f"gate {one_line(name)}", value, "green" if gate["passed"] else "bold red"))
    rows.append(("report", say("{}", "report"), ""))
    return [(label, one_line(value.strip()), style) for label, value, style in rows if value.strip()]


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
