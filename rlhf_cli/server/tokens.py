"""Who may talk to the server: client credentials, access tokens, raters. Secrets are shown once and kept as hashes."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.server.database import Database

Role = Literal["client", "rater", "owner"]
ACCESS_TTL_S = 3600.0


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
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, NULL, ?, ?, NULL) ON CONFLICT (id) DO UPDATE SET "
                "hash = excluded.hash, expires_at = excluded.expires_at, revoked_at = NULL",
                (token_id, role, label, _hash(secret), simulated, now, None if ttl_s is None else now + ttl_s),
            )
        return token_id, secret

    def issue_access(self, client_id: str, client_secret: str) -> str | None:
        """A short-lived token for a client's id and secret; None when they are not right."""
        secret, now = secrets.token_urlsafe(32), self._clock()
        with self._database.transaction() as db:
            row = db.execute("SELECT * FROM tokens WHERE id = ? AND parent IS NULL", (client_id,)).fetchone()
            right = hmac.compare_digest(_hash(client_secret), row["hash"] if row else bytes(32))
            if not right or row["role"] == "rater" or not _valid(_token(row), now):
                return None
            db.execute("DELETE FROM tokens WHERE parent IS NOT NULL AND expires_at <= ?", (now,))
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    f"access_{secrets.token_hex(8)}",
                    row["role"],
                    row["label"],
                    _hash(secret),
                    row["simulated"],
                    client_id,
                    now,
                    now + ACCESS_TTL_S,
                ),
            )
        return secret

    def authenticate(self, secret: str) -> Token | None:
        """Whose bearer token this is; None when it is unknown, expired or revoked."""
        with self._database.transaction() as db:
            row = db.execute("SELECT * FROM tokens WHERE hash = ?", (_hash(secret),)).fetchone()
        return token if row is not None and _valid(token := _token(row), self._clock()) else None

    def revoke(self, token_id: str) -> None:
        """From now on neither the token nor anything issued to it works."""
        with self._database.transaction() as db:
            now = self._clock()
            db.execute("UPDATE tokens SET revoked_at = ? WHERE id = ? OR parent = ?", (now, token_id, token_id))

    def all(self) -> list[Token]:
        """Every token that was not issued for another one, oldest first."""
        with self._database.transaction() as db:
            rows = db.execute("SELECT * FROM tokens WHERE parent IS NULL ORDER BY created_at, rowid").fetchall()
        return [_token(row) for row in rows]


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
