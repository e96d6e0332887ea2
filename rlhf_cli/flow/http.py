"""One HTTP call done carefully: token, deadline, size cap, retries, and errors that say what to do next."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import ssl
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
import stamina
from pydantic import BaseModel, ValidationError

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.flow import wire
from rlhf_cli.flow.base import BadAnswer
from rlhf_cli.flow.credentials import Credentials

MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_RETRY_AFTER_S = 60.0
REFRESH_BEFORE_S = 60.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Reached directly: a proxy that the environment names would look for them on its own machine."""

# Retries are reported through our own errors; without a handler Python would print each of them into the live view.
logging.getLogger("stamina").addHandler(logging.NullHandler())

Answer = TypeVar("Answer", bound=BaseModel)
Params = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait: `attempt_s` for one answer from first byte to last, `retry_s` over all attempts of a call."""

    attempt_s: float = 20.0
    retry_s: float = 45.0


PATIENT = Patience()


class _Transient(Exception):
    """Worth another attempt. `effect` is True where the service may have done what was asked."""

    def __init__(self, what: str, *, effect: bool, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.effect = effect
        self.wait_s = wait_s


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
            if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
                raise FlowRefused(f"{url!r} is no address of a flow service; it must start with http:// or https://.")
        self.base_url = base_url.rstrip("/")
        self._token_url = token_url
        self._credentials = credentials
        self._patience = patience
        self._clock = clock
        self._token: wire.Token | None = None
        self._token_expires = math.inf
        self._token_lock = asyncio.Lock()
        self._http = httpx.AsyncClient(
            transport=transport,
            trust_env=httpx.URL(base_url).host not in LOOPBACK,
            timeout=patience.attempt_s,
            limits=httpx.Limits(max_connections=16, max_keepalive_connections=16, keepalive_expiry=30),
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
    ) -> Answer:
        """Call and read the answer.

        Args:
            key: Sent as Idempotency-Key.
            repeatable: False for a creation that would happen twice: repeated only where it surely had no effect.

        Raises:
            FlowUnavailable, FlowRefused, BadAnswer, CredentialsError: See `rlhf_cli.flow.base.Flow`.
        """
        reply = await self._call(method, path, body=body, params=params, key=key, repeatable=repeatable)
        return self._read(f"{method} {self.base_url}{path}", reply, answer)

    async def find(
        self, path: str, answer: type[Answer], *, absent: int, params: Params | None = None
    ) -> Answer | None:
        """GET what may not be there: None where the status is `absent`."""
        reply = await self._call("GET", path, params=params, absent=absent)
        return None if reply.status == absent else self._read(f"GET {self.base_url}{path}", reply, answer)

    async def send(self, method: str, path: str) -> None:
        """Call without a body either way; safe to repeat."""
        await self._call(method, path)

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
    ) -> _Reply:
        place = f"{method} {self.base_url}{path}"
        request = self._http.build_request(
            method,
            self.base_url + path,
            json=None if body is None else body.to_json(),
            params=params,
            headers={} if key is None else {"Idempotency-Key": key},
        )

        def again(error: Exception) -> bool | float:
            if not isinstance(error, _Transient) or (error.effect and not repeatable):
                return False
            return True if error.wait_s is None else error.wait_s

        tried = 0

        async def attempts() -> _Reply:
            nonlocal tried
            async for attempt in stamina.retry_context(
                on=again, attempts=None, timeout=self._patience.retry_s, wait_initial=0.2, wait_max=8.0, wait_jitter=0.5
            ):
                with attempt:
                    tried += 1
                    reply = await self._authorized(request)
                    if reply.status == 429 or reply.status >= 500:
                        # 429 turns a request away at the door; after a 5xx anything may have happened.
                        raise _Transient(f"answered {reply.status}", effect=reply.status != 429, wait_s=reply.wait_s)
            return reply

        try:
            try:
                reply = await attempts()
            except _Transient as error:
                # A process that was stopped, or starved of its core, for longer than the deadline has not really tried.
                if tried > 1 or again(error) is False:
                    raise
                reply = await attempts()
        except _Transient as error:
            raise FlowUnavailable(
                f"{place}: {error}. "
                + (
                    "Whether it had an effect is not known; a resume looks before it asks again."
                    if error.effect and not repeatable
                    else f"Gave up after {self._patience.retry_s:g} s; resume when the service is back."
                )
            ) from error
        if not (200 <= reply.status < 300 or reply.status == absent):
            raise self._refusal(place, reply)
        return reply

    async def _authorized(self, request: httpx.Request) -> _Reply:
        """One attempt with a valid token; if the service forgot the token before its time, one more with a new one."""
        token = await self._fresh_token()
        request.headers["Authorization"] = f"Bearer {token}"
        reply = await self._attempt(request)
        if reply.status != 401 or self._credentials.token:
            return reply
        if self._token is not None and self._token.access_token == token:
            self._token = None
        request.headers["Authorization"] = f"Bearer {await self._fresh_token()}"
        return await self._attempt(request)

    async def _fresh_token(self) -> str:
        if self._credentials.token:
            return self._credentials.token
        async with self._token_lock:
            if self._token is None or self._clock() >= self._token_expires:
                self._token = await self._new_token()
                lifetime = self._token.expires_in
                early = min(REFRESH_BEFORE_S, (lifetime or 0) / 2)
                self._token_expires = math.inf if lifetime is None else self._clock() + lifetime - early
            return self._token.access_token

    async def _new_token(self) -> wire.Token:
        pair = f"{self._credentials.client_id}:{self._credentials.client_secret}"
        request = self._http.build_request(
            "POST",
            self._token_url,
            data={"grant_type": "client_credentials", "scope": "openid email api"},
            headers={"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()},
        )
        try:
            reply = await self._attempt(request)
        except _Transient as error:
            raise _Transient(f"no token from {self._token_url}: {error}", effect=False) from error
        if reply.status == 429 or reply.status >= 500:
            raise _Transient(f"{self._token_url} answered {reply.status}", effect=False, wait_s=reply.wait_s)
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
        try:
            # httpx bounds each read, not the whole: a byte a second would keep us for ever.
            async with asyncio.timeout(self._patience.attempt_s):
                response = await self._http.send(request, stream=True)
                try:
                    content = await self._body(request, response)
                finally:
                    await response.aclose()
            return _Reply(response.status_code, content, retry_after_s(response.headers.get("Retry-After")))
        except TimeoutError as error:
            raise _Transient(f"no whole answer within {self._patience.attempt_s:g} s", effect=True) from error
        except httpx.TransportError as error:
            if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)):
                raise FlowRefused(
                    f"TLS to {request.url.host} failed ({error}). Check the address, the certificates and the clock."
                ) from error
            unsent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
            raise _Transient(f"{type(error).__name__}: {error}", effect=not unsent) from error

    async def _body(self, request: httpx.Request, response: httpx.Response) -> bytes:
        if response.headers.get("Content-Encoding", "identity") != "identity":
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
        text = self._credentials.redact(content[: 4 * length].decode("utf-8", "replace"))
        if self._token is not None:
            text = text.replace(self._token.access_token, "[redacted]")
        text = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf") else c for c in text).split())
        return text[:length] + ("..." if len(text) > length else "") if text else "(empty)"


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds to wait by a Retry-After header, capped at a minute; None without one, or when it makes no sense."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()  # an exception that is raised twice can be its own context
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
