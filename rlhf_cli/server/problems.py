"""What the server says no to, and with which status."""

from __future__ import annotations


class Problem(Exception):
    """Becomes an `application/problem+json` answer; `errors` names fields of a body that is not valid."""

    retry_after_s: int | None = None

    def __init__(self, status: int, detail: str, errors: dict[str, list[str]] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        if status == 503:
            self.retry_after_s = 5


class TooMany(Problem):
    """Asked too often; come back after so many seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(429, f"too many requests; come back in {retry_after_s} s")
        self.retry_after_s = retry_after_s
