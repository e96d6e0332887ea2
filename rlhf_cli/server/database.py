"""One SQLite file behind one lock: what a transaction returned from is on disk."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import RunDamaged

MIGRATIONS = (
    """
    CREATE TABLE tokens (
        id TEXT PRIMARY KEY, role TEXT NOT NULL, label TEXT NOT NULL, hash BLOB NOT NULL UNIQUE,
        simulated INTEGER NOT NULL, parent TEXT REFERENCES tokens(id),
        created_at REAL NOT NULL, expires_at REAL, revoked_at REAL
    ) STRICT;
    CREATE TABLE once (
        scope TEXT NOT NULL, key TEXT NOT NULL, body_hash BLOB NOT NULL, made TEXT NOT NULL, created_at REAL NOT NULL,
        PRIMARY KEY (scope, key)
    ) STRICT;
    CREATE TABLE flows (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, instruction TEXT NOT NULL,
        min INTEGER NOT NULL, desired INTEGER NOT NULL, max INTEGER NOT NULL, created_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE datasets (id TEXT PRIMARY KEY, name TEXT NOT NULL, created_at REAL NOT NULL) STRICT;
    CREATE TABLE datapoints (
        id TEXT PRIMARY KEY, dataset_id TEXT NOT NULL REFERENCES datasets(id), sort_index INTEGER NOT NULL,
        text TEXT NOT NULL, UNIQUE (dataset_id, sort_index)
    ) STRICT;
    CREATE TABLE items (
        id TEXT PRIMARY KEY, flow_id TEXT NOT NULL REFERENCES flows(id),
        dataset_id TEXT NOT NULL REFERENCES datasets(id), context TEXT NOT NULL, size INTEGER NOT NULL,
        min INTEGER NOT NULL, desired INTEGER NOT NULL, max INTEGER NOT NULL,
        state TEXT NOT NULL, votes INTEGER NOT NULL,
        created_at REAL NOT NULL, expires_at REAL NOT NULL, started_at REAL, ended_at REAL
    ) STRICT;
    CREATE INDEX items_by_flow ON items (flow_id, created_at);
    CREATE INDEX items_by_dataset ON items (dataset_id);
    CREATE INDEX items_open ON items (created_at) WHERE ended_at IS NULL;
    CREATE TABLE leases (
        id TEXT PRIMARY KEY, item_id TEXT NOT NULL REFERENCES items(id), rater_id TEXT NOT NULL REFERENCES tokens(id),
        left INTEGER NOT NULL, right INTEGER NOT NULL, state TEXT NOT NULL,
        created_at REAL NOT NULL, expires_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX leases_by_item ON leases (item_id, rater_id);
    CREATE INDEX leases_by_rater ON leases (rater_id);
    CREATE INDEX leases_live ON leases (expires_at) WHERE state = 'live';
    CREATE TABLE votes (
        id INTEGER PRIMARY KEY, lease_id TEXT NOT NULL UNIQUE REFERENCES leases(id),
        item_id TEXT NOT NULL REFERENCES items(id), rater_id TEXT NOT NULL REFERENCES tokens(id),
        left INTEGER NOT NULL, right INTEGER NOT NULL, outcome TEXT NOT NULL, response_ms INTEGER,
        late INTEGER NOT NULL, created_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX votes_by_item ON votes (item_id);
    """,
    """
    ALTER TABLE tokens ADD COLUMN kind TEXT NOT NULL DEFAULT 'secret';
    UPDATE tokens SET kind = 'access' WHERE parent IS NOT NULL;
    CREATE INDEX tokens_by_parent ON tokens (parent) WHERE parent IS NOT NULL;
    ALTER TABLE flows ADD COLUMN goal TEXT NOT NULL DEFAULT 'ranking';
    ALTER TABLE flows ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE flows ADD COLUMN deleted_at REAL;
    CREATE TABLE media (
        name TEXT PRIMARY KEY, hash TEXT NOT NULL, type TEXT NOT NULL, bytes INTEGER NOT NULL,
        original_name TEXT NOT NULL, created_at REAL NOT NULL
    ) STRICT;
    CREATE INDEX media_by_hash ON media (hash);
    ALTER TABLE datapoints ADD COLUMN media TEXT REFERENCES media(name);
    ALTER TABLE items ADD COLUMN goal TEXT NOT NULL DEFAULT 'ranking';
    ALTER TABLE items ADD COLUMN instruction TEXT NOT NULL DEFAULT '';
    ALTER TABLE items ADD COLUMN context_media TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE items ADD COLUMN drain_s REAL NOT NULL DEFAULT 0;
    ALTER TABLE items ADD COLUMN lease_s REAL;
    ALTER TABLE items ADD COLUMN live INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE items ADD COLUMN decided INTEGER NOT NULL DEFAULT 0;
    UPDATE items SET instruction = (SELECT instruction FROM flows WHERE id = flow_id),
        live = (SELECT COUNT(*) FROM leases WHERE item_id = items.id AND state = 'live');
    CREATE INDEX items_serving ON items (created_at)
        WHERE ended_at IS NULL AND decided = 0 AND votes < desired AND votes + live < max;
    CREATE INDEX items_expiring ON items (expires_at) WHERE ended_at IS NULL;
    DROP INDEX items_open;
    CREATE INDEX leases_live_by_rater ON leases (rater_id) WHERE state = 'live';
    ALTER TABLE votes ADD COLUMN undone INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE undos (vote_id INTEGER PRIMARY KEY REFERENCES votes(id), created_at REAL NOT NULL) STRICT;
    CREATE INDEX votes_by_rater ON votes (rater_id, created_at);
    CREATE TABLE gold (
        id TEXT PRIMARY KEY, flow_id TEXT NOT NULL REFERENCES flows(id), prompt TEXT NOT NULL,
        better TEXT NOT NULL, worse TEXT NOT NULL, created_at REAL NOT NULL, retired_at REAL
    ) STRICT;
    CREATE INDEX gold_by_flow ON gold (flow_id) WHERE retired_at IS NULL;
    CREATE TABLE gold_leases (
        id TEXT PRIMARY KEY, gold_id TEXT NOT NULL REFERENCES gold(id), rater_id TEXT NOT NULL REFERENCES tokens(id),
        better_side TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL NOT NULL,
        outcome TEXT, response_ms INTEGER, answered_at REAL, undone_at REAL
    ) STRICT;
    CREATE INDEX gold_leases_by_rater ON gold_leases (rater_id, gold_id);
    """,
    """
    CREATE TABLE segments (
        vote_id INTEGER NOT NULL REFERENCES votes(id), side TEXT NOT NULL,
        start INTEGER NOT NULL, stop INTEGER NOT NULL, good INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX segments_by_vote ON segments (vote_id);
    """,
)
"""Each brings the file from version i to i + 1; applied ones are never edited."""


BUSY_S = 3.0


class Database:
    """The open file; usable from any thread, one transaction at a time.

    Raises:
        RunDamaged: The file is no database of ours, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.RLock()
        # Waiting for another process blocks everybody else too, so it is kept short and answered with 503.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
        self._connection.row_factory = sqlite3.Row
        try:
            # FULL, because a vote is paid for: what was acknowledged must survive a power cut, not only a kill.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise RunDamaged(f"{path}: cannot be used as the votes' database: {error}.") from error
        except BaseException:
            self._connection.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable once the outermost block is left. A block inside another one is part of it."""
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
            else:
                with self._bounded("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"):
                    yield self._connection

    @contextmanager
    def part(self) -> Iterator[None]:
        """Inside a transaction: if the block fails, nothing of it stays, and the transaction may go on."""
        with self._bounded("SAVEPOINT part", "RELEASE part", "ROLLBACK TO part", "RELEASE part"):
            yield

    @contextmanager
    def _bounded(self, begin: str, commit: str, *rollback: str) -> Iterator[None]:
        self._connection.execute(begin)
        try:
            yield
            self._connection.execute(commit)
        except BaseException:
            if self._connection.in_transaction:  # a full disk may have ended it already
                for statement in rollback:
                    self._connection.execute(statement)
            raise

    @property
    def lost(self) -> bool:
        """Inside a transaction: SQLite has rolled it back by itself, as it does when the disk is full."""
        return not self._connection.in_transaction

    def changes_elsewhere(self) -> int:
        """A number that is another one once another process has changed the file."""
        with self._lock:
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _migrate(self, path: Path | str) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise RunDamaged(f"{path}: written by a newer version of rlhf (format {version}); update rlhf to read it.")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
