"""A rater's side of the store: pairs with gold mixed in, a second thought about the last vote, own progress."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.flow.wire import CastSegment, Outcome
from rlhf_cli.server import gold, items
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import LeasedPair, item_of
from rlhf_cli.server.store import Store

UNDO_S = 60.0
MARKDOWN_FLAG = "use_main_text_markdown"


@dataclass(frozen=True, slots=True)
class Shown:
    """A pair as a rater's screen needs it."""

    pair: LeasedPair
    seconds: float
    """Until it goes back."""
    markdown: bool
    segments: bool
    """Whether spans may be marked; then the texts are shown as they are, for places in markdown are not theirs."""

    @classmethod
    def of(cls, pair: LeasedPair, flow: sqlite3.Row, now: float) -> Shown:
        settings = json.loads(flow["settings"])
        flags = settings.get("featureFlags") or []
        markdown = any(flag.get("key") == MARKDOWN_FLAG and flag.get("value") == "true" for flag in flags)
        segments = bool(settings.get("markSegments")) and not pair.images
        return cls(pair, pair.expires_at - now, markdown and not segments, segments)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a rater may know: how much is done and how much is there, never what others said."""

    votes: int
    open_items: int


class _InsteadOfIt(Exception):
    """Rolls a lease back in favour of a gold pair."""


def lease(store: Store, rater_id: str, rng: random.Random) -> Shown | None:
    """The next pair for a rater; None while nothing is open. A gold pair only ever takes the place of a real one."""
    with store.now() as (db, now):
        flow: sqlite3.Row | None = None
        try:
            with store.part():
                pair = store.lease(rater_id)
                if pair is None:
                    return None
                flow = _flow_of_lease(db, pair.id)
                if rng.random() < gold.SHARE and _has_gold(db, flow["id"], rater_id):
                    raise _InsteadOfIt
        except _InsteadOfIt:
            assert flow is not None
            pair = gold.draw(db, flow["id"], rater_id, now, store.lease_s, rng)
            assert pair is not None
        return Shown.of(pair, flow, now)


def vote(
    store: Store,
    lease_id: str,
    rater_id: str,
    outcome: Outcome,
    response_ms: int | None,
    segments: Sequence[CastSegment] = (),
) -> bool:
    """Keep a vote, on a gold pair or any other; see `Store.vote`. Marks in gold pairs teach nobody and are not kept."""
    with store.now() as (db, now):
        gold_lease = gold.find(db, lease_id, rater_id)
        if gold_lease is not None:
            return gold.answer(db, gold_lease, outcome, response_ms, now)
        return store.vote(lease_id, rater_id, outcome, response_ms, segments)


def renew(store: Store, lease_id: str, rater_id: str) -> float:
    """A preloaded pair has come on the screen: its time starts now. Returns the seconds left.

    A pair can be held twice its time in all, so that nobody keeps one for ever.

    Raises:
        Problem: 404 unknown, 403 somebody else's, 410 it went back or was answered.
    """
    with store.now() as (db, now):
        table, row = "gold_leases", gold.find(db, lease_id, rater_id)
        lease_s, latest, live = store.lease_s, float("inf"), row is not None and row["answered_at"] is None
        if row is None:
            table, row = "leases", _own_lease(db, lease_id, rater_id)
            item = item_of(db.execute("SELECT * FROM items WHERE id = ?", (row["item_id"],)).fetchone())
            lease_s, latest = lease_s if item.lease_s is None else item.lease_s, item.expires_at
            live = row["state"] == "live"
        if not live or row["expires_at"] <= now:
            raise Problem(410, "this pair went back")
        until = max(row["expires_at"], min(now + lease_s, row["created_at"] + 2 * lease_s, latest))
        db.execute(f"UPDATE {table} SET expires_at = ? WHERE id = ?", (until, lease_id))
        return float(until - now)


def undo(store: Store, lease_id: str, rater_id: str) -> Shown:
    """Take the last vote back and hand the same pair out again, sides as they were. The vote stays, marked as undone.

    Raises:
        Problem: 404 unknown, 403 somebody else's, 409 not answered, already taken back or not the last one,
            410 longer ago than a minute, too late to have counted, or its item has ended.
    """
    with store.now() as (db, now):
        gold_lease = gold.find(db, lease_id, rater_id)
        if gold_lease is not None:
            answered, undone = gold_lease["answered_at"], gold_lease["undone_at"] is not None
        else:
            given = _own_lease(db, lease_id, rater_id)
            cast = db.execute("SELECT * FROM votes WHERE lease_id = ?", (lease_id,)).fetchone()
            answered, undone = (cast["created_at"], cast["undone"]) if cast else (None, False)
        if answered is None or undone:
            raise Problem(409, "this vote was already taken back" if undone else "this pair was not answered")
        if _answers_after(db, rater_id, lease_id, answered):
            raise Problem(409, "only the last vote can be taken back")
        if now - answered > UNDO_S:
            raise Problem(410, f"a vote can be taken back for {UNDO_S:.0f} s")
        if gold_lease is not None:
            (flow_id,) = db.execute("SELECT flow_id FROM gold WHERE id = ?", (gold_lease["gold_id"],)).fetchone()
            flow = db.execute("SELECT * FROM flows WHERE id = ?", (flow_id,)).fetchone()
            pair = gold.take_back(db, gold_lease, now, store.lease_s)
        else:
            flow = _flow_of_lease(db, lease_id)
            pair = _take_back(store, db, given, cast, now)
        return Shown.of(pair, flow, now)


def progress(store: Store, rater_id: str, since: float) -> Progress:
    """Own votes since a time, such as the rater's midnight, and the items that still need votes."""
    with store.now() as (db, now):
        (votes,) = db.execute(
            "SELECT (SELECT COUNT(*) FROM votes WHERE rater_id = ?1 AND created_at >= ?2 AND undone = 0 "
            "AND outcome <> 'skip') + (SELECT COUNT(*) FROM gold_leases WHERE rater_id = ?1 AND answered_at >= ?2 "
            "AND undone_at IS NULL AND outcome <> 'skip')",
            (rater_id, since),
        ).fetchone()
        (open_items,) = db.execute(
            "SELECT COUNT(*) FROM items WHERE ended_at IS NULL AND decided = 0 AND votes < desired "
            "AND expires_at - drain_s > ?",
            (now,),
        ).fetchone()
    return Progress(int(votes), int(open_items))


def _take_back(store: Store, db: sqlite3.Connection, lease: sqlite3.Row, cast: sqlite3.Row, now: float) -> LeasedPair:
    item = item_of(db.execute("SELECT * FROM items WHERE id = ?", (lease["item_id"],)).fetchone())
    if item.ended_at is not None or cast["late"]:
        raise Problem(410, "too late: all votes on this prompt are in")
    counted = cast["outcome"] != "skip"
    if item.votes - counted + item.live >= item.responses.max:
        raise Problem(410, "too late: others are giving the remaining answers")
    db.execute("INSERT INTO undos VALUES (?, ?)", (cast["id"], now))
    db.execute("UPDATE votes SET undone = 1 WHERE id = ?", (cast["id"],))
    db.execute("UPDATE items SET votes = votes - ? WHERE id = ?", (counted, item.id))
    pair = store.hand_out(db, item, (lease["left"], lease["right"]), lease["rater_id"], now)
    store.decide(db, item.id)
    items.settle(db, item.id, now)
    return pair


def _own_lease(db: sqlite3.Connection, lease_id: str, rater_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute("SELECT * FROM leases WHERE id = ?", (lease_id,)).fetchone()
    if row is None:
        raise Problem(404, "there is no such pair")
    if row["rater_id"] != rater_id:
        raise Problem(403, "this pair was handed to somebody else")
    return row


def _answers_after(db: sqlite3.Connection, rater_id: str, lease_id: str, at: float) -> bool:
    """Did this rater answer another pair later? Answers of the same instant tell by their order among each other."""
    row = db.execute(
        "SELECT 1 FROM votes v WHERE rater_id = ?1 AND (created_at > ?3 OR (created_at = ?3 AND id > "
        "(SELECT id FROM votes WHERE lease_id = ?2))) UNION ALL "
        "SELECT 1 FROM gold_leases WHERE rater_id = ?1 AND answered_at > ?3 LIMIT 1",
        (rater_id, lease_id, at),
    ).fetchone()
    return row is not None


def _flow_of_lease(db: sqlite3.Connection, lease_id: str) -> sqlite3.Row:
    row: sqlite3.Row = db.execute(
        "SELECT f.* FROM flows f JOIN items i ON i.flow_id = f.id JOIN leases l ON l.item_id = i.id WHERE l.id = ?",
        (lease_id,),
    ).fetchone()
    return row


def _has_gold(db: sqlite3.Connection, flow_id: str, rater_id: str) -> bool:
    row = db.execute(
        "SELECT 1 FROM gold WHERE flow_id = ?1 AND retired_at IS NULL AND id NOT IN "
        "(SELECT gold_id FROM gold_leases WHERE rater_id = ?2) LIMIT 1",
        (flow_id, rater_id),
    ).fetchone()
    return row is not None
