"""The report as one page: the verdict first, then charts, texts and where everything came from."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template
from typing import Any

from rlhf_cli.journal.metrics import METRICS
from rlhf_cli.report.guards import ages_section, guards_section
from rlhf_cli.report.markup import details, esc, facts, figure_of, interval_bar, known, section, table
from rlhf_cli.report.plots import CHARTS, Chart
from rlhf_cli.report.record import Record
from rlhf_cli.report.reward_model import reward_model_section
from rlhf_cli.report.style import STYLE
from rlhf_cli.report.texts import groups_section, roles_section, samples_section, supervised_section

MOST_TABLE_ROWS = 400

# The policy comes before anything it should govern: no scripts, no fetches, no forms, nothing from anywhere.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
form-action 'none'">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def page(record: Record, charts: Sequence[tuple[Chart, str]]) -> str:
    """The whole document; `charts` pairs each chart with its SVG."""
    body = [
        _top(record),
        *(f'<div class="card problem"><p>{esc(problem)}</p></div>' for problem in record.problems),
        _verdict(record),
        reward_model_section(record.honesty),
        _charts(record, charts),
        guards_section(record),
        ages_section(record),
        roles_section(record),
        samples_section(record),
        supervised_section(record),
        groups_section(record),
        section(
            "Recipe", "As it was given, word for word.", f"<pre>{esc(record.recipe) or 'No recipe.yaml yet.'}</pre>"
        ),
        _provenance(record),
    ]
    return _PAGE.substitute(title=f"{esc(record.name)} \u00b7 rlhf", style=STYLE, body="\n".join(body))


def _top(record: Record) -> str:
    stopped, current = record.state.stopped, record.state.current
    if stopped is not None and stopped.exit_code:
        state, css = f"exit code {stopped.exit_code}: {stopped.reason.splitlines()[0]}", "bad"
    elif current is not None:
        state, css = f"in {current.stage}: still running, or killed there", "open"
    elif "eval" in record.state.stages:
        state, css = "finished", "good"
    else:
        state, css = f"{list(record.state.stages)[-1]} done" if record.state.stages else "not begun", "open"
    return f'<div class="top"><h1>{esc(record.name)}</h1><span class="state {css}">{esc(state)}</span></div>'


def _verdict(record: Record) -> str:
    results = record.results
    sentences = [_win_rate(results), _reward(results)]
    if not any(sentences) and not record.state.steps:
        sentences = [_sft(record), _reward_model(record)]
    if not any(sentences):
        sentences = ["Not evaluated yet: <code>rlhf eval</code> compares the trained policy with the SFT model."]
    text = "".join(f"<p>{sentence}</p>" for sentence in sentences if sentence)
    rate = known(results, "win_rate_low", "win_rate", "win_rate_high")
    bar = ""
    if rate:
        ends = "<span>0%: SFT model always wins</span><span>50%</span><span>100%: trained policy always wins</span>"
        bar = interval_bar(rate[0], rate[1], rate[2], (0, 1), 0.5, "wide") + f'<div class="scale">{ends}</div>'
    small = []
    if known(results, "prompts"):
        small.append(f"{results['prompts']:g} held-out prompts, each counting once.")
    if results.get("judge"):
        votes = f", {results['votes']:g} votes" if known(results, "votes") else ""
        small.append(f"Judge: {esc(results['judge'])}{votes}.")
    if results.get("reward_source"):
        small.append(f"Reward: {esc(results['reward_source'])}.")
    note = f'<p class="soft">{" ".join(small)}</p>' if small else ""
    return f'<section class="card verdict">{text}{bar}{note}</section>{_tiles(record)}{_gates(results)}'


def _sft(record: Record) -> str:
    """What became of the loss, for a run that is no more than a supervised one."""
    finished = record.state.stages.get("sft")
    if finished is None:
        return ""
    loss = known(finished.summary, "heldout_loss_before", "heldout_loss")
    if loss is None:
        return "Supervised fine-tuning is done. Nothing was held out, so nothing says what the model gained."
    return f"Supervised fine-tuning is done: held-out loss from {loss[0]:.3f} to <b>{loss[1]:.3f}</b> nats per token."


def _reward_model(record: Record) -> str:
    if "train-rm" not in record.state.stages:
        return ""
    if not record.honesty:
        return "A reward model is trained. Nothing was held out, so nothing says how far to trust it."
    return f"A reward model is trained. {esc(' '.join(record.honesty['words'][:1]))}"


def _win_rate(results: dict[str, Any]) -> str:
    rate = known(results, "win_rate")
    if rate is None:
        return ""
    bounds = known(results, "win_rate_low", "win_rate_high")
    said = f"<b>{rate[0]:.1%}</b> of comparisons with the SFT model"
    if bounds is None:
        return f"The trained policy wins {said}."
    low, high = bounds
    interval = f"(95% interval {low:.1%} to {high:.1%})"
    if low > 0.5:
        return f"The trained policy is <b>preferred</b>: it wins {said} {interval}."
    if high < 0.5:
        return f"The trained policy is <b>worse</b>: it wins {said} {interval}."
    return f"There is <b>no clear difference</b>: the trained policy wins {said} {interval}."


def _reward(results: dict[str, Any]) -> str:
    ends = known(results, "reward_before", "reward_after")
    if ends is None:
        return ""
    gain = known(results, "reward_gain", "reward_gain_low", "reward_gain_high")
    text = f"Reward on held-out prompts went from {ends[0]:.3f} to <b>{ends[1]:.3f}</b>"
    if gain is None:
        return f"{text}."
    verdict = "" if gain[1] > 0 or gain[2] < 0 else ", which may be chance"
    return f"{text}: {gain[0]:+.3f} (95% interval {gain[1]:+.3f} to {gain[2]:+.3f}){verdict}."


def _tiles(record: Record) -> str:
    last, results = record.rows[-1] if record.rows else {}, record.results
    kl = known(results, "kl_sequence_nats") or known(last, "kl/sequence_nats")
    cost = known(last, "cost/usd")
    lengths = known(results, "length_before_tokens", "length_after_tokens")
    votes = record.state.votes_total or (known(last, "flow/votes_total") or [0.0])[0]
    tiles = [
        (f"{len(record.state.steps)}", "learner steps"),
        (f"{votes:,.0f}" if votes else None, "votes of people"),
        (f"{kl[0]:.2f}" if kl else None, "nats of KL per completion"),
        (f"{lengths[0]:.0f} \u2192 {lengths[1]:.0f}" if lengths else None, "tokens per completion"),
        (f"${cost[0]:,.2f}" if cost else None, "spent"),
        (_duration(record.seconds), "from first to last event"),
    ]
    cells = "".join(f'<div class="card tile"><b>{v}</b><span>{k}</span></div>' for v, k in tiles if v is not None)
    return f'<div class="tiles">{cells}</div>'


def _gates(results: dict[str, Any]) -> str:
    gates = results.get("gates")
    if not isinstance(gates, dict) or not gates:
        return ""
    chips = []
    for name, gate in gates.items():
        css, word = ("up", "passed") if gate.get("passed") else ("down", "failed")
        against = " against ".join(esc(_short(gate.get(key))) for key in ("value", "limit"))
        chips.append(f'<span class="chip {css}">gate {esc(name)} {word}: {against}</span>')
    return f'<p style="margin-top:14px">{"".join(chips)}</p>'


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _charts(record: Record, charts: Sequence[tuple[Chart, str]]) -> str:
    if not record.rows:
        return section("Training", "No step has been trained yet, so there is nothing to draw.", "")
    lead = "One point per learner step."
    if record.resumed_after:
        lead += f" Dotted lines: the run was picked up again after step {', '.join(map(str, record.resumed_after))}."
    if record.rolled_back_to:
        steps = ", ".join(map(str, record.rolled_back_to))
        lead += f" Red lines: rolled back to step {steps}; the steps that were given up are not drawn."
    if missing := [chart.title.lower() for chart in CHARTS if not record.measured(chart.names[0])]:
        lead += f" Not measured in this run: {esc(', '.join(missing))}."
    figures = "\n".join(_chart(record, chart, svg) for chart, svg in charts)
    return section("Training", lead, f'<div class="charts">{figures}</div>')


def _chart(record: Record, chart: Chart, svg: str) -> str:
    names = [name for name in chart.names if record.measured(name)]
    head = f"<h3>{esc(chart.title)}</h3>"
    stride = -(-len(record.rows) // MOST_TABLE_ROWS)
    rows = record.rows[::stride]
    cells = [[str(row["step"]), *(figure_of(name, row.get(name)) for name in names)] for row in rows]
    thinned = "" if stride == 1 else f"<p>One step in {stride}; all of them are in metrics.jsonl.</p>"
    columns = ["step", *(f'<span title="{esc(METRICS[n].help)}">{esc(METRICS[n].label)}</span>' for n in names)]
    return (
        f'<figure class="card"><figcaption>{head}<p>{esc(METRICS[names[0]].help)}</p></figcaption>{svg}'
        f"{details('Numbers', thinned + table(columns, cells))}</figure>"
    )


def _provenance(record: Record) -> str:
    state, environment = record.state, record.environment
    packages = environment.get("packages") or {}
    flow = state.flow
    rows: list[tuple[str, object]] = [
        ("run", state.run_id),
        ("seed", state.started.seed if state.started else environment.get("seed")),
        ("attempt", state.attempt or None),
        ("flow", f"{flow.flow_id} at {flow.service}" if flow else None),
        ("asked", flow.instruction if flow else None),
        (
            "votes per group",
            f"{flow.min_votes} at least, {flow.desired_votes} desired, {flow.max_votes} at most" if flow else None,
        ),
        ("git", environment.get("git")),
        ("python", environment.get("python")),
        ("platform", environment.get("platform")),
        ("device", environment.get("device")),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items()) or None),
    ]
    stages = [
        (
            name,
            f"{done.seconds:.1f} s"
            + "".join(f" \u00b7 {k} {_short(v)}" for k, v in done.summary.items() if v is not None),
        )
        for name, done in state.stages.items()
    ]
    checked = (
        "Checked while reading the journal: every line is whole and in its place, every trained group has votes, "
        "and no group is in two steps."
        if state.run_id and not record.problems
        else "The journal could not be checked."
    )
    body = [
        facts(rows),
        "<h3 style='margin-top:22px'>Groups</h3>",
        facts(record.fates()),
        f'<p class="soft">{checked}</p>',
    ]
    if stages:
        body += ["<h3 style='margin-top:22px'>Stages</h3>", facts(stages)]
    if record.results:
        body.append(details("All of eval/results.json", facts((k, v) for k, v in record.results.items())))
    return section("Where this came from", "Enough to do it again.", f'<div class="card">{"".join(body)}</div>')


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
