"""A flow server in memory, a clock to turn by hand, people who vote, and faults on the way to the server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from starlette.applications import Starlette

from rlhf_cli.flow.base import Capabilities, FlowSpec, Responses
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.http import Patience
from rlhf_cli.flow.wire import Outcome
from rlhf_cli.ranking.pairs import Goal
from rlhf_cli.server.app import create_app
from rlhf_cli.server.records import LeasedPair
from rlhf_cli.server.store import Store
from rlhf_cli.types import Completion, Group, Message, Prompt

SPEC = FlowSpec("helpful", "Which answer is more helpful?", Responses(min=2, desired=4, max=6), ttl_s=60)
PLAIN = Capabilities()
"""A service that offers nothing beyond the protocol, as the vendor's."""


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Faulty(httpx.AsyncBaseTransport):
    """Passes requests on to the server, unless told otherwise.

    `before(request)` may raise, or answer in the server's place; `after(request, response)` may raise, or replace what
    the server has answered after doing what was asked.
    """

    def __init__(self, app: Starlette) -> None:
        self._server = httpx.ASGITransport(app=app)
        self.before: Callable[[httpx.Request], httpx.Response | None] = lambda request: None
        self.after: Callable[[httpx.Request, httpx.Response], httpx.Response | None] = lambda request, response: None
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if (instead := self.before(request)) is not None:
            return instead
        response = await self._server.handle_async_request(request)
        await response.aread()
        return self.after(request, response) or response

    def count(self, method: str, path_end: str) -> int:
        return sum(r.method == method and r.url.path.endswith(path_end) for r in self.requests)


@dataclass
class World:
    """Everything between a client and the votes in the store."""

    store: Store
    clock: Clock
    transport: Faulty
    credentials: Credentials
    raters: list[str] = field(default_factory=list)

    def client(
        self,
        capabilities: Capabilities | None = None,
        *,
        patience: Patience = Patience(5.0, 0.3, 0.01),  # noqa: B008
    ) -> FlowClient:
        return FlowClient(
            "http://127.0.0.1",
            self.credentials,
            capabilities=capabilities,
            patience=patience,
            transport=self.transport,
            clock=self.clock,
        )

    def open_flow(self, spec: FlowSpec = SPEC) -> str:
        return self.store.create_flow(spec.title, spec.instruction, spec.responses)

    def rater(self) -> str:
        """A new rater; returns the id by which the store knows it."""
        rater_id, _ = self.store.tokens.add("rater", f"rater {len(self.raters)}")
        self.raters.append(rater_id)
        return rater_id

    def vote(self, count: int = 1, outcome: Outcome | None = None) -> int:
        """Let `count` new people answer one pair each; the longer text wins. Returns how many votes counted."""
        counted = 0
        for _ in range(count):
            rater_id = self.rater()
            pair = self.store.lease(rater_id)
            if pair is None:
                break
            better: Outcome = "left" if len(pair.left) > len(pair.right) else "right"
            counted += self.store.vote(pair.id, rater_id, outcome or better)  # False: the item was stopped meanwhile
        return counted

    def item_ids(self) -> list[str]:
        _, flows = self.store.flows("", 0, 100, newest_first=False)
        return [item.id for flow in flows for item in self.store.items(flow.id, 0, 1000, newest_first=False)[1]]

    async def item(self, client: FlowClient, flow_id: str, texts: list[str], ttl_s: float = 60) -> str:
        dataset_id = await client.create_dataset("texts", "key-dataset")
        await asyncio.gather(*(client.add_datapoint(dataset_id, i, text) for i, text in enumerate(texts)))
        return await client.create_item(flow_id, dataset_id, "What is a river?", ttl_s, "key-item")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[Store]:
    store = Store(":memory:", clock=clock, rng=random.Random(7))
    yield store
    store.close()


@pytest.fixture
def world(store: Store, clock: Clock) -> World:
    client_id, secret = store.tokens.add("client", "trainer")
    return World(store, clock, Faulty(create_app(store)), Credentials(client_id, secret, origin="$ID and $SECRET"))


def group(number: int, texts: list[str]) -> Group:
    completions = tuple(Completion(text, (1, 2), (-0.5, -0.25), (-0.5, -0.5), True) for text in texts)
    return Group(f"g{number}", number, Prompt(f"p{number}", (Message("user", "Why?"),)), (5, 6), completions, 0)


def open_item(
    world: World, texts: int = 4, responses: Responses = SPEC.responses, ttl_s: float = 600, goal: Goal = "ranking"
) -> str:
    """An item of a flow of its own, about texts that get longer."""
    store = world.store
    flow_id = store.create_flow("flow", "Which?", responses, goal=goal)
    dataset_id = store.create_dataset("dataset")
    for i in range(texts):
        store.add_datapoint(dataset_id, i, "x" * (i + 1))
    return store.create_item(flow_id, dataset_id, "Why?", ttl_s)


def take(world: World) -> tuple[LeasedPair, str]:
    """A pair for a new rater."""
    rater_id = world.rater()
    pair = world.store.lease(rater_id)
    assert pair is not None
    return pair, rater_id


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for another thread; fails loudly instead of hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.002)
