"""A small run that asks people about four groups, whatever goes wrong; and the judge of what came out of it.

Real: `VotesFeedback`, `Buyer`, `FlowClient`, the journal on disk, and either our server (with idempotency keys) or the
strict stand-in of the vendor (without). Time is virtual. The trainer is a task that submits groups and collects what
was decided, the crowd one that votes by a plan that is known beforehand.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from vendor import Vendor
from virtual_time import EPOCH, VirtualLoop

from rlhf_cli.errors import RlhfError
from rlhf_cli.feedback.asking import SWEEP_S
from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.flow.base import FlowSpec, ItemState, Responses
from rlhf_cli.flow.bodies import keep_bodies
from rlhf_cli.flow.client import FlowClient, OnBody
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.http import Patience
from rlhf_cli.journal import journal as journals
from rlhf_cli.journal.events import Event, GroupRanked, GroupSampled, GroupSetAside, ItemEnded, VotesLate
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.replay import RunState, replay
from rlhf_cli.server.app import create_app
from rlhf_cli.server.store import Store
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Unranked

Kind = Literal[
    "token", "capabilities", "dataset", "datapoint", "item", "list", "status", "matrix", "results", "stop", "other"
]
Reply = Callable[[httpx.Request, "httpx.Response | None"], Awaitable[httpx.Response]]
"""Answers in the service's place, or raises; with the service's own answer where it did what was asked."""

TTL_S = 60
SPEC = FlowSpec("run", "Which?", Responses(2, 6, 6), ttl_s=TTL_S)
LAG_S, SETTLE_S, POLL_S = 8.0, 10.0, 4.0
PATIENCE = Patience(outage_s=600.0)
LONGEST_S = 4000.0
"""Virtual seconds after which a life has hung."""
RING = [(0, 1), (1, 2), (2, 0), (0, 1), (0, 1), (1, 2)]
"""Winner and loser of each vote: no permutation and no transposition of the counts looks the same."""
VOTES = (6, 4, 1, 0)
"""Votes on the items of group 0, 1, ...: to the maximum, in between, below the minimum, none."""


def group(number: int, texts: Sequence[str]) -> Group:
    completions = tuple(Completion(text, (1, 2), (-0.5, -0.25), (-0.5, -0.5), True) for text in texts)
    prompt = Prompt(f"p{number}", (Message("user", f"Why {number}?"),))
    return Group(f"g{number}", number, prompt, (5, 6), completions, 0)


GROUPS = [
    group(0, [f"group 0 answer {i}" for i in range(4)]),
    group(1, ["group 1 answer 0", " ", "group 1 answer 1", "group 1 answer 0\n", "group 1 answer 2"]),
    group(2, [f"group 2 answer {i}" for i in range(3)]),
    group(3, [f"group 3 answer {i}" for i in range(3)]),
]


@dataclass(frozen=True)
class Bought:
    """An item in the service's books; votes by the place of the candidate."""

    id: str
    number: int
    """Of the group."""
    texts: tuple[str, ...]
    wins: np.ndarray
    """The votes that were delivered before it ended."""
    since: float
    until: float
    """Unix time at which it ended or was told to."""
    stopped: bool


class Wire(httpx.AsyncBaseTransport):
    """All requests go through here: counted, disturbed, and cut when the process dies."""

    def __init__(self, inner: httpx.AsyncBaseTransport, now: Callable[[], float]) -> None:
        self._inner, self._now = inner, now
        self.log: list[tuple[float, Kind]] = []
        self.disturb: Callable[[Kind], Disturbance | None] = lambda kind: None
        self.point: Callable[[], None] = lambda: None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        kind = kind_of(request)
        self.log.append((self._now(), kind))
        self.point()
        await request.aread()
        await asyncio.sleep(0.01)  # nothing is answered in no time
        disturbance = self.disturb(kind)
        if disturbance is not None and disturbance.moment == "before":
            return await disturbance.reply(request, None)
        response = await self._inner.handle_async_request(request)
        await response.aread()
        self.point()
        return response if disturbance is None else await disturbance.reply(request, response)


@dataclass(frozen=True)
class Disturbance:
    reply: Reply
    moment: Literal["before", "after"] = "before"
    """Whether the service did what was asked."""


def kind_of(request: httpx.Request) -> Kind:
    match request.method, *request.url.path.strip("/").split("/"):
        case "POST", "connect", "token":
            return "token"
        case "GET", ".well-known", _:
            return "capabilities"
        case "POST", "dataset":
            return "dataset"
        case "POST", "dataset", _, "datapoint":
            return "datapoint"
        case "POST", "flow", "ranking", _, "item":
            return "item"
        case "GET", "flow", "ranking", "item", _:
            return "status"
        case "GET", "flow", "ranking", _, "item":
            return "list"
        case "GET", "flow", "ranking", "item", _, "vote-matrix":
            return "matrix"
        case "GET", "flow", "ranking", "item", _, "results":
            return "results"
        case "POST", "flow", "item", _, "stop":
            return "stop"
    return "other"


class AtVendor:
    """The strict stand-in: no idempotency keys, and a list that lags."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.vendor = Vendor(now, listing_lag_s=LAG_S, pending_s=2.0)
        self.flow_id = self.vendor.open_flow("flow", least=2, most=6, drainDurationSeconds=10)
        self.credentials = Credentials(self.vendor.client_id, self.vendor.client_secret)
        self.wire_in = self.vendor.transport()
        self.violations = self.vendor.violations

    def client(self, transport: httpx.AsyncBaseTransport, clock: Callable[[], float], keep: OnBody) -> FlowClient:
        return FlowClient.rapidata(
            self.credentials,
            domain=self.vendor.domain,
            patience=PATIENCE,
            transport=transport,
            clock=clock,
            on_body=keep,
        )

    def secrets(self) -> list[str]:
        return [self.vendor.client_secret, *self.vendor.tokens]

    def open_items(self) -> list[tuple[str, int, int]]:
        """Id, group and votes so far of items that people are given."""
        items = self.vendor.items.values()
        return [(i.id, number_of(i.context), i.votes) for i in items if self.vendor.state(i) == "Running"]

    def vote(self, item_id: str, winner: int, loser: int) -> None:
        self.vendor.vote(item_id, winner, loser, held=True)

    def ledger(self) -> list[Bought]:
        bought = []
        for item in self.vendor.items.values():
            self.vendor.state(item)
            ends = [end for end in (item.stop_asked_at, item.ended_at) if end is not None]
            bought.append(
                Bought(
                    item.id,
                    number_of(item.context),
                    tuple(point.text or "" for point in item.candidates),
                    item.wins if item.truth is None else item.truth,
                    item.created_at,
                    min([item.created_at + item.ttl_s, *ends]),
                    item.stop_asked_at is not None,
                )
            )
        return bought

    def close(self) -> None:
        pass


class AtOurs:
    """Our own server, with idempotency keys."""

    violations: tuple[str, ...] = ()

    def __init__(self, now: Callable[[], float]) -> None:
        self.store = Store(":memory:", clock=now, rng=random.Random(7))
        client_id, secret = self.store.tokens.add("client", "trainer")
        self.flow_id = self.store.create_flow(SPEC.title, SPEC.instruction, SPEC.responses)
        self.credentials = Credentials(client_id, secret)
        self.wire_in = httpx.ASGITransport(app=create_app(self.store))
        self._rater, _ = self.store.tokens.add("rater", "somebody")

    def client(self, transport: httpx.AsyncBaseTransport, clock: Callable[[], float], keep: OnBody) -> FlowClient:
        return FlowClient(
            "http://127.0.0.1", self.credentials, patience=PATIENCE, transport=transport, clock=clock, on_body=keep
        )

    def secrets(self) -> list[str]:
        return [self.credentials.client_secret]

    def _items(self) -> list[Any]:
        return self.store.items(self.flow_id, 0, 1000, newest_first=False)[1]

    def open_items(self) -> list[tuple[str, int, int]]:
        open_now = [item for item in self._items() if not item.state.terminal]
        return [(item.id, number_of(item.context), item.votes) for item in open_now]

    def vote(self, item_id: str, winner: int, loser: int) -> None:
        with self.store.now() as (db, now):
            pair = self.store.hand_out(db, self.store.item(item_id), (winner, loser), self._rater, now)
        self.store.vote(pair.id, self._rater, "left")

    def ledger(self) -> list[Bought]:
        return [
            Bought(
                item.id,
                number_of(item.context),
                tuple(one.text for one in self.store.candidates(item.id)),
                self.store.matrix(item.id).wins,
                item.created_at,
                item.expires_at if item.ended_at is None else item.ended_at,
                item.state is ItemState.STOPPED,
            )
            for item in self._items()
        ]

    def close(self) -> None:
        self.store.close()


SERVICES: dict[str, type[AtVendor] | type[AtOurs]] = {"vendor": AtVendor, "ours": AtOurs}


class Killed(BaseException):
    """The process died here; nothing of it goes on."""


@dataclass
class Life:
    """What one process did, from its start to its end."""

    decided: list[RankedGroup | Unranked] = field(default_factory=list)
    error: BaseException | None = None
    hung: bool = False
    seconds: float = 0.0
    """Virtual."""

    @property
    def exit_code(self) -> int | str:
        if self.hung:
            return "hung"
        if self.error is None:
            return 0
        if isinstance(self.error, Killed):
            return "killed"
        return self.error.exit_code if isinstance(self.error, RlhfError) else f"bug: {self.error!r}"


class World:
    """One run at one service, over as many lives of its process as it takes."""

    def __init__(
        self, service: str, folder: Path, *, groups: Sequence[Group] = GROUPS, votes: Sequence[int] = VOTES
    ) -> None:
        self._loop = VirtualLoop()
        self.server_offset_s = 0.0
        """How wrong the server's clock is."""
        self.service = SERVICES[service](lambda: EPOCH + self._loop.time() + self.server_offset_s)
        self.wire = Wire(self.service.wire_in, lambda: self._loop.time())
        self.groups, self._votes = list(groups), list(votes)
        self.path = Path(tempfile.mkdtemp(dir=folder)) / "journal.jsonl"
        self.lives: list[Life] = []
        self.feedback_options: dict[str, Any] = {}
        """Of `VotesFeedback`, where they are not those below."""
        self.on_tick: Callable[[float], None] = lambda now: None
        """Called every virtual second, with the time since the world began."""
        self.began = self._loop.time()

    @property
    def loop(self) -> VirtualLoop:
        return self._loop

    def entries(self) -> list[journals.Entry]:
        return journals.read(self.path)

    def state(self) -> RunState:
        return replay(self.entries())

    def live(self, *, die_at: int | None = None, linger_s: float = 0.0) -> Life:
        """Run a process until all groups are decided and `linger_s` later, or until it fails or dies.

        `die_at` counts points: before and after each entry of the journal and the effect of each request.
        """
        if self.lives:
            wrong = self._loop.wall_offset_s
            self._loop = VirtualLoop(self._loop.time() + 5.0)
            self._loop.wall_offset_s = wrong
        loop, life, started = self._loop, Life(), self._loop.time()
        self.lives.append(life)
        left = die_at

        def point() -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left <= 0:
                    raise Killed

        def record(event: Event) -> object:
            point()
            entry = journal.append(event)
            point()
            return entry

        self.wire.point = point
        ended = threading.Event()

        async def play() -> None:
            crowd = asyncio.create_task(self._crowd())
            try:
                await self._trainer(feedback, journal, life, lambda: left is not None and left <= 0, linger_s)
            except BaseException as error:
                life.error = error
            crowd.cancel()
            life.seconds = loop.time() - started
            loop.stands_still = True
            ended.set()

        playing: list[asyncio.Task[None]] = []
        with Journal.open(self.path, clock=loop.wall) as journal:
            loop.stands_still = True
            feedback = VotesFeedback(
                lambda: self.service.client(self.wire, loop.time, keep_bodies(self.path.with_name("bodies.jsonl"))),
                self.service.flow_id,
                SPEC,
                record,
                run_id="run",
                clock=loop.time,
                wall=loop.wall,
                loop_factory=lambda: loop,
                **{"settle_s": SETTLE_S, "poll_s": POLL_S, **self.feedback_options},
            )

            def begin() -> None:
                loop.stands_still = False
                playing.append(loop.create_task(play()))

            loop.call_soon_threadsafe(begin)
            assert ended.wait(60), "the virtual world did not end"
            loop.stands_still = False
            feedback.close()
        return life

    async def _trainer(
        self, feedback: VotesFeedback, journal: Journal, life: Life, dead: Callable[[], bool], linger_s: float
    ) -> None:
        loop, known = self._loop, self.state().groups
        feedback.resume([known[one.id] for one in self.groups if one.id in known])
        for one in self.groups:
            if one.id not in known:
                journal.append(GroupSampled.of(one))
                feedback.submit(one)
        missing = {one.id for one in self.groups if one.id not in known or known[one.id].open}
        end = loop.time() + LONGEST_S
        while missing and not dead():
            await asyncio.sleep(1.0)
            for decided in feedback.collect():
                life.decided.append(decided)
                missing.discard(decided.group.id)
            feedback.status()
            if loop.time() > end:
                life.hung = True
                return
        if dead():
            raise Killed
        await asyncio.sleep(linger_s)
        life.decided.extend(feedback.collect())

    async def _crowd(self) -> None:
        """Vote on what is open, every three seconds per item, by the plan."""
        seen: dict[str, float] = {}
        while True:
            now = self._loop.time()
            if int(now - self.began) % 3 == 0:
                for item_id, number, votes in self.service.open_items():
                    since = seen.setdefault(item_id, now)
                    if votes < min(self._votes[number], (now - since) // 3):
                        self.service.vote(item_id, *RING[votes])
            self.on_tick(now - self.began)
            await asyncio.sleep(1.0)

    def close(self) -> None:
        self.service.close()


def number_of(context: str | None) -> int:
    """The group of an item: the prompt is its context."""
    assert context is not None
    return int(context.removeprefix("Why ").rstrip("?"))


# The judge.

MOST_AT_ONCE = 100
"""Requests in any ten virtual seconds: all groups are asked about within that, every request of it a few times."""


def complaints(
    world: World, *, may_lose: Sequence[int] = (), may_double: bool = False, exits: Sequence[int] = (0,)
) -> list[str]:
    """All that is wrong with what came of a world after its last life, which was to end with every group decided.

    Args:
        may_lose: Groups that may be set aside although people voted.
        may_double: The service itself makes two items of one dataset.
        exits: How any life but the last may have ended, besides being killed.
    """
    entries, ledger = world.entries(), world.service.ledger()
    state = replay(entries)
    found = [f"protocol: {violation}" for violation in world.service.violations]
    for number, life in enumerate(world.lives):
        allowed = (0,) if number == len(world.lives) - 1 else (*exits, "killed")
        if life.exit_code not in allowed:
            found.append(f"life {number} ended with {life.exit_code} ({life.error}), not with one of {allowed}")
    for one in world.groups:
        bought = [item for item in ledger if item.number == one.index]
        found += _items(one, bought, state, may_double)
        found += _votes(one, bought, [e.event for e in entries], state, one.index in may_lose)
    found += _deliveries(world, state)
    found += _secrets(world)
    found += _storms(world)
    return found


def _items(one: Group, bought: list[Bought], state: RunState, may_double: bool) -> list[str]:
    found = []
    known = state.groups.get(one.id)
    doubles = [set(event.item_ids) for event in known.doubles] if known else []
    asks = [ask for ask in known.asks if ask.key is not None] if known else []
    for older, younger in combinations(sorted(bought, key=lambda item: item.since), 2):
        if younger.since >= older.until:
            continue
        if not may_double:
            found.append(f"group {one.id} has two live items: {older.id} and {younger.id}")
        elif not any({older.id, younger.id} <= ids for ids in doubles):
            found.append(f"group {one.id} has two live items, and nobody was told: {older.id} and {younger.id}")
        elif not younger.stopped and younger.until - younger.since > SWEEP_S + 10:
            found.append(f"group {one.id} has two live items, and {younger.id} was not stopped")
    if len(bought) > len(asks) and not may_double:
        found.append(f"group {one.id} was asked about {len(asks)} times and has {len(bought)} items")
    unknown = {ask.item_id for ask in asks} - {item.id for item in bought} - {None}
    return [*found, *(f"group {one.id}: the service never made item {item_id}" for item_id in unknown)]


def _votes(one: Group, bought: list[Bought], events: list[Event], state: RunState, may_lose: bool) -> list[str]:
    found = []
    truth = sum((over_all(one, item) for item in bought), np.zeros((len(one.completions),) * 2))
    mine = [event for event in events if getattr(event, "group_id", None) == one.id]
    ranked = [event for event in mine if isinstance(event, GroupRanked)]
    aside = [event for event in mine if isinstance(event, GroupSetAside)]
    late = sum((np.array(e.wins) for e in mine if isinstance(e, VotesLate)), np.zeros_like(truth))
    if len(ranked) > 1 or len(aside) > 1:
        found.append(f"group {one.id} was decided twice: {len(ranked)} labels, set aside {len(aside)} times")
    if not ranked and not aside:
        found.append(f"group {one.id} was forgotten")
    if any(not event.reason.strip() for event in aside):
        found.append(f"group {one.id} was set aside without a reason")
    if ranked and not np.array(ranked[0].wins).any():
        found.append(f"group {one.id} has a label although nobody voted")
    if ranked and (unknown := set(ranked[0].source.removeprefix("item:").split("+")) - {b.id for b in bought}):
        found.append(f"group {one.id} has votes from {unknown}, which it never bought")
    labels = np.array(ranked[0].wins) if ranked else None
    if labels is not None and not (np.array_equal(labels, truth) or np.array_equal(labels + late, truth)):
        found.append(f"group {one.id} is labelled {labels.tolist()}, the service has {truth.tolist()}")
    ended = sum((np.array(e.wins) for e in mine if isinstance(e, ItemEnded) and e.wins), np.zeros_like(truth))
    if not ranked and not np.array_equal(late + ended, truth) and not may_lose:
        found.append(f"group {one.id} lost {truth.sum():g} votes: {[event.reason for event in aside]}")
    if state.groups[one.id].ready and aside:
        found.append(f"group {one.id} is set aside and would train")
    return found


def over_all(one: Group, item: Bought) -> np.ndarray:
    """The votes on an item over all completions of its group: each candidate is the first of its text not yet taken."""
    places: list[int] = []
    texts = [completion.text.strip() for completion in one.completions]
    for text in item.texts:
        places.append(next(i for i, own in enumerate(texts) if own == text.strip() and i not in places))
    whole = np.zeros((len(texts), len(texts)))
    whole[np.ix_(places, places)] = item.wins
    return whole


def _deliveries(world: World, state: RunState) -> list[str]:
    """What the trainer was given is what the journal says, and given once."""
    found = []
    given = Counter(one.group.id for life in world.lives for one in life.decided)
    found += [f"group {group_id} was delivered {count} times" for group_id, count in given.items() if count > 1]
    for one in (one for life in world.lives for one in life.decided):
        known = state.groups[one.group.id]
        if isinstance(one, RankedGroup):
            if known.ranked is None or known.ranked.matrix() != one.wins or known.set_aside is not None:
                found.append(f"group {one.group.id} was delivered with votes that the journal does not have")
        elif known.set_aside != one.reason:
            found.append(f"group {one.group.id} was given up for {one.reason!r}, the journal has {known.set_aside!r}")
    return found


def _secrets(world: World) -> list[str]:
    said = "".join(str(life.error) for life in world.lives)
    texts = {path.name: path.read_text() for path in world.path.parent.iterdir()} | {"the error": said}
    return [f"a secret is in {name}" for name, text in texts.items() for s in world.service.secrets() if s in text]


def _storms(world: World) -> list[str]:
    times = [at for at, _ in world.wire.log]
    crowded = [at for i, at in enumerate(times) if i + MOST_AT_ONCE < len(times) and times[i + MOST_AT_ONCE] < at + 10]
    return [f"more than {MOST_AT_ONCE} requests within ten seconds from {crowded[0]:g}"] if crowded else []


scenarios = 0
"""Worlds that were judged in this test run; the end of it says how many."""


def count_scenario(count: int = 1) -> None:
    global scenarios
    scenarios += count
