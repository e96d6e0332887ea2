"""Running the server on a folder until a signal asks it to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from rlhf_cli.server.app import LOOPBACK, create_app
from rlhf_cli.server.data_dir import DataDir
from rlhf_cli.server.limits import Limits
from rlhf_cli.server.protocol import listen, server_of
from rlhf_cli.server.store import Store


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; `url` is the address that people use, where it is another one."""

    host: str
    port: int
    url: str | None
    tls_cert: Path | None
    tls_key: Path | None

    def urls(self, port: int) -> list[str]:
        """Addresses to share, the best one first; `port` is the one that was taken."""
        scheme = "https" if self.tls_cert else "http"
        names = _own_addresses() if self.host in ("0.0.0.0", "::") else [self.host]
        own = [f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}" for name in names]
        return [*([self.url.rstrip("/")] if self.url else []), *own]


def run(data: DataDir, address: Address, lease_s: float, announce: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM; requests in progress are finished. Returns the signal's number.

    Raises:
        RunLocked: Another server works on the folder.
        UsageError: The address cannot be used.
    """
    with (
        data.lock(),
        contextlib.closing(listen(address.host, address.port)) as listening,
        data.store(create=True) as store,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        store.lease_s = lease_s
        urls = address.urls(listening.getsockname()[1])
        data.remember_url(urls[0])
        hosts = {*LOOPBACK, *(_host_of(url) for url in urls)}
        return runner.run(_serve(store, address, listening, hosts, urls, announce))


async def _serve(
    store: Store,
    address: Address,
    listening: socket.socket,
    hosts: set[str],
    urls: list[str],
    announce: Callable[[str], None],
) -> int:
    server = server_of(
        create_app(store, hosts, Limits()),
        ssl_certfile=address.tls_cert,
        ssl_keyfile=address.tls_key,
    )
    loop = asyncio.get_running_loop()
    asked, signals = asyncio.Event(), list[int]()

    def stop(number: int) -> None:
        signals.append(number)
        asked.set()

    gc.freeze()  # what was imported stays; the collector need not walk through it again and again
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    for url in urls:
        announce(f"serving {url}")
    serving = asyncio.create_task(server.serve([listening]))
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    server.should_exit = True
    await serving
    return signals[0]


def _host_of(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def _own_addresses() -> list[str]:
    """How other machines reach this one: the address of the default route, and its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a datagram socket sends nothing by connecting
            address = str(probe.getsockname()[0])
        except OSError:
            address = "127.0.0.1"
    return [address, socket.gethostname()]
