"""What the server knows: flows, datasets, items, leases and votes. Everything else is derived from the raw votes.

An item is open until it has its votes or its time is over:

- a pair is leased while the counted votes are below *desired* and votes plus live leases are below *max*;
- it ends `Completed` at max votes, or at desired votes once no lease is live, or at its time to live with min votes;
- it ends `Incomplete` at its time to live below min votes, and `Stopped` when asked to stop.

A lease is live until it is answered, `lease_s` are over, its item ends, or its rater was handed two newer ones (who
takes new pairs has left the old one). An answer to a lease that is no longer live is kept as late and never counted.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.flow.wire import MAX_CANDIDATES, MIN_CANDIDATES, Outcome
from rlhf_cli.server.database import Database
from rlhf_cli.server.pairs import choose_pair
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import Candidate, FlowRecord, ItemRecord, LeasedPair, Vote, flow_of, item_of, vote_of
from rlhf_cli.server.tokens import Tokens
from rlhf_cli.types import WinMatrix

LEASE_S = 90.0
HELD_LEASES = 2
"""One on a rater's screen, one preloaded."""


@dataclass(frozen=True, slots=True)
class Once:
    """An idempotency key and the body that came with it."""

    key: str
    body: bytes


class Store:
    """The server's memory in one SQLite file; usable from any thread.

    Args:
        clock: Unix time in seconds.
        rng: Draws pairs and sides; the default cannot be predicted.
        lease_s: How long a rater may keep a pair.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self._database = Database(path)
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._lease_s = lease_s
        self.tokens = Tokens(self._database, clock)

    def close(self) -> None:
        self._database.close()

    # Flows, datasets, items

    def create_flow(self, name: str, instruction: str, responses: Responses, once: Once | None = None) -> str:
        def make(db: sqlite3.Connection) -> str:
            flow_id = _new_id("flw")
            counts = (responses.min, responses.desired, responses.max)
            db.execute("INSERT INTO flows VALUES (?, ?, ?, ?, ?, ?, ?)", (flow_id, name, instruction, *counts, now))
            return flow_id

        now = self._clock()
        with self._database.transaction() as db:
            return _once(db, "flow", once, now, make)

    def flow(self, flow_id: str) -> tuple[FlowRecord, int]:
        """A flow and how many items it has."""
        with self._database.transaction() as db:
            flow = flow_of(_row(db, "flows", flow_id))
            (count,) = db.execute("SELECT COUNT(*) FROM items WHERE flow_id = ?", (flow_id,)).fetchone()
        return flow, int(count)

    def flows(self, name_contains: str, offset: int, limit: int, *, newest_first: bool) -> tuple[int, list[FlowRecord]]:
        """How many flows there are with such a name, and a page of them."""
        with self._database.transaction() as db:
            total, rows = _page(db, "flows", "instr(name, ?) > 0", name_contains, offset, limit, newest_first)
        return total, [flow_of(row) for row in rows]

    def create_dataset(self, name: str, once: Once | None = None) -> str:
        def make(db: sqlite3.Connection) -> str:
            dataset_id = _new_id("dts")
            db.execute("INSERT INTO datasets VALUES (?, ?, ?)", (dataset_id, name, now))
            return dataset_id

        now = self._clock()
        with self._database.transaction() as db:
            return _once(db, "dataset", once, now, make)

    def add_datapoint(self, dataset_id: str, sort_index: int | None, text: str) -> str:
        """Add a candidate; the same one at the same place again is the first one. Without a place it goes last."""
        with self._database.transaction() as db:
            _row(db, "datasets", dataset_id)
            known = {row["sort_index"]: row for row in _datapoints(db, dataset_id)}
            if sort_index in known:
                if known[sort_index]["text"] != text:
                    raise Problem(
                        409, f"candidate {sort_index} of dataset {dataset_id} is already there with another text"
                    )
                return str(known[sort_index]["id"])
            if db.execute("SELECT 1 FROM items WHERE dataset_id = ?", (dataset_id,)).fetchone():
                raise Problem(409, f"dataset {dataset_id} already belongs to an item and cannot grow")
            if len(known) >= MAX_CANDIDATES:
                raise Problem(
                    400, f"dataset {dataset_id} already has {MAX_CANDIDATES} candidates, the most there can be"
                )
            place = max(known, default=-1) + 1 if sort_index is None else sort_index
            datapoint_id = _new_id("dpt")
            db.execute("INSERT INTO datapoints VALUES (?, ?, ?, ?)", (datapoint_id, dataset_id, place, text))
        return datapoint_id

    def create_item(self, flow_id: str, dataset_id: str, context: str, ttl_s: float, once: Once | None = None) -> str:
        def make(db: sqlite3.Connection) -> str:
            flow = flow_of(_row(db, "flows", flow_id))
            _row(db, "datasets", dataset_id)
            size = len(_datapoints(db, dataset_id))
            if size < MIN_CANDIDATES:
                raise Problem(
                    400, f"dataset {dataset_id} has {size} candidates; an item needs at least {MIN_CANDIDATES}"
                )
            item_id, counts = _new_id("fli"), (flow.responses.min, flow.responses.desired, flow.responses.max)
            db.execute(
                "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, NULL, NULL)",
                (item_id, flow_id, dataset_id, context, size, *counts, ItemState.PENDING, now, now + ttl_s),
            )
            return item_id

        now = self._clock()
        with self._database.transaction() as db:
            return _once(db, f"item of {flow_id}", once, now, make)

    def item(self, item_id: str) -> ItemRecord:
        with self._database.transaction() as db:
            self._advance(db)
            return item_of(_row(db, "items", item_id))

    def items(self, flow_id: str, offset: int, limit: int, *, newest_first: bool) -> tuple[int, list[ItemRecord]]:
        """How many items a flow has, and a page of them."""
        with self._database.transaction() as db:
            self._advance(db)
            _row(db, "flows", flow_id)
            total, rows = _page(db, "items", "flow_id = ?", flow_id, offset, limit, newest_first)
        return total, [item_of(row) for row in rows]

    def stop(self, item_id: str) -> None:
        """End an item; one that has ended stays as it is."""
        with self._database.transaction() as db:
            now = self._advance(db)
            if _row(db, "items", item_id)["ended_at"] is None:
                _end(db, item_id, ItemState.STOPPED, now)

    def candidates(self, item_id: str) -> list[Candidate]:
        with self._database.transaction() as db:
            rows = _datapoints(db, _row(db, "items", item_id)["dataset_id"])
        return [Candidate(row["id"], row["sort_index"], row["text"]) for row in rows]

    # Leases and votes

    def lease(self, rater_id: str) -> LeasedPair | None:
        """The next pair for a rater, of the oldest item that needs one; None while nothing is open for this rater."""
        with self._database.transaction() as db:
            now = self._advance(db)
            db.execute(
                "UPDATE leases SET state = 'returned' WHERE state = 'live' AND rater_id = ?1 AND rowid NOT IN "
                "(SELECT rowid FROM leases WHERE rater_id = ?1 ORDER BY rowid DESC LIMIT ?2)",
                (rater_id, HELD_LEASES - 1),
            )
            open_items = db.execute(
                "SELECT * FROM items WHERE ended_at IS NULL AND votes < desired AND votes + (SELECT COUNT(*) FROM "
                "leases WHERE item_id = items.id AND state = 'live') < max ORDER BY created_at, rowid"
            )
            for row in open_items.fetchall():
                item = item_of(row)
                shown: dict[tuple[int, int], int] = {}
                seen: set[tuple[int, int]] = set()
                leases = db.execute("SELECT rater_id, left, right, state FROM leases WHERE item_id = ?", (item.id,))
                for other, left, right, state in leases:
                    pair = (min(left, right), max(left, right))
                    if state in ("live", "counted"):
                        shown[pair] = shown.get(pair, 0) + 1
                    if other == rater_id:
                        seen.add(pair)
                chosen = choose_pair(item.size, shown, seen, self._rng)
                if chosen is not None:
                    return self._hand_out(db, item, chosen, rater_id, now)
        return None

    def _hand_out(
        self, db: sqlite3.Connection, item: ItemRecord, pair: tuple[int, int], rater_id: str, now: float
    ) -> LeasedPair:
        left, right = pair if self._rng.random() < 0.5 else pair[::-1]
        lease_id, expires_at = secrets.token_urlsafe(16), min(now + self._lease_s, item.expires_at)
        db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, 'live', ?, ?)",
            (lease_id, item.id, rater_id, left, right, now, expires_at),
        )
        db.execute(
            "UPDATE items SET state = ?, started_at = coalesce(started_at, ?) WHERE id = ?",
            (ItemState.RUNNING, now, item.id),
        )
        texts = [row["text"] for row in _datapoints(db, item.dataset_id)]
        instruction = _row(db, "flows", item.flow_id)["instruction"]
        return LeasedPair(lease_id, item.context, instruction, texts[left], texts[right], expires_at)

    def vote(self, lease_id: str, rater_id: str, outcome: Outcome, response_ms: int | None = None) -> bool:
        """Keep a vote; durable once this returns. False when it came too late to count.

        Raises:
            Problem: 404 unknown lease, 403 somebody else's, 409 already answered.
        """
        with self._database.transaction() as db:
            now = self._advance(db)
            lease = _row(db, "leases", lease_id)
            if lease["rater_id"] != rater_id:
                raise Problem(403, "this pair was handed to somebody else")
            if db.execute("SELECT 1 FROM votes WHERE lease_id = ?", (lease_id,)).fetchone():
                raise Problem(409, "this pair was already answered")
            in_time, item_id = bool(lease["state"] == "live"), lease["item_id"]
            db.execute(
                "INSERT INTO votes VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (lease_id, item_id, rater_id, lease["left"], lease["right"], outcome, response_ms, not in_time, now),
            )
            if in_time:
                counts = outcome != "skip"
                state = "counted" if counts else "skipped"
                db.execute("UPDATE leases SET state = ? WHERE id = ?", (state, lease_id))
                db.execute("UPDATE items SET votes = votes + ? WHERE id = ?", (counts, item_id))
                self._advance(db)
        return in_time

    def votes(self, item_id: str | None = None) -> list[Vote]:
        """Raw votes, late and skipped ones too, in the order they arrived."""
        where, values = ("WHERE item_id = ?", (item_id,)) if item_id is not None else ("", ())
        with self._database.transaction() as db:
            rows = db.execute(f"SELECT * FROM votes {where} ORDER BY id", values).fetchall()
        return [vote_of(row) for row in rows]

    def matrix(self, item_id: str) -> WinMatrix:
        """The counted votes on an item by position; a tie, and two bad ones, are half a vote each way."""
        size = self.item(item_id).size
        wins = [[0.0] * size for _ in range(size)]
        for vote in self.votes(item_id):
            if vote.late or vote.outcome == "skip":
                continue
            for_left = {"left": 1.0, "right": 0.0}.get(vote.outcome, 0.5)
            wins[vote.left][vote.right] += for_left
            wins[vote.right][vote.left] += 1 - for_left
        return WinMatrix(wins)

    def _advance(self, db: sqlite3.Connection) -> float:
        """Let time pass: return leases and end items that are due. Called first in whatever looks at them."""
        now = self._clock()
        db.execute("UPDATE leases SET state = 'returned' WHERE state = 'live' AND expires_at <= ?", (now,))
        due = db.execute(
            "SELECT id, votes, min, desired, max, expires_at FROM items WHERE ended_at IS NULL AND (expires_at <= ? OR "
            "votes >= max OR (votes >= desired AND NOT EXISTS "
            "(SELECT 1 FROM leases WHERE item_id = items.id AND state = 'live')))",
            (now,),
        )
        for row in due.fetchall():
            state = ItemState.COMPLETED if row["votes"] >= row["min"] else ItemState.INCOMPLETE
            _end(db, row["id"], state, min(now, row["expires_at"]))
        return now


def _end(db: sqlite3.Connection, item_id: str, state: ItemState, at: float) -> None:
    db.execute("UPDATE items SET state = ?, ended_at = ? WHERE id = ?", (state, at, item_id))
    db.execute("UPDATE leases SET state = 'returned' WHERE item_id = ? AND state = 'live'", (item_id,))


def _once(
    db: sqlite3.Connection, scope: str, once: Once | None, now: float, make: Callable[[sqlite3.Connection], str]
) -> str:
    """What `make` makes, or what it made the first time for the same key."""
    if once is None:
        return make(db)
    body_hash = hashlib.sha256(once.body).digest()
    row = db.execute("SELECT * FROM once WHERE scope = ? AND key = ?", (scope, once.key)).fetchone()
    if row is None:
        made = make(db)
        db.execute("INSERT INTO once VALUES (?, ?, ?, ?, ?)", (scope, once.key, body_hash, made, now))
        return made
    if row["body_hash"] != body_hash:
        raise Problem(422, "this Idempotency-Key was used with another body before")
    return str(row["made"])


_NOUNS = {"flows": "flow", "datasets": "dataset", "items": "item", "leases": "lease"}


def _row(db: sqlite3.Connection, table: str, row_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,)).fetchone()
    if row is None:
        raise Problem(404, f"{_NOUNS[table]} {row_id} does not exist")
    return row


def _page(
    db: sqlite3.Connection, table: str, where: str, value: str, offset: int, limit: int, newest_first: bool
) -> tuple[int, list[sqlite3.Row]]:
    (total,) = db.execute(f"SELECT COUNT(*) FROM {table} WHERE {where}", (value,)).fetchone()
    order = "DESC" if newest_first else "ASC"
    rows = db.execute(
        f"SELECT * FROM {table} WHERE {where} ORDER BY created_at {order}, rowid {order} LIMIT ? OFFSET ?",
        (value, limit, offset),
    )
    return int(total), rows.fetchall()


def _datapoints(db: sqlite3.Connection, dataset_id: str) -> list[sqlite3.Row]:
    return db.execute("SELECT * FROM datapoints WHERE dataset_id = ? ORDER BY sort_index", (dataset_id,)).fetchall()


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"
