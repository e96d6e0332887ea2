"""What the owner looks at: how items stand, how fast people are, how far they agree. Read only; no vote is weighted."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import numpy as np

from rlhf_cli.ranking.agreement import krippendorff_alpha, pair_agreement, side_bias
from rlhf_cli.server import gold
from rlhf_cli.server.records import Vote
from rlhf_cli.server.store import Store
from rlhf_cli.server.times import iso

RECENT = 2000
"""Latest votes that agreement is computed from."""


def summary(store: Store) -> dict[str, Any]:
    """Items by state, votes and their pace, agreement, raters."""
    with store.now() as (db, now):
        states = {row[0]: row[1] for row in db.execute("SELECT state, COUNT(*) FROM items GROUP BY state")}
        counted = _count(db, "late = 0 AND undone = 0 AND outcome <> 'skip'")
        late, skipped, undone = (_count(db, what) for what in ("late = 1", "outcome = 'skip'", "undone = 1"))
        (minute,) = db.execute("SELECT COUNT(*) FROM votes WHERE created_at > ?", (now - 60,)).fetchone()
        ended = db.execute(
            "SELECT ended_at - created_at FROM items WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT 500"
        )
        durations = [row[0] for row in ended]
        (live,) = db.execute("SELECT COUNT(*) FROM leases WHERE state = 'live'").fetchone()
    recent = store.votes(latest=RECENT)
    return {
        "items": states,
        "votes": {"counted": counted, "late": late, "skipped": skipped, "undone": undone},
        "votesPerMinute": minute,
        "pairsInHands": live,
        "responseS": _quantiles([vote.response_ms / 1000 for vote in recent if vote.response_ms is not None]),
        "itemS": _quantiles(durations),
        "agreement": agreement(recent, store),
        "raters": rater_figures(store),
    }


def agreement(votes: list[Vote], store: Store) -> dict[str, Any]:
    """Krippendorff's alpha, and raw agreement on a pair beside what Bradley-Terry expects; None where undefined."""
    by_pair: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    by_item: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.counts:
            low, high = sorted((vote.left, vote.right))
            winner = {"left": vote.left, "right": vote.right}.get(vote.outcome, -1)
            by_pair[vote.item_id, low, high].append(winner)
            by_item[vote.item_id].append(vote)
    size = max((store.item(item_id).size for item_id in by_item), default=0)
    wins_BGG = np.zeros((len(by_item), size, size))
    for wins_GG, cast in zip(wins_BGG, by_item.values(), strict=True):
        for vote in cast:
            if vote.outcome in ("left", "right"):
                won, lost = (vote.left, vote.right) if vote.outcome == "left" else (vote.right, vote.left)
                wins_GG[won, lost] += 1
    raw = pair_agreement(wins_BGG) if by_item else None
    return {
        "alpha": krippendorff_alpha(by_pair.values()),
        "observed": None if raw is None else raw.observed,
        "expected": None if raw is None else raw.expected,
        "pairs": 0 if raw is None else raw.pairs,
    }


def rater_figures(store: Store) -> list[dict[str, Any]]:
    """One row a rater: votes, share of skips and of the left side, pace, when the last vote came."""
    rows = []
    votes: dict[str, list[Vote]] = defaultdict(list)
    for vote in store.votes():
        votes[vote.rater_id].append(vote)
    gold_of = gold.accuracy(store)
    for token in store.tokens.all():
        if token.role != "rater":
            continue
        cast = votes.get(token.id, [])
        counted = [vote for vote in cast if vote.counts]
        sides = side_bias(
            sum(vote.outcome == "left" for vote in counted), sum(vote.outcome == "right" for vote in counted)
        )
        times = [vote.response_ms / 1000 for vote in cast if vote.response_ms is not None]
        rows.append(
            {
                "name": token.label,
                "id": token.id,
                "simulated": token.simulated,
                "active": token.revoked_at is None,
                "votes": len(counted),
                "late": sum(vote.late for vote in cast),
                "skipped": sum(vote.outcome == "skip" for vote in cast),
                "ties": sum(vote.outcome in ("tie", "both_bad") for vote in counted),
                "left_share": sides.left.value,
                "left_p_value": sides.p_value,
                "gold_right": gold_of[token.id].part if token.id in gold_of else 0,
                "gold_total": gold_of[token.id].total if token.id in gold_of else 0,
                "response_p50_s": statistics.median(times) if times else None,
                "last_vote": iso(cast[-1].created_at) if cast else None,
            }
        )
    return rows


def metrics(store: Store) -> str:
    """The same for Prometheus, without what takes time to compute."""
    with store.now() as (db, _):
        items = db.execute("SELECT state, COUNT(*) FROM items GROUP BY state").fetchall()
        votes = db.execute("SELECT outcome, late, undone, COUNT(*) FROM votes GROUP BY 1, 2, 3").fetchall()
        (live,) = db.execute("SELECT COUNT(*) FROM leases WHERE state = 'live'").fetchone()
        (raters,) = db.execute(
            "SELECT COUNT(*) FROM tokens WHERE role = 'rater' AND kind = 'secret' AND revoked_at IS NULL"
        ).fetchone()
    return (
        _metric("items", "gauge", "Items by state.", [(f'{{state="{state}"}}', count) for state, count in items])
        + _metric(
            "votes_total",
            "counter",
            "Votes kept: their outcome, and whether they were late or undone.",
            [(f'{{outcome="{what}",late="{late}",undone="{undone}"}}', n) for what, late, undone, n in votes],
        )
        + _metric("leases_live", "gauge", "Pairs in people's hands.", [("", live)])
        + _metric("raters", "gauge", "Raters that may vote.", [("", raters)])
    )


def _metric(name: str, kind: str, meaning: str, values: list[tuple[str, int]]) -> str:
    lines = [f"# HELP rlhf_{name} {meaning}", f"# TYPE rlhf_{name} {kind}"]
    return "\n".join(lines + [f"rlhf_{name}{labels} {value}" for labels, value in values]) + "\n"


def _count(db: Any, what: str) -> int:
    return int(db.execute(f"SELECT COUNT(*) FROM votes WHERE {what}").fetchone()[0])


def _quantiles(values: list[float]) -> dict[str, float | None]:
    """Median and 95th percentile; None without values."""
    if not values:
        return {"p50": None, "p95": None}
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p95": ordered[math.ceil(0.95 * len(ordered)) - 1]}
