"""The life of items and leases, as steps inside a transaction.

An item is open until it has its votes or its time is over:

- a pair is leased while the counted votes are below *desired*, votes plus live leases are below *max*, the stopping
  rule of goal `best` was not met, and the item is not draining;
- it ends `Completed` at max votes, or at desired votes or the stopping rule once no lease is live, or at its time to
  live with min votes;
- it ends `Incomplete` at its time to live below min votes, and `Stopped` when asked to stop.

A lease is live until it is answered, its time is over, its item ends, or its rater was handed two newer ones (who takes
new pairs has left the old one). An answer to a lease that is no longer live is kept as late and never counted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from rlhf_cli.flow.base import ItemState
from rlhf_cli.types import WinMatrix


def advance(db: sqlite3.Connection, now: float) -> None:
    """Let time pass: return leases and end items that are due. Called first in whatever looks at them."""
    due = db.execute("SELECT id, item_id FROM leases WHERE state = 'live' AND expires_at <= ?", (now,)).fetchall()
    return_leases(db, due, now)
    ending = db.execute("SELECT id FROM items WHERE ended_at IS NULL AND expires_at <= ?", (now,)).fetchall()
    for row in ending:
        settle(db, row["id"], now)


def return_leases(db: sqlite3.Connection, leases: Iterable[sqlite3.Row], now: float) -> None:
    """Take live leases back unanswered."""
    for lease in leases:
        close_lease(db, lease["id"], lease["item_id"], "returned")
        settle(db, lease["item_id"], now)


def close_lease(db: sqlite3.Connection, lease_id: str, item_id: str, state: str, votes: int = 0) -> None:
    """End a live lease; `votes` is 1 where its answer counts."""
    db.execute("UPDATE leases SET state = ? WHERE id = ?", (state, lease_id))
    db.execute("UPDATE items SET live = live - 1, votes = votes + ? WHERE id = ?", (votes, item_id))


def settle(db: sqlite3.Connection, item_id: str, now: float) -> None:
    """End an item if it has what it needs or its time is over."""
    row = db.execute(
        "SELECT votes, min, expires_at FROM items WHERE id = ? AND ended_at IS NULL AND "
        "(expires_at <= ? OR votes >= max OR ((votes >= desired OR decided) AND live = 0))",
        (item_id, now),
    ).fetchone()
    if row is not None:
        state = ItemState.COMPLETED if row["votes"] >= row["min"] else ItemState.INCOMPLETE
        end(db, item_id, state, min(now, row["expires_at"]))


def end(db: sqlite3.Connection, item_id: str, state: ItemState, at: float) -> None:
    db.execute("UPDATE items SET state = ?, ended_at = ?, live = 0 WHERE id = ?", (state, at, item_id))
    db.execute("UPDATE leases SET state = 'returned' WHERE item_id = ? AND state = 'live'", (item_id,))


def wins(db: sqlite3.Connection, item_id: str, size: int) -> WinMatrix:
    """The counted votes on an item by position; a tie, and two bad ones, are half a vote each way."""
    counted = [[0.0] * size for _ in range(size)]
    for left, right, outcome in db.execute(
        "SELECT left, right, outcome FROM votes WHERE item_id = ? AND late = 0 AND undone = 0 AND outcome <> 'skip'",
        (item_id,),
    ):
        for_left = {"left": 1.0, "right": 0.0}.get(outcome, 0.5)
        counted[left][right] += for_left
        counted[right][left] += 1 - for_left
    return WinMatrix(counted)
