"""One rater's pairs and votes, over HTTP: what the voting page does, without the page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable, UsageError
from rlhf_cli.flow.http import LOOPBACK
from rlhf_cli.flow.wire import Lease, Outcome

RETRY_S = 3.0
UNDO_S = 60.0
SAID: dict[Outcome, str] = {
    "left": "Answer 1 it is.",
    "right": "Answer 2 it is.",
    "tie": "Equal.",
    "both_bad": "Both bad.",
    "skip": "Skipped.",
}


@dataclass
class Pair:
    lease: Lease
    until: float
    """By `time.monotonic`, as all times here."""
    shown_at: float = 0.0


@dataclass
class Cast:
    pair: Pair
    outcome: Outcome
    response_ms: int
    at: float
    sent: bool = False


class Ballot:
    """The pair on the screen, the one behind it, and votes until the server has them.

    Attributes:
        current: None while there is nothing to vote on.
        said: The last thing worth telling.
        votes: Cast in this session and acknowledged; taken back and skipped ones left out.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._upcoming: list[Pair] = []
        self._waiting: list[Cast] = []
        self._last: Cast | None = None
        self._retry_at = 0.0
        self._offline = False
        self.current: Pair | None = None
        self.said = ""
        self.votes = 0

    @property
    def status(self) -> str:
        if self._offline:
            count = len(self._waiting)
            return f"Offline, {count} vote{'' if count == 1 else 's'} waiting"
        return self.said

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def tick(self) -> None:
        """Give back what is over, send what waits, fetch what is missing; a server that is away is asked later."""
        now = time.monotonic()
        if self.current is not None and self.current.until <= now:
            self.said = "That pair went back after its time and is somebody else's now."
            self._show(None)
        if now < self._retry_at:
            return
        try:
            while self._waiting:
                self._send(self._waiting[0])
                self._waiting.pop(0)
            while not self._upcoming:
                reply = self._ask("POST", "/vote/lease")
                if reply.status_code == 204:
                    self._retry_at = now + RETRY_S
                    break
                self._upcoming.append(_pair(reply))
                if self.current is None:
                    self._show(None)
            if self._offline:
                self._offline, self.said = False, "Back online."
        except FlowUnavailable:
            self._offline, self._retry_at = True, now + RETRY_S

    def answer(self, outcome: Outcome) -> None:
        """Vote on the pair on the screen."""
        if self.current is None:
            return
        now = time.monotonic()
        self._last = Cast(self.current, outcome, round(1000 * (now - self.current.shown_at)), now)
        self._waiting.append(self._last)
        self.said, self._retry_at = SAID[outcome], 0.0 if not self._offline else self._retry_at
        self._show(None)

    def undo(self) -> None:
        """Take the last vote back, within a minute."""
        last, self._last = self._last, None
        if last is None or time.monotonic() - last.at > UNDO_S:
            self.said = "Nothing to take back."
            return
        again = last.pair
        if last in self._waiting:
            self._waiting.remove(last)
        else:
            try:
                reply = self._ask("POST", f"/vote/{quote(last.pair.lease.lease, safe='')}/undo", refusals=(409, 410))
            except FlowUnavailable:
                self.said = "Offline: the vote stays."
                return
            if reply.is_error:
                self.said = f"Not taken back: {_detail(reply)}."
                return
            again = _pair(reply)
            self.votes -= last.outcome != "skip"
        if self.current is not None:
            self._upcoming.insert(0, self.current)
        self._show(again)
        self.said = "Taken back. Vote again."

    def _show(self, pair: Pair | None) -> None:
        """Put `pair`, or else the next one that is still ours, on the screen."""
        now = time.monotonic()
        while pair is None and self._upcoming:
            pair = self._upcoming.pop(0)
            if pair.until <= now:
                pair = None
        self.current = pair
        if pair is None:
            return
        preloaded, pair.shown_at = now - pair.shown_at > 2, now
        if preloaded:
            try:
                reply = self._ask("POST", f"/vote/{quote(pair.lease.lease, safe='')}/renew", refusals=(404, 410))
            except FlowUnavailable:
                return
            if reply.is_error:
                self._show(None)
            else:
                pair.until = now + float(reply.json()["secondsLeft"])

    def _send(self, cast: Cast) -> None:
        path = f"/vote/{quote(cast.pair.lease.lease, safe='')}"
        body = {"outcome": cast.outcome, "response_ms": cast.response_ms}
        reply = self._ask("POST", path, body, refusals=(404, 409, 410))
        if reply.status_code == 410:
            self.said = "That pair had gone back before your vote arrived; it is kept but does not count."
        self.votes += reply.is_success and cast.outcome != "skip"

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, refusals: tuple[int, ...] = ()
    ) -> httpx.Response:
        try:
            reply = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise FlowUnavailable(f"{self._http.base_url} cannot be reached: {error}") from error
        if reply.status_code == 401:
            raise CredentialsError(f"{self._http.base_url} no longer knows you; ask for a new link.")
        if reply.status_code in (429, 503):
            raise FlowUnavailable(f"{self._http.base_url} is busy: {_detail(reply)}")
        if reply.is_error and reply.status_code not in refusals:
            raise FlowRefused(f"{path} was answered with {reply.status_code}: {_detail(reply)}")
        return reply


def connect(url: str, token: str | None) -> httpx.Client:
    """A client that is signed in, by a rater's token or by a one-time link, which is used up.

    Raises:
        UsageError: No such address, or neither link nor token.
        CredentialsError: Refused, or not a rater's.
        FlowUnavailable: Not reachable.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no address of a server; it must start with http:// or https://")
    base = f"{parts.scheme}://{parts.netloc}"
    http = httpx.Client(base_url=base, timeout=10, headers={"Origin": base}, trust_env=parts.hostname not in LOOPBACK)
    try:
        if token is not None:
            http.headers["Authorization"] = f"Bearer {token}"
            reply = http.get("/vote/progress")
        elif parts.path.startswith("/join/"):
            http.get(parts.path)
            reply = http.post("/join")
            if reply.is_success:
                reply = http.get("/session")
        else:
            raise UsageError("give a one-time link (`rlhf raters add` prints one), or a rater's token with --token-env")
        if reply.status_code == 404:
            raise FlowRefused(f"{base} is no server of ours: people vote nowhere else.")
        if reply.status_code in (401, 403, 410):
            raise CredentialsError(f"{base} does not let you in: {_detail(reply) or 'unknown token'}")
        reply.raise_for_status()
        if token is None:
            me = reply.json()
            if me["role"] != "rater":
                raise CredentialsError("this link is an owner's; owners look on, in a browser")
            http.headers["X-CSRF-Token"] = me["csrf"]
    except httpx.TransportError as error:
        http.close()
        raise FlowUnavailable(f"{base} cannot be reached: {error}") from error
    except BaseException:
        http.close()
        raise
    return http


def _pair(reply: httpx.Response) -> Pair:
    now = time.monotonic()
    return Pair(Lease.model_validate_json(reply.content), now + float(reply.json()["secondsLeft"]), now)


def _detail(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return reply.reason_phrase
