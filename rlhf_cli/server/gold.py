"""Gold pairs: pairs whose better answer is known, mixed in unmarked. They show who looks; no vote is weighed by them.

They live beside the items, in tables of their own: an answer to one is kept and shown, and never reaches a win matrix.
"""

from __future__ import annotations

import random
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.flow.wire import Outcome
from rlhf_cli.ranking.agreement import Share, gold_accuracy
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import LeasedPair
from rlhf_cli.server.store import Store

SHARE = 0.1
"""Of the pairs that a rater is handed, while there are gold pairs this rater has not seen."""


@dataclass(frozen=True, slots=True)
class GoldPair:
    prompt: str
    better: str
    worse: str


def set_pairs(store: Store, flow_id: str, pairs: Sequence[GoldPair]) -> None:
    """Make these the gold pairs of a flow. Answers to earlier ones stay."""
    store.flow(flow_id)  # 404 for one that is not there
    wanted = dict.fromkeys(pairs)
    with store.now() as (db, now):
        for row in db.execute("SELECT * FROM gold WHERE flow_id = ? AND retired_at IS NULL", (flow_id,)).fetchall():
            if wanted.pop(GoldPair(row["prompt"], row["better"], row["worse"]), 0) == 0:
                db.execute("UPDATE gold SET retired_at = ? WHERE id = ?", (now, row["id"]))
        db.executemany(
            "INSERT INTO gold VALUES (?, ?, ?, ?, ?, ?, NULL)",
            [(f"gold_{secrets.token_hex(8)}", flow_id, p.prompt, p.better, p.worse, now) for p in wanted],
        )


def pairs(store: Store, flow_id: str) -> list[GoldPair]:
    """The gold pairs of a flow, in the order they were given."""
    with store.now() as (db, _):
        rows = db.execute(
            "SELECT * FROM gold WHERE flow_id = ? AND retired_at IS NULL ORDER BY rowid", (flow_id,)
        ).fetchall()
    return [GoldPair(row["prompt"], row["better"], row["worse"]) for row in rows]


def accuracy(store: Store) -> dict[str, Share]:
    """How many of the gold pairs each rater answered right; a tie is not right, a skipped pair was not answered."""
    with store.now() as (db, _):
        rows = db.execute(
            "SELECT rater_id, outcome = better_side FROM gold_leases WHERE answered_at IS NOT NULL "
            "AND undone_at IS NULL AND outcome <> 'skip'"
        ).fetchall()
    return gold_accuracy((rater, bool(right)) for rater, right in rows)


def draw(
    db: sqlite3.Connection, flow_id: str, rater_id: str, now: float, lease_s: float, rng: random.Random
) -> LeasedPair | None:
    """Lease a gold pair of a flow that this rater has not seen; None when there is none."""
    rows = db.execute(
        "SELECT * FROM gold WHERE flow_id = ?1 AND retired_at IS NULL AND id NOT IN "
        "(SELECT gold_id FROM gold_leases WHERE rater_id = ?2) ORDER BY rowid",
        (flow_id, rater_id),
    ).fetchall()
    if not rows:
        return None
    return _lease(db, rng.choice(rows), rater_id, rng.choice(["left", "right"]), now, lease_s)


def find(db: sqlite3.Connection, lease_id: str, rater_id: str) -> sqlite3.Row | None:
    """The lease of a gold pair; None when that id is none.

    Raises:
        Problem: 403 somebody else's.
    """
    row: sqlite3.Row | None = db.execute("SELECT * FROM gold_leases WHERE id = ?", (lease_id,)).fetchone()
    if row is not None and row["rater_id"] != rater_id:
        raise Problem(403, "this pair was handed to somebody else")
    return row


def answer(db: sqlite3.Connection, lease: sqlite3.Row, outcome: Outcome, response_ms: int | None, now: float) -> bool:
    """Keep an answer to a gold pair; False when it came too late, as with any other pair.

    Raises:
        Problem: 409 already answered.
    """
    if lease["answered_at"] is not None:
        raise Problem(409, "this pair was already answered")
    db.execute(
        "UPDATE gold_leases SET outcome = ?, response_ms = ?, answered_at = ? WHERE id = ?",
        (outcome, response_ms, now, lease["id"]),
    )
    return bool(now < lease["expires_at"])


def take_back(db: sqlite3.Connection, lease: sqlite3.Row, now: float, lease_s: float) -> LeasedPair:
    """Mark an answer as taken back and hand the same pair out again."""
    db.execute("UPDATE gold_leases SET undone_at = ? WHERE id = ?", (now, lease["id"]))
    row = db.execute("SELECT * FROM gold WHERE id = ?", (lease["gold_id"],)).fetchone()
    return _lease(db, row, lease["rater_id"], lease["better_side"], now, lease_s)


def _lease(
    db: sqlite3.Connection, gold: sqlite3.Row, rater_id: str, better_side: str, now: float, lease_s: float
) -> LeasedPair:
    lease_id = secrets.token_urlsafe(16)
    db.execute(
        "INSERT INTO gold_leases VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, NULL, NULL)",
        (lease_id, gold["id"], rater_id, better_side, now, now + lease_s),
    )
    (instruction,) = db.execute("SELECT instruction FROM flows WHERE id = ?", (gold["flow_id"],)).fetchone()
    sides = (gold["better"], gold["worse"]) if better_side == "left" else (gold["worse"], gold["better"])
    return LeasedPair(
        id=lease_id,
        prompt=gold["prompt"],
        instruction=instruction,
        left=sides[0],
        right=sides[1],
        images=False,
        context_images=(),
        expires_at=now + lease_s,
    )
