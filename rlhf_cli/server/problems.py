"""What the server says no to, and with which status."""

from __future__ import annotations


class Problem(Exception):
    """Becomes an `application/problem+json` answer; `errors` names fields of a body that is not valid."""

    def __init__(self, status: int, detail: str, errors: dict[str, list[str]] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
