"""What the live view shows, as lines of text: pure, so that a test can read it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.text import Text

from rlhf_cli.journal.events import Event, FlowOpened, GroupRanked, RolledBack, StageFinished, StageStarted, StepTrained
from rlhf_cli.text import one_line

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_PARTS = {"generate": "cyan", "reference": "blue", "wait": "yellow", "train": "green", "sync": "magenta"}
_LABEL = 8
_SUPERVISED = ("sft", "train-rm")
_TRAINS = (*_SUPERVISED, "run-online")
"""Stages that count steps."""


@dataclass
class Seen:
    """Everything told so far that is still worth showing."""

    title: str
    started: float = field(default_factory=time.monotonic)
    stage: str = ""
    step: int = 0
    now: dict[str, float] = field(default_factory=dict)
    """The latest value of every metric and status figure."""
    reward: dict[int, float] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    loss: dict[int, float] = field(default_factory=dict)
    """Of the supervised stage that runs."""
    ranked: list[float] = field(default_factory=list)
    """Votes of each group ranked since the last step."""
    rollbacks: int = 0
    """Since this process began."""

    def event(self, event: Event) -> None:
        match event:
            case StageStarted():
                self.stage = event.stage
                if event.stage in _TRAINS:
                    self.step = 0
                    self.loss.clear()
            case StageFinished():
                self.stage = ""
                if event.stage in _SUPERVISED:
                    self.step = 0  # its steps are none of the loop's
            case FlowOpened():
                self.now |= {
                    "flow/min_votes": event.min_votes,
                    "flow/desired_votes": event.desired_votes,
                    "flow/max_votes": event.max_votes,
                }
            case GroupRanked() if event.by_people:
                self.ranked.append(event.matrix().votes)
            case StepTrained():
                self.ranked.clear()
            case RolledBack():
                self.step = event.to_step
                self.rollbacks += 1
                for series in (self.reward, self.kl):
                    for step in [step for step in series if step > event.to_step]:
                        del series[step]
            case _:
                pass

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        self.step = step
        if "reward/mean" in row:
            self.now.pop("reward/length_controlled", None)  # one of an earlier step says nothing beside it
        self.now |= row
        for name, series in (
            ("reward/mean", self.reward),
            ("kl/sequence_nats", self.kl),
            ("sft/loss", self.loss),
            ("train_rm/loss", self.loss),
        ):
            if math.isfinite(row.get(name, math.nan)):
                series[step] = row[name]

    def status(self, row: Mapping[str, float]) -> None:
        self.now |= row


def panel(seen: Seen, width: int) -> list[Text]:
    """The picture, at most `width` columns wide; rows of which nothing is known yet are left out."""
    lines = [_head(seen, width)]
    if seen.now.get("flow/circuit_open"):
        lines.append(
            _row("service", (f"unreachable for {seen.now['flow/unreachable_s']:.0f} s, asking again", "yellow"))
        )
    if seen.stage in _SUPERVISED:
        lines += _supervised(seen, width)
    elif "run/steps_total" in seen.now or seen.step:
        lines += [_reward(seen, width), _kl(seen, width), *_votes(seen, width), *_known(seen), *_pace(seen, width)]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as a row of at most `width` blocks; longer series are averaged down."""
    if len(values) > width:
        edges = [round(k * len(values) / width) for k in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values, default=0), max(values, default=0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(_BLOCKS[round((v - low) * scale)] for v in values)


def noise(values: Sequence[float]) -> float | None:
    """Standard deviation of the noise in a drifting series; None for fewer than three values.

    Source: the mean square successive difference of von Neumann (1941).
    """
    steps = [b - a for a, b in pairwise(values)]
    return math.sqrt(sum(d * d for d in steps) / len(steps) / 2) if len(steps) > 1 else None


def _head(seen: Seen, width: int) -> Text:
    elapsed = int(time.monotonic() - seen.started)
    total = seen.now.get("run/steps_total")
    step = f"step {seen.step}" + (f"/{total:.0f}" if total else "") if seen.step or total else ""
    right = "  ".join(part for part in (seen.stage, step, f"{elapsed // 60}:{elapsed % 60:02}") if part)
    left = one_line(seen.title)[: max(0, width - len(right) - 7)]
    gap = " " * max(2, width - len(left) - len(right) - 6)
    return Text.assemble(("rlhf ", "bold magenta"), (left, "bold"), gap, right)


def _row(label: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "dim"), *parts)


def _supervised(seen: Seen, width: int) -> list[Text]:
    values = [seen.loss[step] for step in sorted(seen.loss)]
    if not values:
        return []
    now = seen.now
    section = seen.stage.replace("-", "_")
    facts = _facts(
        now,
        (f"{section}/heldout_loss", "held out {:.3f}"),
        (f"{section}/accuracy", "accuracy {:.1%}"),
        ("sft/tokens_per_s", "{:,.0f} tokens/s") if section == "sft" else (f"{section}/step_s", "{:.1f} s a step"),
    )
    return [_row("loss", (sparkline(values, width // 4), "green"), (f"  {values[-1]:.3f} nats", "bold"), f"  {facts}")]


def _reward(seen: Seen, width: int) -> Text:
    values = [seen.reward[step] for step in sorted(seen.reward)]
    if not values:
        return _row("reward", ("not measured yet", "dim"))
    facts = f"  from {values[0]:.3f}"
    if (spread := noise(values)) is not None:
        facts += f"  noise \u00b1{spread:.3f}"
    if controlled := _facts(seen.now, ("reward/length_controlled", "{:.3f} at equal length")):
        facts += f"  {controlled}"
    return _row("reward", (sparkline(values, width // 4), "green"), (f"  {values[-1]:.3f}", "bold"), facts)


def _kl(seen: Seen, width: int) -> Text:
    values = [seen.kl[step] for step in sorted(seen.kl)]
    if not values:
        return _row("KL", ("not measured yet", "dim"))
    soft, hard = seen.now.get("kl/soft_nats", math.inf), seen.now.get("kl/hard_nats", math.inf)
    colour = "red" if values[-1] >= hard else "yellow" if values[-1] >= soft else "green"
    caps = "".join(f"  {name} {cap:g}" for name, cap in (("soft", soft), ("hard", hard)) if cap < math.inf)
    back = f"  rolled back {seen.rollbacks} times" if seen.rollbacks > 1 else "  rolled back" if seen.rollbacks else ""
    bar = (sparkline(values, width // 4), colour)
    return _row("KL", bar, (f"  {values[-1]:.2f} nats", "bold"), (caps, "dim"), (back, "yellow"))


def _votes(seen: Seen, width: int) -> list[Text]:
    now = seen.now
    per_group = sum(seen.ranked) / len(seen.ranked) if seen.ranked else now.get("flow/votes_per_group")
    limits = [now.get(f"flow/{name}_votes") for name in ("min", "desired", "max")]
    lines = []
    if per_group is not None:
        parts: list[str | tuple[str, str]] = [(f"{per_group:.1f} a group", "bold")]
        if limits[2]:
            bounds = f"  min {limits[0] or 0:g} \u00b7 desired {limits[1] or 0:g} \u00b7 max {limits[2]:g}"
            parts = [_bar(per_group, limits, width // 4), "  ", *parts, (bounds, "dim")]
        lines.append(_row("votes", *parts))
    facts = _facts(
        now,
        ("flow/votes_total", "{:,.0f} total"),
        ("flow/votes_per_min", "{:,.0f}/min"),
        ("flow/in_flight", "{:.0f} in flight"),
        ("flow/latency_p50_s", "p50 {:.1f} s"),
        ("flow/latency_p95_s", "p95 {:.1f} s"),
    )
    return [*lines, _row("people" if lines else "votes", facts)] if facts else lines


_KNOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "select": (
        ("selection/people_frac", "people see {:.0%} of groups"),
        ("selection/random_total", "{:.0f} drawn at random"),
    ),
    "model": (
        ("rm/version", "version {:.0f}"),
        ("rm/agreement", "agrees with {:.0%} of people's votes"),
        ("rm/heldout_accuracy", "{:.0%} held out"),
    ),
    "drift": (
        ("drift/z_max", "{:.1f} standard errors at most"),
        ("drift/cluster_worst", "in cluster {:.0f}"),
        ("drift/rounds_total", "{:.0f} targeted rounds"),
        ("drift/round_groups", "{:.0f} groups to come"),
    ),
    "judge": (
        ("judge/position_bias", "position bias {:+.1%}"),
        ("judge/inconsistent_frac", "{:.0%} of pairs contradict"),
        ("judge/cached_frac", "{:.0%} from disk"),
    ),
    "learner": (
        ("train/accuracy", "agrees with {:.0%} of the votes"),
        ("train/beta", "beta {:.3f}"),
        ("train/entropy_nats", "entropy {:.2f} nats"),
        ("train/clip_frac", "{:.0%} clipped"),
    ),
}
"""Rows of facts, each left out where nothing of it is known."""


def _known(seen: Seen) -> list[Text]:
    rows = ((label, _facts(seen.now, *wanted)) for label, wanted in _KNOWN.items())
    return [_row(label, facts) for label, facts in rows if facts]


def _bar(votes: float, limits: Sequence[float | None], width: int) -> tuple[str, str]:
    least, desired, most = (limit or 0 for limit in limits)
    filled = round(min(votes / most, 1) * width)
    cells = ["\u2588"] * filled + ["\u2591"] * (width - filled)
    for limit in (least, desired):
        if 0 < limit < most:
            cells[min(width - 1, round(limit / most * width))] = "\u2502"
    return "".join(cells), "green" if votes >= least else "yellow"


def _pace(seen: Seen, width: int) -> list[Text]:
    now = seen.now
    age = _facts(now, ("staleness/mean_steps", "{:.1f} steps"), ("staleness/max_steps", "oldest {:.0f}"))
    cost = _facts(
        now, ("cost/usd", "${:,.2f}"), ("budget/usd", "of ${:,.2f}"), ("budget/votes", "at most {:,.0f} votes")
    )
    length = _facts(
        now,
        ("length/mean_chars", "{:.0f} characters"),
        ("length/ended_frac", "{:.0%} ended"),
        ("length/reward_correlation", "{:+.2f} with the score"),
    )
    lines = [_row(name, facts) for name, facts in (("length", length), ("age", age)) if facts]
    if "time/step_s" in now:
        spent = [(name, now.get(f"time/{name}_s", 0.0), colour) for name, colour in _PARTS.items()]
        cells = width // 5 / max(now["time/step_s"], sum(s for _, s, _ in spent), 1e-9)
        bar = [("\u2588" * round(s * cells), colour) for _, s, colour in spent]
        names = [(f" {name} {s:.1f}", colour) for name, s, colour in spent if s >= 0.05]
        lines.append(_row("step", *bar, (f"  {now['time/step_s']:.1f} s ", "bold"), *names))
    return [*lines, _row("cost", cost)] if cost else lines


def _facts(now: Mapping[str, float], *wanted: tuple[str, str]) -> str:
    return " \u00b7 ".join(form.format(now[name]) for name, form in wanted if name in now)
