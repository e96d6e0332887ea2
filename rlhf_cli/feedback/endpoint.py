"""JSON posted to one address: patience with an endpoint that is down, none with a request that it cannot answer."""

from __future__ import annotations

import asyncio
import random
import unicodedata
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.http import LOOPBACK, MAX_ANSWER_BYTES, http_date, retry_after_s

DOWN = (429, 502, 503, 504)
"""Says nothing about the request: it may be answered later."""
NEVER = (402, 404, 405, 410)
"""No request to this address will be answered."""
ATTEMPTS = 4
"""For one request, at an endpoint that is there."""
LONGEST_PAUSE_S = 30.0
EXCERPT = 160

Answer = TypeVar("Answer", bound=BaseModel)


class Unanswerable(Exception):
    """This one request has no usable answer; others may have."""


class _Down(Exception):
    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class _Failed(Exception):
    """At this attempt."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds."""

    attempt_s: float
    """For one answer, from the first byte to the last."""
    outage_s: float = 600.0
    """For an endpoint that cannot be reached, or has no time for us."""
    pause_s: float = 1.0
    """Before the second attempt; doubles up to `LONGEST_PAUSE_S`, give or take a quarter."""


class Endpoint:
    """One address; use inside one event loop, as `async with`.

    Args:
        credentials: Hold a token, which is sent as bearer; None sends none.
    """

    def __init__(self, url: str, credentials: Credentials | None, patience: Patience) -> None:
        self._url, self._credentials, self._patience = url, credentials, patience
        self.requests = 0
        """Sent, repetitions included."""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(
            trust_env=httpx.URL(self._url).host not in LOOPBACK,
            timeout=self._patience.attempt_s,
            limits=httpx.Limits(max_connections=None),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "rlhf",
                **({"Authorization": f"Bearer {self._credentials.token}"} if self._credentials else {}),
            },
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(self, body: dict[str, Any], answer: type[Answer]) -> Answer:
        """The answer to `body`.

        Raises:
            Unanswerable: There is none to this request; says why.
            FlowUnavailable: The endpoint cannot be reached, or turned us away for too long.
            CredentialsError: It refuses the token.
            FlowRefused: It will never answer, whatever is asked.
        """
        loop, failed, turned_away = asyncio.get_running_loop(), 0, 0
        down_since: float | None = None
        while True:
            try:
                return await self._attempt(body, answer)
            except _Failed as error:
                failed, down_since = failed + 1, None
                if failed == ATTEMPTS:
                    raise Unanswerable(f"{error}, {ATTEMPTS} times") from error
                wait_s = self._pause_s(failed - 1)
            except _Down as error:
                if down_since is None:
                    down_since, turned_away = loop.time(), 0
                if loop.time() - down_since >= self._patience.outage_s:
                    raise FlowUnavailable(
                        f"{self._url}: {error}. Gave up after {self._patience.outage_s:g} s without an answer; "
                        "resume when it is back."
                    ) from error
                own_s, turned_away = self._pause_s(min(turned_away, 10)), turned_away + 1
                # A little more than what was asked for: all who were turned away together would come together.
                wait_s = own_s if error.wait_s is None else error.wait_s + 0.1 * own_s
            await asyncio.sleep(wait_s)

    def _pause_s(self, doublings: int) -> float:
        pause_s: float = min(self._patience.pause_s * 2**doublings, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.75, 1.25)

    async def _attempt(self, body: dict[str, Any], answer: type[Answer]) -> Answer:
        self.requests += 1
        try:
            async with asyncio.timeout(self._patience.attempt_s):  # httpx bounds each read, not the whole
                async with self._http.stream("POST", self._url, json=body) as response:
                    content = bytearray()
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > MAX_ANSWER_BYTES:
                            raise Unanswerable(f"more than {MAX_ANSWER_BYTES >> 20} MiB were answered")
        except TimeoutError as error:
            raise _Failed(f"no whole answer within {self._patience.attempt_s:g} s") from error
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise FlowRefused(f"TLS to {self._url} failed ({error}). Check the address and the clock.") from error
            raise _Down(f"{type(error).__name__}: {self._shown(str(error))}") from error
        except httpx.RequestError as error:  # also a body that cannot be decoded
            raise _Failed(f"{type(error).__name__}: {self._shown(str(error))}") from error
        status = response.status_code
        said = f"answered {status}: {self._shown(content.decode('utf-8', 'replace'))}"
        if status in DOWN:
            headers = response.headers
            raise _Down(said, retry_after_s(headers.get("Retry-After"), http_date(headers.get("Date"))))
        if status in (401, 403):
            origin = self._credentials.origin if self._credentials else "it asks for a key, the recipe names none"
            raise CredentialsError(f"{self._url} {said}. Check {origin}.")
        if status in NEVER or 300 <= status < 400:
            raise FlowRefused(f"{self._url} {said}. Repeating this will not help; check the address and the model.")
        if status == 408 or status >= 500:
            raise _Failed(said)
        if not 200 <= status < 300:
            raise Unanswerable(said)
        try:
            return answer.model_validate_json(bytes(content))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise Unanswerable(f"{said} is not what was asked for ({where}: {first['msg']})") from None

    def _shown(self, text: str) -> str:
        text = self._credentials.redact(text) if self._credentials else text
        text = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf") else c for c in text).split())
        return text[:EXCERPT] + ("..." if len(text) > EXCERPT else "") if text else "(empty)"
