"""Times as the wire has them."""

from __future__ import annotations

from datetime import UTC, datetime


def iso(at: float) -> str:
    """Unix time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def unix_time(text: str) -> float:
    """ISO 8601 as Unix time; without a zone it is UTC."""
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
