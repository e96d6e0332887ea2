"""Who may talk to the server: clients, raters, owners. Secrets are shown once and kept as hashes.

Every secret is 256 random bits of one kind, good for one thing alone:

- `secret`: what `rlhf tokens add` shows; a bearer token, and what clients and owners get short-lived ones for;
- `access`: that short-lived bearer token;
- `link`: lets a person in once, in exchange for a session;
- `session`: what a browser keeps in its cookie; never good as a bearer token.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.server.database import Database

Role = Literal["client", "rater", "owner"]
ACCESS_TTL_S = 3600.0
LINK_TTL_S = 7 * 86400.0
SESSION_TTL_S = 30 * 86400.0
JOIN_PATH = "/join"
"""A link is `<server>/join/<secret>`."""
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Token:
    """A known token. `id` is also the client id, or the pseudonym of a rater."""

    id: str
    role: Role
    label: str
    simulated: bool
    parent: str | None
    """For an access token, the client it was issued to."""
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Tokens:
    """Tokens in a database; `clock` gives Unix time in seconds."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._known: dict[tuple[bytes, tuple[str, ...]], tuple[Token, float]] = {}
        """Valid tokens by hash and what they are good for, and when they end; forgotten whenever any token changes."""
        self._seen_version = -1

    def add(
        self,
        role: Role,
        label: str,
        *,
        simulated: bool = False,
        ttl_s: float | None = None,
        token_id: str | None = None,
    ) -> tuple[str, str]:
        """Create a token and return its id and secret. An existing `token_id` gets a new secret, the old one dies."""
        token_id, secret = token_id or f"{role}_{secrets.token_hex(8)}", secrets.token_urlsafe(32)
        now = self._clock()
        with self._changing() as db:
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, NULL, ?, ?, NULL, 'secret') ON CONFLICT (id) DO UPDATE SET "
                "hash = excluded.hash, expires_at = excluded.expires_at, revoked_at = NULL",
                (token_id, role, label, _hash(secret), simulated, now, None if ttl_s is None else now + ttl_s),
            )
        return token_id, secret

    def add_simulated(self, population: str, count: int) -> list[tuple[str, str]]:
        """Ids and secrets of simulated raters; the same population is the same raters with new secrets."""
        with self._changing():  # one flush to disk for all of them
            return [
                self.add("rater", f"simulated {n}", simulated=True, token_id=f"rater_simulated_{population}_{n:03d}")
                for n in range(count)
            ]

    def add_link(self, token_id: str, ttl_s: float = LINK_TTL_S) -> str:
        """A secret that lets the person behind `token_id` in once, from any browser."""
        with self._changing() as db:
            return self._child(db, token_id, "link", ttl_s)

    def redeem_link(self, secret: str, session_ttl_s: float = SESSION_TTL_S) -> tuple[Token, str] | None:
        """Who the link was for, and the secret of a new session; None when it is used up, expired or unknown."""
        with self._changing() as db:
            found = self._find(db, secret, "link")
            if found is None:
                return None
            link = found[0]
            db.execute("DELETE FROM tokens WHERE hash = ?", (_hash(secret),))
            return link, self._child(db, link.id, "session", session_ttl_s)

    def open_session(self, token_id: str, ttl_s: float = SESSION_TTL_S) -> str:
        """The secret of a new session of whoever is behind `token_id`."""
        with self._changing() as db:
            return self._child(db, token_id, "session", ttl_s)

    def session(self, secret: str) -> Token | None:
        """Whose session this is: the person's own token; None when it is unknown, over or revoked."""
        return self._authenticate(secret, "session")

    def end_session(self, secret: str) -> None:
        with self._changing() as db:
            db.execute("DELETE FROM tokens WHERE hash = ? AND kind = 'session'", (_hash(secret),))

    def issue_access(self, client_id: str, client_secret: str) -> str | None:
        """A short-lived token for a client's id and secret; None when they are not right."""
        with self._changing() as db:
            row = db.execute("SELECT * FROM tokens WHERE id = ? AND kind = 'secret'", (client_id,)).fetchone()
            right = hmac.compare_digest(_hash(client_secret), row["hash"] if row else bytes(32))
            if not right or row["role"] == "rater" or not _valid(_token(row), self._clock()):
                return None
            return self._child(db, client_id, "access", ACCESS_TTL_S)

    def authenticate(self, secret: str) -> Token | None:
        """Whose bearer token this is; None when it is unknown, expired or revoked."""
        return self._authenticate(secret, "secret", "access")

    def revoke(self, token_id: str) -> bool:
        """From now on neither the token nor anything issued to it works. False when there is no such token."""
        with self._changing() as db:
            now = self._clock()
            changed = db.execute(
                "UPDATE tokens SET revoked_at = coalesce(revoked_at, ?) WHERE id = ? OR parent = ?",
                (now, token_id, token_id),
            )
        return changed.rowcount > 0

    def all(self) -> list[Token]:
        """Every token that was not issued for another one, oldest first."""
        with self._database.transaction() as db:
            rows = db.execute("SELECT * FROM tokens WHERE parent IS NULL ORDER BY created_at, rowid").fetchall()
        return [_token(row) for row in rows]

    def _authenticate(self, secret: str, *kinds: str) -> Token | None:
        version, now = self._database.changes_elsewhere(), self._clock()
        if version != self._seen_version:  # another process may have revoked something
            self._known.clear()
            self._seen_version = version
        key = _hash(secret), kinds
        known = self._known.get(key)
        if known is None:
            with self._database.transaction() as db:  # remembered before anybody can revoke it
                known = self._find(db, secret, *kinds)
                if known is None:
                    return None
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key] = known
        token, ends_at = known
        return token if now < ends_at else None

    def _find(self, db: sqlite3.Connection, secret: str, *kinds: str) -> tuple[Token, float] | None:
        """The valid token with this secret and when it ends; for links and sessions the person's own token."""
        row = db.execute("SELECT * FROM tokens WHERE hash = ?", (_hash(secret),)).fetchone()
        if row is None or row["kind"] not in kinds:
            return None
        found = [_token(row)]
        if row["kind"] in ("link", "session"):
            found.append(_token(db.execute("SELECT * FROM tokens WHERE id = ?", (row["parent"],)).fetchone()))
        ends_at = min(math.inf if token.expires_at is None else token.expires_at for token in found)
        return (found[-1], ends_at) if all(_valid(token, self._clock()) for token in found) else None

    def _child(self, db: sqlite3.Connection, parent_id: str, kind: str, ttl_s: float) -> str:
        secret, now = secrets.token_urlsafe(32), self._clock()
        parent = db.execute("SELECT * FROM tokens WHERE id = ?", (parent_id,)).fetchone()
        db.execute("DELETE FROM tokens WHERE parent IS NOT NULL AND expires_at <= ?", (now,))
        db.execute(
            "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)",
            (
                f"{kind}_{secrets.token_hex(8)}",
                parent["role"],
                parent["label"],
                _hash(secret),
                parent["simulated"],
                parent_id,
                now,
                now + ttl_s,
                kind,
            ),
        )
        return secret

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._database.transaction() as db:
            self._known.clear()
            yield db


def _hash(secret: str) -> bytes:
    # 256 random bits need no salt and no slow hash.
    return hashlib.sha256(secret.encode()).digest()


def _valid(token: Token, now: float) -> bool:
    return token.revoked_at is None and (token.expires_at is None or now < token.expires_at)


def _token(row: sqlite3.Row) -> Token:
    return Token(
        id=row["id"],
        role=row["role"],
        label=row["label"],
        simulated=bool(row["simulated"]),
        parent=row["parent"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )
