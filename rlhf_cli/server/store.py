"""What the server knows: flows, datasets, items, leases and votes. Everything else is derived from the raw votes."""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.flow.wire import MAX_CANDIDATES, MIN_CANDIDATES, CastSegment, Outcome
from rlhf_cli.ranking.pairs import Goal, Pair, choose_pair
from rlhf_cli.ranking.stopping import judge_best
from rlhf_cli.server import items
from rlhf_cli.server.database import Database
from rlhf_cli.server.filters import EVERYTHING, Filter
from rlhf_cli.server.media import MediaFolder
from rlhf_cli.server.priors import Priors
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import (
    Candidate,
    FlowRecord,
    ItemRecord,
    LeasedPair,
    Vote,
    candidate_of,
    flow_of,
    item_of,
    vote_of,
)
from rlhf_cli.server.together import Together
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
    """The server's memory in one SQLite file, images in a folder beside it; usable from any thread.

    Args:
        clock: Unix time in seconds.
        rng: Draws pairs and sides; the default cannot be predicted.
        lease_s: How long a rater may keep a pair, where the flow does not say.

    Attributes:
        tokens: Who may talk to the server.
        lease_s: As given.
        together: Runs a method of the store so that requests arriving together share one flush to disk.
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
        self.lease_s = lease_s
        self._images = MediaFolder(None if str(path) == ":memory:" else Path(path).parent / "media")
        self._priors = Priors()
        self.tokens = Tokens(self._database, clock)
        self.together = Together(self._database)

    def close(self) -> None:
        self._database.close()

    # Flows, datasets, items

    def create_flow(
        self,
        name: str,
        instruction: str,
        responses: Responses,
        once: Once | None = None,
        *,
        goal: Goal = "ranking",
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        def make(db: sqlite3.Connection) -> str:
            flow_id = _new_id("flw")
            counts = (responses.min, responses.desired, responses.max)
            db.execute(
                "INSERT INTO flows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (flow_id, name, instruction, *counts, now, goal, json.dumps(settings or {})),
            )
            return flow_id

        now = self._clock()
        with self._database.transaction() as db:
            return _once(db, "flow", once, now, make)

    def update_flow(self, flow_id: str, change: Callable[[FlowRecord], FlowRecord]) -> None:
        """Put what `change` makes of a flow in its place; items that are there already stay as they are."""
        with self._database.transaction() as db:
            flow = change(flow_of(_flow_row(db, flow_id)))
            counts = (flow.responses.min, flow.responses.desired, flow.responses.max)
            db.execute(
                "UPDATE flows SET instruction = ?, min = ?, desired = ?, max = ?, goal = ?, settings = ? WHERE id = ?",
                (flow.instruction, *counts, flow.goal, json.dumps(flow.settings), flow_id),
            )

    def delete_flow(self, flow_id: str) -> None:
        """Hide a flow and stop what is open in it; its items and votes can still be read by their ids."""
        with self._database.transaction() as db:
            now = self._advance(db)
            _flow_row(db, flow_id)
            db.execute("UPDATE flows SET deleted_at = ? WHERE id = ?", (now, flow_id))
            open_items = db.execute("SELECT id FROM items WHERE flow_id = ? AND ended_at IS NULL", (flow_id,))
            for row in open_items.fetchall():
                items.end(db, row["id"], ItemState.STOPPED, now)

    def flow(self, flow_id: str) -> tuple[FlowRecord, int]:
        """A flow and how many items it has."""
        with self._database.transaction() as db:
            flow = flow_of(_flow_row(db, flow_id))
            (count,) = db.execute("SELECT COUNT(*) FROM items WHERE flow_id = ?", (flow_id,)).fetchone()
        return flow, int(count)

    def flows(
        self, name_contains: str, offset: int, limit: int, *, newest_first: bool, where: Filter = EVERYTHING
    ) -> tuple[int, list[FlowRecord]]:
        """How many flows there are with such a name, and a page of them."""
        only = Filter(f"deleted_at IS NULL AND instr(name, ?) > 0 AND {where.sql}", (name_contains, *where.values))
        with self._database.transaction() as db:
            total, rows = _page(db, "flows", only, offset, limit, newest_first)
        return total, [flow_of(row) for row in rows]

    def create_dataset(self, name: str, once: Once | None = None) -> str:
        def make(db: sqlite3.Connection) -> str:
            dataset_id = _new_id("dts")
            db.execute("INSERT INTO datasets VALUES (?, ?, ?)", (dataset_id, name, now))
            return dataset_id

        now = self._clock()
        with self._database.transaction() as db:
            return _once(db, "dataset", once, now, make)

    def add_media(self, content: bytes, original_name: str) -> str:
        """Keep an image and return the name to refer to it by; the same image under the same name is the same one."""
        digest, kind = self._images.put(content)
        name = f"img_{hashlib.sha256(f'{digest}/{original_name}'.encode()).hexdigest()[:32]}"
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO media VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (name, digest, kind, len(content), original_name, self._clock()),
            )
        return name

    def media(self, digest: str) -> tuple[Path, str]:
        """Where an image is, and its type."""
        path = self._images.path(digest)
        with self._database.transaction() as db:
            row = db.execute("SELECT type FROM media WHERE hash = ?", (digest,)).fetchone()
        if row is None:
            raise Problem(404, "no such image")
        return path, str(row["type"])

    def add_datapoint(self, dataset_id: str, sort_index: int | None, text: str, media: str | None = None) -> str:
        """Add a candidate; the same one at the same place again is the first one. Without a place it goes last.

        Args:
            media: Name of an image, as `add_media` returned it; `text` is then empty.
        """
        with self._database.transaction() as db:
            _row(db, "datasets", dataset_id)
            if media is not None:
                _media_hash(db, media)
            known = {row["sort_index"]: row for row in _datapoints(db, dataset_id)}
            if sort_index in known:
                if (known[sort_index]["text"], known[sort_index]["media"]) != (text, media):
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
            if any((row["media"] is None) != (media is None) for row in known.values()):
                raise Problem(400, f"dataset {dataset_id} mixes texts and images, which cannot be compared")
            place = max(known, default=-1) + 1 if sort_index is None else sort_index
            datapoint_id = _new_id("dpt")
            db.execute("INSERT INTO datapoints VALUES (?, ?, ?, ?, ?)", (datapoint_id, dataset_id, place, text, media))
        return datapoint_id

    def create_item(
        self,
        flow_id: str,
        dataset_id: str,
        context: str,
        ttl_s: float,
        once: Once | None = None,
        *,
        context_media: Sequence[str] = (),
        drain_s: float | None = None,
    ) -> str:
        """Ask people about a dataset.

        Args:
            context_media: Names of images to show above the pair.
            drain_s: Seconds before the end at which nobody new is asked; None takes the flow's.
        """

        def make(db: sqlite3.Connection) -> str:
            flow = flow_of(_flow_row(db, flow_id))
            _row(db, "datasets", dataset_id)
            size = len(_datapoints(db, dataset_id))
            if size < MIN_CANDIDATES:
                raise Problem(
                    400, f"dataset {dataset_id} has {size} candidates; an item needs at least {MIN_CANDIDATES}"
                )
            lease_s = flow.settings.get("serveTimeoutSeconds")
            hashes = json.dumps([_media_hash(db, name) for name in context_media])
            drain = flow.settings.get("drainDurationSeconds") or 0 if drain_s is None else drain_s
            times, more = (now, now + ttl_s), (flow.goal, flow.instruction, hashes, drain, lease_s)
            item_id, counts = _new_id("fli"), (flow.responses.min, flow.responses.desired, flow.responses.max)
            db.execute(
                "INSERT INTO items (id, flow_id, dataset_id, context, size, min, desired, max, state, votes, "
                "created_at, expires_at, goal, instruction, context_media, drain_s, lease_s) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?)",
                (item_id, flow_id, dataset_id, context, size, *counts, ItemState.PENDING, *times, *more),
            )
            return item_id

        now = self._clock()
        with self._database.transaction() as db:
            return _once(db, f"item of {flow_id}", once, now, make)

    def item(self, item_id: str) -> ItemRecord:
        with self._database.transaction() as db:
            self._advance(db)
            return item_of(_row(db, "items", item_id))

    def items(
        self, flow_id: str, offset: int, limit: int, *, newest_first: bool, where: Filter = EVERYTHING
    ) -> tuple[int, list[ItemRecord]]:
        """How many items a flow has, and a page of them."""
        with self._database.transaction() as db:
            self._advance(db)
            _flow_row(db, flow_id)
            only = Filter(f"flow_id = ? AND {where.sql}", (flow_id, *where.values))
            total, rows = _page(db, "items", only, offset, limit, newest_first)
        return total, [item_of(row) for row in rows]

    def stop(self, item_id: str) -> None:
        """End an item; one that has ended stays as it is."""
        with self._database.transaction() as db:
            now = self._advance(db)
            if _row(db, "items", item_id)["ended_at"] is None:
                items.end(db, item_id, ItemState.STOPPED, now)

    def candidates(self, item_id: str) -> list[Candidate]:
        with self._database.transaction() as db:
            rows = _datapoints(db, _row(db, "items", item_id)["dataset_id"])
        return [candidate_of(row) for row in rows]

    # Leases and votes

    def lease(self, rater_id: str) -> LeasedPair | None:
        """The next pair for a rater, of the oldest item that needs one; None while nothing is open for this rater."""
        with self._database.transaction() as db:
            now = self._advance(db)
            left_behind = db.execute(
                "SELECT id, item_id FROM leases WHERE state = 'live' AND rater_id = ?1 AND rowid NOT IN "
                "(SELECT rowid FROM leases WHERE rater_id = ?1 AND state = 'live' ORDER BY rowid DESC LIMIT ?2)",
                (rater_id, HELD_LEASES - 1),
            )
            items.return_leases(db, left_behind.fetchall(), now)
            serving = db.execute(
                "SELECT * FROM items WHERE ended_at IS NULL AND decided = 0 AND votes < desired AND votes + live < max "
                "AND expires_at - drain_s > ? ORDER BY created_at, rowid",
                (now,),
            )
            for row in serving:
                item = item_of(row)
                in_flight: dict[Pair, int] = {}
                seen: set[Pair] = set()
                leases = db.execute("SELECT rater_id, left, right, state FROM leases WHERE item_id = ?", (item.id,))
                for other, left, right, state in leases:
                    pair = (min(left, right), max(left, right))
                    if state == "live":
                        in_flight[pair] = in_flight.get(pair, 0) + 1
                    if other == rater_id:
                        seen.add(pair)
                if len(seen) == item.size * (item.size - 1) // 2:
                    continue
                wins = items.wins(db, item.id, item.size)
                chosen = choose_pair(wins, in_flight, seen, self._rng, item.goal)
                if chosen is not None:
                    sides = chosen if self._rng.random() < 0.5 else chosen[::-1]
                    return self.hand_out(db, item, sides, rater_id, now)
        return None

    def hand_out(self, db: sqlite3.Connection, item: ItemRecord, sides: Pair, rater_id: str, now: float) -> LeasedPair:
        """Lease a pair, as a step inside a transaction; `sides` are the places of what goes left and right."""
        left, right = sides
        lease_s = self.lease_s if item.lease_s is None else item.lease_s
        lease_id, expires_at = secrets.token_urlsafe(16), min(now + lease_s, item.expires_at)
        db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, 'live', ?, ?)",
            (lease_id, item.id, rater_id, left, right, now, expires_at),
        )
        db.execute(
            "UPDATE items SET state = ?, started_at = coalesce(started_at, ?), live = live + 1 WHERE id = ?",
            (ItemState.RUNNING, now, item.id),
        )
        candidates = [candidate_of(row) for row in _datapoints(db, item.dataset_id)]
        return LeasedPair(
            id=lease_id,
            prompt=item.context,
            instruction=item.instruction,
            left=candidates[left].shown,
            right=candidates[right].shown,
            images=candidates[left].media is not None,
            context_images=tuple(f"/media/{digest}" for digest in item.context_media),
            expires_at=expires_at,
        )

    def vote(
        self,
        lease_id: str,
        rater_id: str,
        outcome: Outcome,
        response_ms: int | None = None,
        segments: Sequence[CastSegment] = (),
    ) -> bool:
        """Keep a vote, and what was marked in the two texts; durable once this returns.

        False when it came too late to count.

        Raises:
            Problem: 404 unknown lease, 403 somebody else's, 409 already answered, 400 a mark is not in its text.
        """
        with self._database.transaction() as db:
            now = self._advance(db)
            lease = _row(db, "leases", lease_id)
            if lease["rater_id"] != rater_id:
                raise Problem(403, "this pair was handed to somebody else")
            if lease["state"] != "live" and _answered(db, lease_id):
                raise Problem(409, "this pair was already answered")
            in_time, item_id = bool(lease["state"] == "live"), lease["item_id"]
            if segments:
                _check_segments(segments, lease, self.candidates(item_id))
            cast = db.execute(
                "INSERT INTO votes VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                (lease_id, item_id, rater_id, lease["left"], lease["right"], outcome, response_ms, not in_time, now),
            )
            marks = [(cast.lastrowid, s.side, s.start, s.end, s.good) for s in segments]
            db.executemany("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", marks)
            if in_time:
                counts = outcome != "skip"
                items.close_lease(db, lease_id, item_id, "counted" if counts else "skipped", int(counts))
                self.decide(db, item_id)
                items.settle(db, item_id, now)
        return in_time

    def decide(self, db: sqlite3.Connection, item_id: str) -> None:
        """See whether the best of the group is known well enough, where that is the goal."""
        row = db.execute("SELECT size, min FROM items WHERE id = ? AND goal = 'best'", (item_id,)).fetchone()
        if row is not None:
            verdict = judge_best(items.wins(db, item_id, row["size"]), row["min"])
            db.execute("UPDATE items SET decided = ? WHERE id = ?", (verdict.stop, item_id))

    def votes(self, item_id: str | None = None, *, latest: int = -1) -> list[Vote]:
        """Raw votes, late and skipped ones too, in the order they arrived; of all items or one, all or the latest."""
        where, values = ("WHERE item_id = ?", (item_id,)) if item_id is not None else ("", ())
        with self._database.transaction() as db:
            rows = db.execute(f"SELECT * FROM votes {where} ORDER BY id DESC LIMIT ?", (*values, latest)).fetchall()
            marks: dict[int, list[sqlite3.Row]] = {}
            oldest = rows[-1]["id"] if rows else 0
            where = f"{where} AND" if where else "WHERE"
            for mark in db.execute(
                f"SELECT s.* FROM segments s JOIN votes v ON v.id = s.vote_id {where} s.vote_id >= ? ORDER BY s.rowid",
                (*values, oldest),
            ):
                marks.setdefault(mark["vote_id"], []).append(mark)
        return [vote_of(row, marks.get(row["id"], ())) for row in reversed(rows)]

    def matrix(self, item_id: str) -> WinMatrix:
        """The counted votes on an item by position; a tie, and two bad ones, are half a vote each way."""
        with self._database.transaction() as db:
            return items.wins(db, item_id, _row(db, "items", item_id)["size"])

    @contextmanager
    def now(self) -> Iterator[tuple[sqlite3.Connection, float]]:
        """A transaction and its time, with everything that was due by then done."""
        with self._database.transaction() as db:
            yield db, self._advance(db)

    def flow_settings(self, flow_id: str) -> dict[str, Any]:
        """Settings of a flow, deleted or not."""
        with self._database.transaction() as db:
            return flow_of(_row(db, "flows", flow_id)).settings

    def prior_sd(self, item: ItemRecord) -> float:
        """Prior width in logits under which an item is ranked, learned from the flow's items that ended before it."""
        with self._database.transaction() as db:
            return self._priors.sd(db, item)

    def part(self) -> AbstractContextManager[None]:
        """Inside `now`: if the block fails, nothing of it stays, and the transaction may go on."""
        return self._database.part()

    def _advance(self, db: sqlite3.Connection) -> float:
        now = self._clock()
        items.advance(db, now)
        return now


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


def _flow_row(db: sqlite3.Connection, flow_id: str) -> sqlite3.Row:
    row = _row(db, "flows", flow_id)
    if row["deleted_at"] is not None:
        raise Problem(404, f"flow {flow_id} was deleted")
    return row


def _media_hash(db: sqlite3.Connection, name: str) -> str:
    row = db.execute("SELECT hash FROM media WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise Problem(400, f"no image {name!r} was uploaded here; upload it again", {"name": ["unknown image"]})
    return str(row["hash"])


def _check_segments(segments: Sequence[CastSegment], lease: sqlite3.Row, candidates: Sequence[Candidate]) -> None:
    for segment in segments:
        candidate = candidates[lease[segment.side]]
        if candidate.media is not None or segment.end > len(candidate.text):
            raise Problem(400, "a mark is not in its text", {"segments": [f"{segment.end} is beyond the end"]})


def _answered(db: sqlite3.Connection, lease_id: str) -> bool:
    return db.execute("SELECT 1 FROM votes WHERE lease_id = ?", (lease_id,)).fetchone() is not None


def _page(
    db: sqlite3.Connection, table: str, where: Filter, offset: int, limit: int, newest_first: bool
) -> tuple[int, list[sqlite3.Row]]:
    (total,) = db.execute(f"SELECT COUNT(*) FROM {table} WHERE {where.sql}", where.values).fetchone()
    order = "DESC" if newest_first else "ASC"
    rows = db.execute(
        f"SELECT * FROM {table} WHERE {where.sql} ORDER BY created_at {order}, rowid {order} LIMIT ? OFFSET ?",
        (*where.values, limit, offset),
    )
    return int(total), rows.fetchall()


def _datapoints(db: sqlite3.Connection, dataset_id: str) -> list[sqlite3.Row]:
    return db.execute(
        "SELECT d.*, m.hash, m.original_name FROM datapoints d LEFT JOIN media m ON m.name = d.media "
        "WHERE d.dataset_id = ? ORDER BY d.sort_index",
        (dataset_id,),
    ).fetchall()


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"
