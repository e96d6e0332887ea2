"""Is the trained policy better than what it started from, on prompts it never trained on, and how sure is that?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf_cli.ranking.intervals import clustered_mean, win_rate
from rlhf_cli.types import Completion, Group, RankedGroup, Unranked


@dataclass(frozen=True, slots=True)
class Comparison:
    """Votes on one answer of the trained policy against one of the model it started from; a tie is half and half."""

    prompt_id: str
    won: float
    lost: float


def pair_up(before: Sequence[Group], after: Sequence[Group], prefix: str) -> list[Group]:
    """Groups of two for the raters, answer k of the one model beside answer k of the other; index 0 is `before`."""
    pairs = [
        (b.prompt, b.prompt_ids, first, second)
        for b, a in zip(before, after, strict=True)
        for first, second in zip(b.completions, a.completions, strict=True)
    ]
    return [
        Group(f"{prefix}-{i:06d}", i, prompt, prompt_ids, (first, second), policy_step=0)
        for i, (prompt, prompt_ids, first, second) in enumerate(pairs)
    ]


def same_answer(pair: Group) -> bool:
    """Whether raters would see one text twice: a tie that needs no vote."""
    return pair.completions[0].text == pair.completions[1].text


def comparisons(verdicts: Sequence[RankedGroup | Unranked], identical: Sequence[Group]) -> list[Comparison]:
    """What the votes say; pairs without votes are left out, identical answers count as one tie."""
    voted = [
        Comparison(v.group.prompt.id, won=float(v.wins.wins[1, 0]), lost=float(v.wins.wins[0, 1]))
        for v in verdicts
        if isinstance(v, RankedGroup)
    ]
    return voted + [Comparison(pair.prompt.id, 0.5, 0.5) for pair in identical]


def win_rate_rows(compared: Sequence[Comparison]) -> dict[str, float | None]:
    """`win_rate` with its 95 % interval, clustered by prompt; all None where nothing was compared."""
    if not compared:
        return {"win_rate": None, "win_rate_low": None, "win_rate_high": None}
    prompts = dict.fromkeys(c.prompt_id for c in compared)
    totals = [
        (
            sum(c.won for c in compared if c.prompt_id == prompt),
            sum(c.lost for c in compared if c.prompt_id == prompt),
        )
        for prompt in prompts
    ]
    rate = win_rate(totals)
    return {"win_rate": rate.mean, "win_rate_low": rate.low, "win_rate_high": rate.high}


def reward_rows(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Mean rewards of both models and their difference with its 95 % interval, clustered by prompt.

    A single prompt says nothing about the spread, so its bounds are None.

    Args:
        before, after: Rewards of the answers, one row per prompt, the same prompts in the same order.
    """
    gain = clustered_mean([[fmean(a) - fmean(b)] for b, a in zip(before, after, strict=True)])
    return {
        "reward_before": fmean(fmean(row) for row in before),
        "reward_after": fmean(fmean(row) for row in after),
        "reward_gain": gain.mean,
        "reward_gain_low": gain.low if math.isfinite(gain.low) else None,
        "reward_gain_high": gain.high if math.isfinite(gain.high) else None,
    }


def drift_rows(before: Sequence[Group], after: Sequence[Group]) -> dict[str, float]:
    """KL of the trained policy to the model it started from, on its own answers, and the lengths of both."""
    answers_before = [c for g in before for c in g.completions]
    answers_after = [c for g in after for c in g.completions]
    kls = [c.kl_nats for c in answers_after]
    return {
        "kl_sequence_nats": fmean(kls),
        "kl_token_nats": sum(kls) / max(1, sum(len(c.token_ids) for c in answers_after)),
        "length_before_tokens": _mean_length(answers_before),
        "length_after_tokens": _mean_length(answers_after),
        "ended_before_frac": fmean(c.ended for c in answers_before),
        "ended_after_frac": fmean(c.ended for c in answers_after),
    }


def _mean_length(answers: Sequence[Completion]) -> float:
    return fmean(len(c.token_ids) for c in answers)


def check_gates(results: dict[str, Any], gates: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """Each gate that the recipe sets, with what was measured; one whose figure is unknown has not passed."""
    measured = {"win_rate": "win_rate", "kl_nats_max": "kl_sequence_nats", "reward_gain": "reward_gain"}
    checked = {}
    for name, limit in gates.items():
        if limit is None:
            continue
        value = results.get(measured[name])
        met = value is not None and (value <= limit if name.endswith("_max") else value >= limit)
        checked[name] = {"value": value, "limit": limit, "passed": met}
    return checked
