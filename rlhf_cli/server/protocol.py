"""How connections are served: fast parsing, headers limited in size and time, no delay of small answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rlhf_cli.errors import UsageError

MAX_HEADER_BYTES = 32 * 1024
HEADER_S = 15.0
KEEP_ALIVE_S = 75
GRACE_S = 3


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's protocol, which by itself would read headers without end and wait for them for ever."""

    _header_bytes = 0
    _in_headers = True
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._header_bytes = self._header_bytes + len(data) if self._in_headers else 0
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._wait_for_headers()

    def on_headers_complete(self) -> None:
        self._headers_are_there()
        super().on_headers_complete()

    def _wait_for_headers(self) -> None:
        self._in_headers = True
        self._deadline = self.loop.call_later(HEADER_S, self.transport.abort)

    def _headers_are_there(self) -> None:
        self._in_headers = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class QuietServer(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(app: Any, **settings: Any) -> uvicorn.Server:
    """A server for `app`; `settings` go to uvicorn.

    Raises:
        UsageError: A certificate or key cannot be used.
    """
    config = uvicorn.Config(
        app,
        http=LimitedHttp,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # an address that a header claims is nobody's address
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        **settings,
    )
    try:
        config.load()
    except OSError as error:  # files that are not there, and what TLS does not accept
        raise UsageError(f"the certificate or its key cannot be used: {error.strerror or error}") from error
    return QuietServer(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: The address cannot be used, and why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol named, asyncio leaves Nagle's delay on and every answer takes 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listening
