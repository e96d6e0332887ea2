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
)
"""Each brings the file from version i to i + 1; applied ones are never edited."""


class Database:
    """The open file; usable from any thread, one transaction at a time.

    Raises:
        RunDamaged: The file is no database of ours, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
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
        """All or nothing, durable once the block is left."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _migrate(self, path: Path | str) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise RunDamaged(f"{path}: written by a newer version of rlhf (format {version}); update rlhf to read it.")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
