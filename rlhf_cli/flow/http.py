"""One HTTP call done carefully: token, deadline, size cap, retries, and errors that say what to do next."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.flow import wire
from rlhf_cli.flow.base import BadAnswer, EffectUnknown
from rlhf_cli.flow.circuit import AT_ONCE, LONGEST_PAUSE_S, Circuit, Outage, Transient
from rlhf_cli.flow.credentials import Credentials, read_token_file, usable

MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_RETRY_AFTER_S = 60.0
REFRESH_BEFORE_S = 60.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Reached directly: a proxy that the environment names would look for them on its own machine."""

Answer = TypeVar("Answer", bound=BaseModel)
Params = Mapping[str, str | int | list[str]]
Files = Mapping[str, tuple[str, bytes, str]]
"""Parts of a form by their names: file name, content, media type."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, on the event loop's clock, which never jumps."""

    attempt_s: float = 20.0
    """For one answer, from the first byte to the last."""
    outage_s: float = 45.0
    """For a service that does not answer, before FlowUnavailable."""
    pause_s: float = 0.5
    """Before the second attempt; doubles up to `LONGEST_PAUSE_S`, give or take a quarter."""


PATIENT = Patience()


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    content: bytes
    wait_s: float | None
    """What Retry-After asks for."""


class HttpCalls:
    """Calls to one service; use within one event loop.

    Args:
        base_url: Where the paths start.
        token_url: Where a client id and secret are exchanged for a token.
        transport: For tests; the default speaks real HTTP with TLS verified.
        clock: Seconds that never jump, for the age of tokens.

    Attributes:
        circuit: How the service is reached at the moment.
        requests: Requests sent, those for tokens included.
        retries: Attempts of calls after their first.
    """

    def __init__(
        self,
        base_url: str,
        token_url: str,
        credentials: Credentials,
        *,
        patience: Patience = PATIENT,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for url in (base_url, token_url):
            _check_address(url)
        self.base_url = base_url.rstrip("/")
        self._token_url = token_url
        self._credentials = credentials
        self._patience = patience
        self._clock = clock
        self.circuit = Circuit(patience.outage_s, patience.pause_s)
        self.requests = 0
        self.retries = 0
        self._token: str | None = None
        self._token_expires = math.inf
        self._token_lock = asyncio.Lock()
        self._token_failures = 0
        self._token_failure: Transient | None = None
        self._http = httpx.AsyncClient(
            transport=transport,
            trust_env=httpx.URL(base_url).host not in LOOPBACK,
            timeout=patience.attempt_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE, keepalive_expiry=30),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "rlhf"},
        )

    async def call(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        *,
        body: wire.Body | None = None,
        params: Params | None = None,
        key: str | None = None,
        repeatable: bool = True,
        files: Files | None = None,
    ) -> Answer:
        """Call and read the answer.

        Args:
            key: Sent as Idempotency-Key.
            repeatable: False for a creation that would happen twice: repeated only where it surely had no effect.

        Raises:
            FlowUnavailable, FlowRefused, BadAnswer, CredentialsError: See `rlhf_cli.flow.base.Flow`.
        """
        reply = await self._call(method, path, body=body, params=params, key=key, repeatable=repeatable, files=files)
        return self._read(f"{method} {self.base_url}{path}", reply, answer)

    async def find(
        self,
        path: str,
        answer: type[Answer],
        *,
        absent: int,
        params: Params | None = None,
        keep: Callable[[bytes], object] | None = None,
    ) -> Answer | None:
        """GET what may not be there: None where the status is `absent`; `keep` is shown the body before it is read."""
        reply = await self._call("GET", path, params=params, absent=absent)
        if reply.status == absent:
            return None
        if keep is not None:
            keep(self.redact(reply.content))
        return self._read(f"GET {self.base_url}{path}", reply, answer)

    async def send(self, method: str, path: str, body: wire.Body | None = None) -> None:
        """Call without reading an answer; safe to repeat."""
        await self._call(method, path, body=body)

    def redact(self, content: bytes) -> bytes:
        """`content` without our secrets, should a service send them back."""
        for secret in (*self._credentials.secrets, self._token or ""):
            content = content.replace(secret.encode(), b"[redacted]") if secret else content
        return content

    async def close(self) -> None:
        await self._http.aclose()

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: wire.Body | None = None,
        params: Params | None = None,
        key: str | None = None,
        repeatable: bool = True,
        absent: int | None = None,
        files: Files | None = None,
    ) -> _Reply:
        place = f"{method} {self.base_url}{path}"
        request = self._http.build_request(
            method,
            self.base_url + path,
            json=None if body is None else body.to_json(),
            params=params,
            files=files,
            headers={} if key is None else {"Idempotency-Key": key},
        )
        try:
            reply = await self._patiently(request, repeatable)
        except Transient as error:
            raise EffectUnknown(
                f"{place}: {error}. Whether it had an effect is not known; a resume looks before it asks again."
            ) from error
        except Outage as error:
            raise FlowUnavailable(
                f"{place}: {error.__cause__}. Gave up after {self._patience.outage_s:g} s without an answer; "
                "resume when the service is back."
            ) from error
        if not (200 <= reply.status < 300 or reply.status == absent):
            raise self._refusal(place, reply)
        return reply

    async def _patiently(self, request: httpx.Request, repeatable: bool) -> _Reply:
        """The first answer that is one.

        Raises:
            Transient: It may have had an effect and is not to be repeated.
            Outage: No answer within the patience.
        """
        now = asyncio.get_running_loop().time
        began, failing_since, tries = now(), math.inf, 0

        async def send() -> _Reply:
            nonlocal began, tries
            began = now()
            tries += 1
            self.retries += tries > 1
            return await self._answered(request)

        pause_s = self._patience.pause_s
        while True:
            try:
                return await self.circuit.through(send, None if repeatable else self._look)
            except Transient as error:
                if error.effect and not repeatable:
                    raise
                # Others may be answered while this call is not. Measured where the attempt began, as in the circuit.
                if began - failing_since >= self._patience.outage_s:
                    raise Outage from error
                failing_since = min(failing_since, now())
                # A circuit that a harmless probe closes again says nothing about creations: they keep their own pauses.
                if self.circuit.state == "closed" or not repeatable:
                    left_s = max(0.0, failing_since + self._patience.outage_s - now())
                    own_s = min(self.circuit.jittered(pause_s), left_s)
                    # A little more than what was asked for: all who were turned away together would come together.
                    await asyncio.sleep(own_s if error.wait_s is None else 0.1 * own_s + error.wait_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _answered(self, request: httpx.Request) -> _Reply:
        reply = await self._authorized(request)
        if reply.status == 429 or reply.status >= 500:
            # 429 turns a request away at the door; after a 5xx anything may have happened.
            raise Transient(f"answered {reply.status}", effect=reply.status != 429, wait_s=reply.wait_s)
        return reply

    async def _look(self) -> None:
        """Ask for something small that every service has, to see whether it answers."""
        params: Params = {"page": 1, "page_size": 1, "sort": "-created_at", "name[contains]": ""}
        try:
            await self._answered(self._http.build_request("GET", f"{self.base_url}/flow", params=params))
        except Transient as error:
            raise Transient(str(error), effect=False, wait_s=error.wait_s) from error

    async def _authorized(self, request: httpx.Request) -> _Reply:
        """One attempt with a valid token; if the service forgot the token before its time, one more with a new one."""
        token = await self._fresh_token()
        request.headers["Authorization"] = f"Bearer {token}"
        reply = await self._attempt(request)
        if reply.status != 401 or self._credentials.token:
            return reply
        if self._token == token:
            self._token = None
        request.headers["Authorization"] = f"Bearer {await self._fresh_token()}"
        return await self._attempt(request)

    async def _fresh_token(self) -> str:
        if self._credentials.token:
            return self._credentials.token
        failures = self._token_failures
        async with self._token_lock:
            if self._token is not None and self._clock() < self._token_expires:
                return self._token
            if failures != self._token_failures and (failed := self._token_failure):
                # Somebody asked while this call waited for the lock: that failure is ours too.
                raise Transient(str(failed), effect=False, wait_s=failed.wait_s)
            try:
                self._token, lifetime_s = await self._new_token()
            except Transient as error:
                self._token_failures += 1
                self._token_failure = error
                raise
            early_s = min(REFRESH_BEFORE_S, lifetime_s / 2)
            self._token_expires = self._clock() + lifetime_s - early_s if lifetime_s < math.inf else math.inf
            return self._token

    async def _new_token(self) -> tuple[str, float]:
        """A token and its lifetime in seconds, infinite where nobody says."""
        if self._credentials.token_file is not None:
            return self._token_from_file(self._credentials.token_file)
        token = await self._bought_token()
        if not usable(token.access_token):
            raise BadAnswer(f"POST {self._token_url} answered with a token that cannot be sent in a header.")
        lifetime_s = math.inf if token.expires_in is None else token.expires_in
        # Nobody means a token that is dead on arrival: then its end shows as a 401.
        return token.access_token, lifetime_s if lifetime_s > 0 else math.inf

    def _token_from_file(self, path: Path) -> tuple[str, float]:
        try:
            token, expires_at = read_token_file(path)
        except CredentialsError:
            if self._token is None:
                raise
            return self._token, math.inf  # caught while it is being written: a 401 tells when ours is over
        # By a clock that may be wrong: too early only reads the file again, too late shows as a 401.
        return token, math.inf if expires_at is None else max(0.0, expires_at - time.time())

    async def _bought_token(self) -> wire.Token:
        request = self._http.build_request(
            "POST",
            self._token_url,
            data={"grant_type": "client_credentials", "scope": "openid email api"},
            headers={"Authorization": "Basic " + self._credentials.basic},
        )
        try:
            reply = await self._attempt(request)
        except Transient as error:
            raise Transient(f"no token from {self._token_url}: {error}", effect=False) from error
        if reply.status == 429 or reply.status >= 500:
            raise Transient(f"{self._token_url} answered {reply.status}", effect=False, wait_s=reply.wait_s)
        place = f"POST {self._token_url}"
        if reply.status in (400, 401, 403):
            raise CredentialsError(
                f"{place} refused {self._credentials.origin} ({reply.status}: {self._excerpt(reply.content)}). "
                "Check that the client id and secret belong to this service."
            )
        if reply.status != 200:
            raise self._refusal(place, reply)
        return self._read(place, reply, wire.Token)

    async def _attempt(self, request: httpx.Request) -> _Reply:
        """Send once and read all of the answer within the deadline and the size cap."""
        self.requests += 1
        try:
            # httpx bounds each read, not the whole: a byte a second would keep us for ever.
            async with asyncio.timeout(self._patience.attempt_s):
                response = await self._http.send(request, stream=True)
                try:
                    content = await self._body(request, response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise Transient(f"no whole answer within {self._patience.attempt_s:g} s", effect=True) from error
        except httpx.TransportError as error:
            said = self._credentials.redact(f"{type(error).__name__}: {error}")
            if isinstance(error, (httpx.LocalProtocolError, httpx.UnsupportedProtocol)):
                raise FlowRefused(f"{request.method} {request.url} cannot be sent: {type(error).__name__}.") from None
            if isinstance(error, httpx.ConnectError) and any(map(_never_trusted, _causes(error))):
                raise FlowRefused(
                    f"TLS to {request.url.host} failed ({error}). Check the address, the certificates and the clock."
                ) from error
            unsent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError))
            raise Transient(said, effect=not unsent) from error
        headers = response.headers
        return _Reply(
            response.status_code, content, retry_after_s(headers.get("Retry-After"), http_date(headers.get("Date")))
        )

    async def _body(self, request: httpx.Request, response: httpx.Response) -> bytes:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadAnswer(f"{request.url.host} sent a compressed answer although none was asked for.")
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise BadAnswer(f"{request.method} {request.url} answered with more than {MAX_ANSWER_BYTES >> 20} MiB.")
        return bytes(content)

    def _read(self, place: str, reply: _Reply, answer: type[Answer]) -> Answer:
        try:
            return answer.model_validate_json(reply.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "".join(f"{part}: " for part in first["loc"][-1:])
            raise BadAnswer(
                f"{place} answered {reply.status} with a body that is not what the protocol says "
                f"({where}{first['msg']}): {self._excerpt(reply.content)}. "
                "Check that the address is that of a ranking-flow service."
            ) from None  # the cause holds the whole body, secrets included

    def _refusal(self, place: str, reply: _Reply) -> FlowRefused | CredentialsError:
        said = f"answered {reply.status}: {self._excerpt(reply.content)}"
        if reply.status in (401, 403):
            return CredentialsError(
                f"{place} {said}. Check {self._credentials.origin}: expired, revoked or not allowed?"
            )
        if 300 <= reply.status < 400:
            return FlowRefused(f"{place} {said}. Redirects are not followed; give the service's final address.")
        return FlowRefused(f"{place} {said}. Repeating this will not help.")

    def _excerpt(self, content: bytes, length: int = 200) -> str:
        text = self.redact(content)[: 4 * length].decode("utf-8", "replace")
        text = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf") else c for c in text).split())
        return text[:length] + ("..." if len(text) > length else "") if text else "(empty)"


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds to wait by a Retry-After header, capped at a minute; None without one, or when it makes no sense.

    Args:
        now: The service's own time, by its Date header; without it ours, which may be wrong.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        until = http_date(value)
        if until is None:
            return None
        seconds = (until - (now or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None


def http_date(value: str | None) -> datetime | None:
    """The time that a header names; None without one, or when it is no date with a zone."""
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, TypeError):
        return None
    return date if date.tzinfo else None


def _check_address(url: str) -> None:
    try:
        parsed = httpx.URL(url)
        fine = parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 1) < 1 << 16
    except httpx.InvalidURL:
        fine = False
    if not fine:
        raise FlowRefused(f"{url!r} is no address of a flow service; it must start with http:// or https://.")


def _never_trusted(error: BaseException) -> bool:
    """Whether TLS failed for good; a peer that hangs up in the middle, as one that restarts does, may come back."""
    passing = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    return isinstance(error, ssl.SSLError) and not isinstance(error, passing)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()  # an exception that is raised twice can be its own context
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
