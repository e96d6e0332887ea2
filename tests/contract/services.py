"""The services of the conformance suite, behind one interface: what a test does to them, and what really happened."""

from __future__ import annotations

import asyncio
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from flow_world import Clock, Faulty
from vendor import Labels, Vendor

from rlhf_cli.flow.base import Asset
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.http import Patience
from rlhf_cli.server.app import create_app
from rlhf_cli.server.store import Store

PATIENCE = Patience(5.0, 5.0)
TTL_S = 60


class Service(Protocol):
    clock: Clock
    """The service's own; a client has another."""
    credentials: Credentials
    transport: Watched
    fetches_urls: bool

    def client(self, **options: Any) -> FlowClient: ...

    def start(self) -> None:
        """Let items get from Pending to Running."""

    def vote(self, item_id: str, count: int) -> None:
        """Let so many people answer a pair each of an item that runs."""

    def truth(self, item_id: str) -> np.ndarray:
        """Votes by the caller's order: row over column."""

    def finish_stop(self) -> None:
        """Let an item that was asked to stop get there."""

    def image(self, item_id: str, place: int) -> str:
        """The name that a candidate was uploaded under."""

    @property
    def violations(self) -> list[str]:
        """Requests outside the documented protocol."""


class Watched(httpx.AsyncBaseTransport):
    """Notes requests; `after` may change what was answered."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self.requests: list[httpx.Request] = []
        self.after: Callable[[httpx.Request, httpx.Response], httpx.Response | None] = lambda request, response: None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.requests.append(request)
        response = await self._inner.handle_async_request(request)
        await response.aread()
        return self.after(request, response) or response

    def count(self, method: str, path_end: str) -> int:
        return sum(r.method == method and r.url.path.endswith(path_end) for r in self.requests)


class Ours:
    """Our server, in this process, on a disk."""

    fetches_urls = False

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.store = Store(folder / "server.sqlite", clock=self.clock, rng=random.Random(7))
        self.credentials = Credentials(*self.store.tokens.add("client", "trainer"))
        self.server = Faulty(create_app(self.store))
        self.transport = Watched(self.server)
        self._odd: list[str] = []
        self.server.after = self._note

    def client(self, **options: Any) -> FlowClient:
        return FlowClient(
            "http://127.0.0.1", self.credentials, transport=self.transport, **{"patience": PATIENCE, **options}
        )

    def start(self) -> None: ...

    def vote(self, item_id: str, count: int) -> None:
        for number in range(count):
            rater_id, _ = self.store.tokens.add("rater", "somebody")
            pair = self.store.lease(rater_id)
            assert pair is not None
            self.store.vote(pair.id, rater_id, "left" if number % 3 else "right")
        assert sum(vote.counts for vote in self.store.votes(item_id)) >= count

    def truth(self, item_id: str) -> np.ndarray:
        return self.store.matrix(item_id).wins

    def finish_stop(self) -> None: ...

    def image(self, item_id: str, place: int) -> str:
        return self.store.candidates(item_id)[place].text

    @property
    def violations(self) -> list[str]:
        return self._odd

    def _note(self, request: httpx.Request, response: httpx.Response) -> None:
        # It ignores members it does not know; what it refuses as malformed is a violation.
        if response.status_code in (400, 405, 413, 415) and "/asset/" not in request.url.path:
            self._odd.append(f"{request.method} {request.url}: {response.text}")


class Theirs:
    """The strict stand-in for the vendor's service."""

    fetches_urls = True

    def __init__(self, labels: Labels) -> None:
        self.clock = Clock()
        self.vendor = Vendor(self.clock, labels, latency_s=(0, 0.002), upload_s=0.0)
        self.credentials = Credentials(self.vendor.client_id, self.vendor.client_secret)
        self.transport = Watched(self.vendor.transport())
        self._rng = random.Random(3)

    def client(self, **options: Any) -> FlowClient:
        return FlowClient.rapidata(
            self.credentials,
            domain=self.vendor.domain,
            transport=self.transport,
            **{"patience": PATIENCE, **options},
        )

    def start(self) -> None:
        self.clock.advance(self.vendor.pending_s)

    def vote(self, item_id: str, count: int) -> None:
        size = len(self.vendor.items[item_id].candidates)
        for _ in range(count):
            winner, loser = self._rng.sample(range(size), 2)
            assert self.vendor.vote(item_id, winner, loser, held=True)

    def truth(self, item_id: str) -> np.ndarray:
        return self.vendor.items[item_id].wins

    def finish_stop(self) -> None:
        self.clock.advance(self.vendor.stopping_s)

    def image(self, item_id: str, place: int) -> str:
        return self.vendor.label(self.vendor.items[item_id].candidates[place])

    @property
    def violations(self) -> list[str]:
        return self.vendor.violations


async def ask(client: FlowClient, flow_id: str, assets: list[Asset], name: str = "one", ttl_s: float = TTL_S) -> str:
    """A dataset and an item about `assets`."""
    dataset_id = await client.create_dataset(name, f"{name}-dataset")
    await client.fill_dataset(dataset_id, assets)
    return await client.create_item(flow_id, dataset_id, "What is a river?", ttl_s, name)


async def ask_many(client: FlowClient, flow_id: str, count: int, name: str = "many") -> list[str]:
    numbers = range(count)
    ids = []
    for start in range(0, count, 50):
        part = numbers[start : start + 50]
        ids += await asyncio.gather(*(ask(client, flow_id, [f"a{n}", f"b{n}"], f"{name}{n}") for n in part))
    return ids


def png(shade: int) -> bytes:
    """One grey pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes([0, shade]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
