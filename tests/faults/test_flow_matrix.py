"""Every fault of a flow service, at every request, once, for a while and for ever: one judge for all of them.

A scenario is one world of `asking_world`. Whatever happened, nothing was bought twice, no vote that was delivered got
lost and none was invented; where the asking had to end with an error, going on with a service that is well again brings
everything in. The end of the test run says how many scenarios there were.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from asking_world import (
    GROUPS,
    LAG_S,
    SERVICES,
    AtVendor,
    Disturbance,
    Kind,
    Reply,
    World,
    complaints,
    count_scenario,
    group,
)
from virtual_time import EPOCH

from rlhf_cli.flow.base import Capabilities
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.http import HttpCalls
from rlhf_cli.types import WinMatrix

both_services = pytest.mark.parametrize("service", SERVICES)
ALL = tuple(range(len(GROUPS)))
Span = Literal["once", "for a while", "for ever"]
WHILE_S = 25.0


# What a service or the network may answer.


def status(code: int, headers: dict[str, str] | None = None, content: bytes = b"") -> Reply:
    async def reply(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
        return httpx.Response(code, headers=headers, content=content)

    return reply


def raising(error: type[httpx.TransportError], text: str = "fault", cause: Exception | None = None) -> Reply:
    async def reply(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
        raise error(text, request=request) from cause

    return reply


async def stalled(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
    await asyncio.sleep(1e6)
    raise AssertionError("somebody waited for it")


class _Stream(httpx.AsyncByteStream):
    def __init__(self, chunk: bytes, pause_s: float) -> None:
        self._chunk, self._pause_s = chunk, pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(self._pause_s)
            yield self._chunk


def endless(chunk: bytes, pause_s: float) -> Reply:
    async def reply(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
        return httpx.Response(200, stream=_Stream(chunk, pause_s))

    return reply


async def cut_off(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
    """Half of what the service said."""
    if response is None or response.status_code != 200:
        return httpx.Response(200, content=b'{"total": 1')
    return httpx.Response(200, content=response.content[: len(response.content) // 2])


def changed(change: Callable[[Any], Any]) -> Reply:
    """The service's own answer, with something changed in it."""

    async def reply(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
        if response is None or response.status_code != 200:
            return response or httpx.Response(500)
        body = change(json.loads(response.content))
        return httpx.Response(200, content=body if isinstance(body, bytes) else json.dumps(body).encode())

    return reply


@dataclass(frozen=True)
class Fault:
    reply: Reply
    passing: tuple[int, ...] = (0,)
    """Exits of the asking when the fault passes; 0 is ridden out."""
    lasting: tuple[int, ...] = (75,)
    """Exits when it stays."""
    loses: bool = False
    """Where it stays, groups may be set aside although people voted: nobody can know how."""
    effect: tuple[Literal["before", "after"], ...] = ("before", "after")
    on: tuple[Kind, ...] = ("token", "capabilities", "dataset", "datapoint", "item", "list", "status", "matrix")


EXPIRED = ssl.SSLCertVerificationError("certificate has expired")
IN_HALF_A_MINUTE = (datetime.fromtimestamp(EPOCH + 1030, UTC) + timedelta(seconds=30)).strftime(
    "%a, %d %b %Y %H:%M:%S GMT"
)
UNSENT: dict[str, Any] = {"effect": ("before",)}
GARBLED: dict[str, Any] = {"passing": (0, 3), "lasting": (0, 3, 75), "loses": True}

FAULTS: dict[str, Fault] = {
    # rows 12 and 13
    **{f"{code}": Fault(status(code)) for code in (500, 502, 503, 504)},
    # row 14
    "429": Fault(status(429), **UNSENT),
    **{
        f"429 and Retry-After {after!r}": Fault(status(429, {"Retry-After": after}), **UNSENT)
        for after in ("3", IN_HALF_A_MINUTE, "Fri, 20 Nov 1970 12:00:00 GMT", "86400", "-3", "soon", "nan", "1e400")
    },
    "503 and Retry-After '86400'": Fault(status(503, {"Retry-After": "86400"})),
    # row 15
    "refused": Fault(raising(httpx.ConnectError, "[Errno 111] Connection refused"), **UNSENT),
    "no such host": Fault(raising(httpx.ConnectError, "[Errno -2] Name or service not known"), **UNSENT),
    "no connection in time": Fault(raising(httpx.ConnectTimeout), **UNSENT),
    "expired certificate": Fault(raising(httpx.ConnectError, "tls", EXPIRED), passing=(3,), lasting=(3,), **UNSENT),
    "reset": Fault(raising(httpx.ReadError, "[Errno 104] Connection reset by peer")),
    "broken pipe": Fault(raising(httpx.WriteError)),
    "closed": Fault(raising(httpx.RemoteProtocolError, "Server disconnected without sending a response.")),
    "no answer in time": Fault(raising(httpx.ReadTimeout)),
    # row 16
    "stalled": Fault(stalled),
    "a byte a second": Fault(endless(b" ", 1.0)),
    "endless body": Fault(endless(b" " * (1 << 21), 0.01), **GARBLED),
    # row 17
    "HTML": Fault(status(200, content=b"<html>Maintenance</html>"), **GARBLED),
    "empty body": Fault(status(200), **GARBLED),
    "cut off": Fault(cut_off, **GARBLED),
    "another charset": Fault(status(200, content='{"flowItemId": "ü"}'.encode("utf-16")), **GARBLED),
    "an error with 200": Fault(status(200, content=b'{"error": "overloaded"}'), **GARBLED),
    "a list": Fault(status(200, content=b"[]"), **GARBLED),
    "deep": Fault(status(200, content=b"[" * 100_000), **GARBLED),
    "204": Fault(status(204), **GARBLED),
    "compressed": Fault(status(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), **GARBLED),
    "redirect": Fault(status(307, {"Location": "https://evil.example/"}), passing=(3,), lasting=(3,), **UNSENT),
    "400": Fault(status(400, content=b'{"title": "no"}'), passing=(0, 3, 4), lasting=(0, 3, 4), loses=True, **UNSENT),
    "403": Fault(status(403), passing=(4,), lasting=(4,), **UNSENT),
    "422": Fault(status(422), passing=(3,), lasting=(3,), **UNSENT),
    # row 18; a token request that is refused is about the secret, and final
    "401": Fault(
        status(401),
        passing=(0, 4),
        lasting=(4,),
        on=("capabilities", "dataset", "datapoint", "item", "list", "status", "matrix"),
        **UNSENT,
    ),
    "unknown client": Fault(
        status(401, content=b'{"error": "invalid_client"}'), passing=(4,), lasting=(4,), on=("token",), **UNSENT
    ),
}


OFTEN = ("500", "refused", "reset", "HTML", "401")
"""One of each sort: these strike everywhere, the others where it hurts most."""


class Plan:
    """Disturbs requests of a kind from the n-th on."""

    def __init__(
        self, world: World, kind: Kind, fault: Reply, effect: Literal["before", "after"], nth: int, span: Span
    ) -> None:
        self._world, self._kind, self._span, self._left = world, kind, span, nth - 1
        self._disturbance = Disturbance(fault, effect)
        self._since: float | None = None
        self.hits = 0
        world.wire.disturb = self

    def __call__(self, kind: Kind) -> Disturbance | None:
        if kind != self._kind:
            return None
        if self._left > 0:
            self._left -= 1
            return None
        now = self._world.loop.time()
        self._since = now if self._since is None else self._since
        over = {"once": self.hits >= 1, "for a while": now > self._since + WHILE_S, "for ever": False}[self._span]
        if over:
            return None
        self.hits += 1
        return self._disturbance


def well_again(world: World) -> None:
    """Go on with a service that has nothing any more."""
    world.wire.disturb = lambda kind: None
    world.live()


def scenario(
    folder: Path,
    service: str,
    fault: Fault,
    kind: Kind,
    effect: Literal["before", "after"],
    nth: int,
    span: Span,
    prepare: Callable[[World], None] = lambda world: None,
) -> list[str]:
    """All that is wrong with what came of it; nothing where the fault never struck."""
    world = World(service, folder)
    prepare(world)
    plan = Plan(world, kind, fault.reply, effect, nth, span)
    # What cannot be understood for long is given up; once it can, it is kept as late, in a run that goes on.
    life = world.live(linger_s=90.0 if fault.loses and span == "for a while" else 0.0)
    if not plan.hits:
        world.close()
        return []
    count_scenario()
    exits = fault.lasting if span == "for ever" else fault.passing
    if span == "for ever" and effect == "after":
        exits = (*exits, 0)  # what was made is found although nobody was told
    wrong = [] if life.exit_code in exits else [f"ended with {life.exit_code} ({life.error}), not with one of {exits}"]
    if life.exit_code != 0:
        well_again(world)
    wrong += complaints(world, may_lose=ALL if fault.loses and span == "for ever" else (), exits=exits)
    world.close()
    return wrong


def report(wrong: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {'; '.join(what)}" for name, what in wrong.items())


@both_services
@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_costs_a_vote_or_buys_one_twice(service: str, name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    wrong: dict[str, list[str]] = {}
    spans: list[tuple[int, Span]] = [(1, "once"), (2, "for a while"), (2, "for ever")]
    if name in OFTEN and service == "vendor":
        spans += [(3, "once"), (1, "for ever")]
    for kind in fault.on if name in OFTEN else [kind for kind in fault.on if kind in ("token", "item", "matrix")]:
        creates = kind in ("dataset", "datapoint", "item")
        for effect in fault.effect[::-1] if creates else fault.effect[:1]:
            for nth, span in spans:
                if kind in ("token", "capabilities") and nth > 1:
                    continue  # asked for once
                what = scenario(tmp_path, service, fault, kind, effect, nth, span)
                if what:
                    wrong[f"{service}, {name} {effect} {kind} {nth}, {span}"] = what
    assert not wrong, report(wrong)


# Rows 17, 19, 20, 22: answers that are almost right.


def rows_of(change: Callable[[list[Any]], list[Any]]) -> Reply:
    return changed(lambda page: {**page, "items": change(page["items"])})


def each_row(**members: Any) -> Reply:
    return rows_of(lambda rows: [{**row, **members} for row in rows])


def matrix_of(**members: Callable[[Any], Any]) -> Reply:
    return changed(lambda matrix: {**matrix, **{name: change(matrix[name]) for name, change in members.items()}})


def raw(change: Callable[[str], str]) -> Reply:
    """The service's answer as text, with something in it that `json` would not write."""
    return changed(lambda body: change(json.dumps(body)).encode())


def columns_in_another_order(matrix: dict[str, Any]) -> dict[str, Any]:
    turned = [*matrix["columns"][1:], matrix["columns"][0]]
    return {**matrix, "columns": turned, "data": [[*row[1:], row[0]] for row in matrix["data"]]}


def doubled_on_the_diagonal(data: list[list[float]]) -> list[list[float]]:
    return [[1 if i == j else value for j, value in enumerate(row)] for i, row in enumerate(data)]


EXTRA = {"isNew": True, "votesPerMinute": 1.5, "nested": {"a": [None]}}
HARMLESS: dict[str, tuple[Kind, Reply]] = {
    "more members in the list": ("list", each_row(**EXTRA)),
    "more members in a status": ("status", changed(lambda body: body | EXTRA)),
    "more members in the matrix": ("matrix", changed(lambda body: body | EXTRA)),
    "rows twice": ("list", rows_of(lambda rows: rows + rows)),
    "rows in another order": ("list", rows_of(lambda rows: rows[::-1])),
    "a row missing": ("list", rows_of(lambda rows: rows[1:])),
    "no rows": ("list", rows_of(lambda rows: [])),
    "somebody else's rows": (
        "list",
        rows_of(lambda rows: [{**r, "id": r["id"] + "x", "datasetId": "d"} for r in rows]),
    ),
    "a total of nothing": ("list", changed(lambda page: page | {"total": 0})),
    "a total of very many": ("list", changed(lambda page: page | {"total": 10**9})),
    "columns in another order": ("matrix", changed(columns_in_another_order)),
}
UNUSABLE: dict[str, tuple[Kind, Reply]] = {
    "an unknown state": ("status", changed(lambda body: body | {"state": "Paused"})),
    "no state": ("status", changed(lambda body: body | {"state": None})),
    "another item": ("status", changed(lambda body: body | {"id": "fli_other"})),
    "unknown states": ("list", each_row(state="Paused")),
    "rows without a dataset": ("list", rows_of(lambda rows: [{"id": row["id"], "state": "Running"} for row in rows])),
    "labels of others": (
        "matrix",
        matrix_of(index=lambda names: [n + "!" for n in names], columns=lambda names: [n + "!" for n in names]),
    ),
    "a label twice": ("matrix", matrix_of(index=lambda names: [names[0], *names[:-1]])),
    "a label missing": ("matrix", matrix_of(index=lambda names: names[1:])),
    "columns of others": ("matrix", matrix_of(columns=lambda names: [*names[:-1], "somebody"])),
    "a row missing": ("matrix", matrix_of(data=lambda rows: rows[1:])),
    "a short row": ("matrix", matrix_of(data=lambda rows: [rows[0][1:], *rows[1:]])),
    "a candidate missing": (
        "matrix",
        matrix_of(index=lambda n: n[1:], columns=lambda n: n[1:], data=lambda rows: [row[1:] for row in rows[1:]]),
    ),
    "negative": ("matrix", matrix_of(data=lambda rows: [[-value - 1 for value in row] for row in rows])),
    "votes against itself": ("matrix", matrix_of(data=doubled_on_the_diagonal)),
    "NaN": ("matrix", raw(lambda text: text.replace("0", "NaN", 1))),
    "infinite": ("matrix", raw(lambda text: text.replace("[0", "[1e999", 1))),
    "words for numbers": ("matrix", raw(lambda text: text.replace("[0", '["many"', 1))),
    "null for a number": ("matrix", raw(lambda text: text.replace("[0", "[null", 1))),
    "null for data": ("matrix", changed(lambda body: body | {"data": None})),
}


@both_services
@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_matter_changes_nothing(service: str, name: str, tmp_path: Path) -> None:
    kind, reply = HARMLESS[name]
    fault = Fault(reply, passing=(0,), lasting=(0,))
    wrong = {
        span: what
        for nth, span in ((1, "once"), (2, "for a while"), (1, "for ever"))
        if (what := scenario(tmp_path, service, fault, kind, "after", nth, span))  # type: ignore[arg-type]
    }
    assert not wrong, report(wrong)


@both_services
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_told_for_sure_is_no_label(service: str, name: str, tmp_path: Path) -> None:
    kind, reply = UNUSABLE[name]
    fault = Fault(reply, passing=(0, 3), lasting=(0, 3), loses=True)
    wrong = {
        span: what
        for nth, span in ((1, "once"), (2, "for a while"), (1, "for ever"))
        if (what := scenario(tmp_path, service, fault, kind, "after", nth, span))  # type: ignore[arg-type]
    }
    assert not wrong, report(wrong)


# Rows 18, 21, 23 to 28: what a service may do with items, tokens and clocks.


def judged(world: World, *, linger_s: float = 0.0, **expected: Any) -> list[str]:
    """What is wrong after one life that was to end well."""
    world.live(linger_s=linger_s)
    count_scenario()
    wrong = complaints(world, **expected)
    world.close()
    return wrong


def at_vendor(folder: Path) -> tuple[World, AtVendor]:
    world = World("vendor", folder)
    assert isinstance(world.service, AtVendor)
    return world, world.service


def first_item(service: AtVendor) -> Any:
    return next((i for i in service.vendor.items.values() if i.context == "Why 0?"), None)


@both_services
@pytest.mark.parametrize("policy", ["use", "drop", "resubmit_once"])
def test_votes_below_the_minimum_follow_the_policy(service: str, policy: str, tmp_path: Path) -> None:
    world = World(service, tmp_path)
    world.feedback_options = {"incomplete": policy}
    assert judged(world) == []
    groups = world.state().groups
    assert len(groups["g2"].asks) == len(groups["g3"].asks) == (2 if policy == "resubmit_once" else 1)
    assert (groups["g2"].set_aside is not None) == (policy == "drop")


@pytest.mark.parametrize("state", ["Pending", "Running", "Stopping"])
@pytest.mark.parametrize("stops", [True, False])
def test_an_item_that_is_stuck_holds_nobody_up(state: str, stops: bool, tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)

    def tick(now: float) -> None:
        if (item := first_item(service)) is not None and now > 30:
            item.forced = None if stops and item.stop_asked_at is not None else state

    world.on_tick = tick
    assert judged(world, may_lose=() if stops else (0,)) == []
    assert world.lives[0].seconds < 250


@pytest.mark.parametrize("kind", ["status", "list", "matrix", "stop"])
@pytest.mark.parametrize("name", ["500", "refused", "400", "HTML", "stalled"])
def test_a_stuck_item_and_a_fault_besides(kind: Kind, name: str, tmp_path: Path) -> None:
    def stick(world: World) -> None:
        def tick(now: float) -> None:
            assert isinstance(world.service, AtVendor)
            if (item := first_item(world.service)) is not None and now > 30:
                item.forced = "Running" if item.stop_asked_at is None else None

        world.on_tick = tick

    fault = FAULTS[name]
    spans: list[Span] = ["once", "for a while", "for ever"]
    fault = Fault(fault.reply, (0, 3), (0, 3, 4, 75), loses=True)
    wrong = {
        span: what for span in spans if (what := scenario(tmp_path, "vendor", fault, kind, "before", 3, span, stick))
    } | {span: what for span in spans if (what := scenario(tmp_path, "vendor", fault, kind, "before", 1, span, stick))}
    assert not wrong, report(wrong)


def test_a_failed_item_says_why(tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)

    def tick(now: float) -> None:
        if (item := first_item(service)) is not None and now > 12 and item.failure is None:
            item.failure = "no people today"

    world.on_tick = tick
    assert judged(world, may_lose=(0,)) == []
    assert "no people today" in (world.state().groups["g0"].set_aside or "")


@both_services
def test_an_item_that_is_forgotten_is_not_bought_again(service: str, tmp_path: Path) -> None:
    world = World(service, tmp_path)
    forgotten: list[str] = []

    def blank(rows: list[Any]) -> list[Any]:
        forgotten.extend(row["id"] for row in rows if not forgotten)
        return [row for row in rows if row["id"] not in forgotten]

    async def unknown(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
        return httpx.Response(404) if request.url.path.split("/")[-1] in forgotten else response or httpx.Response(500)

    replies = {"list": rows_of(blank), "status": unknown}
    world.wire.disturb = lambda kind: Disturbance(replies[kind], "after") if kind in replies else None
    assert judged(world, may_lose=ALL) == []  # and no group has a second item
    assert len([g for g in world.state().groups.values() if g.set_aside and "no longer knows" in g.set_aside]) == 1


def test_votes_after_the_decision_are_kept_and_never_trained(tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)

    def tick(now: float) -> None:
        item = first_item(service)
        if item is not None and item.ended is not None and item.votes == 6 and now > 40:
            service.vendor.vote(item.id, 2, 1, late=True)

    world.on_tick = tick
    assert judged(world, linger_s=120) == []
    (late,) = world.state().groups["g0"].late
    assert np.array(late.wins).sum() == 1


def test_a_service_that_takes_an_end_back_is_not_followed(tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)

    def tick(now: float) -> None:
        item = first_item(service)
        if item is not None and item.ended is not None and now > 45:
            item.forced = "Running"
            item.wins[:] = 0

    world.on_tick = tick
    assert judged(world, linger_s=120) == []


def test_fractions_of_votes_are_votes(tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)
    service.vendor.vote_weight = 0.25
    assert judged(world) == []
    ranked = world.state().groups["g0"].ranked
    assert ranked is not None
    assert ranked.matrix().votes == 1.5


def test_two_items_of_one_dataset_are_pooled_and_one_is_stopped(tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)

    async def again(request: httpx.Request, response: httpx.Response | None) -> httpx.Response:
        second = service.vendor.answer(request)
        return second if "Why 1?" in request.content.decode() else response or second

    world.wire.disturb = lambda kind: Disturbance(again, "after") if kind == "item" else None
    assert judged(world, may_double=True, linger_s=120) == []
    assert all(len(group.doubles) == 1 for group in world.state().groups.values())


@pytest.mark.parametrize("life_s", [61, 90, 3600])
@pytest.mark.parametrize("revoked_at", [3, 8, 30, 61])
def test_tokens_that_end_in_mid_run_are_replaced(life_s: float, revoked_at: float, tmp_path: Path) -> None:
    world, service = at_vendor(tmp_path)
    service.vendor.token_life_s = life_s
    world.on_tick = lambda now: service.vendor.revoke_tokens() if int(now) == revoked_at else None
    assert judged(world) == []


@both_services
@pytest.mark.parametrize("jump_s", [-3600.0, -600.0, 600.0, 3600.0])
@pytest.mark.parametrize("whose", ["ours", "theirs", "both"])
def test_clocks_that_jump_hurt_nobody(service: str, jump_s: float, whose: str, tmp_path: Path) -> None:
    wrong = {}
    for at in (0, 2, 9, 30, 59, 61):
        world = World(service, tmp_path)

        def tick(now: float, world: World = world, at: int = at) -> None:
            if now >= at:
                world.loop.wall_offset_s = jump_s if whose != "theirs" else 0.0
                world.server_offset_s = jump_s if whose != "ours" else 0.0

        world.on_tick = tick
        if what := judged(world):
            wrong[f"{service}, {whose} by {jump_s:g} s at {at}"] = what
    assert not wrong, report(wrong)


# Rows 1 to 7 and 11: death at every point.


def small(service: str, folder: Path, groups: int) -> World:
    return World(service, folder, groups=[group(i, ["a", "b"]) for i in range(groups)], votes=(6, 1))


@both_services
def test_death_at_any_point(service: str, tmp_path: Path) -> None:
    """Before and after each entry of the journal, before and after the effect of each request."""
    wrong, points = {}, 0
    for at in itertools.count(1):
        world = small(service, tmp_path, 2)
        if (died := world.live(die_at=at)).exit_code == "killed":
            world.live()
        count_scenario()
        points = at
        if what := complaints(world):
            wrong[f"{service}, death at point {at}"] = what
        world.close()
        if died.exit_code != "killed":
            break
    assert not wrong, report(wrong)
    assert points > 50


@pytest.mark.parametrize(("service", "step"), [("vendor", 1), ("ours", 3)])
def test_death_at_any_two_points_on_the_way_to_an_item(service: str, step: int, tmp_path: Path) -> None:
    """All pairs where the service has no keys; every third of both where it has."""
    wrong, item_known = {}, 0
    for first, second in itertools.product(range(1, 22, step), range(1, 19, step)):
        world = small(service, tmp_path, 1)
        world.live(die_at=first)
        item_known += world.state().groups["g0"].item_id is not None
        if world.live(die_at=second).exit_code == "killed":
            world.live()
        count_scenario()
        if what := complaints(world):
            wrong[f"{service}, death at points {first} and {second}"] = what
        world.close()
    assert not wrong, report(wrong)
    assert item_known  # by the last of the first deaths


@pytest.mark.parametrize("name", ["500", "reset", "stalled", "HTML"])
def test_death_while_the_answer_to_a_creation_is_lost(name: str, tmp_path: Path) -> None:
    """The worst of both: the item exists, nobody was told, and the process dies while it settles."""
    wrong = {}
    for at in range(10, 40):
        world = small("vendor", tmp_path, 1)
        Plan(world, "item", FAULTS[name].reply, "after", 1, "once")
        if world.live(die_at=at).exit_code == "killed":
            world.live()
        count_scenario()
        if what := complaints(world):
            wrong[f"{name}, death at point {at}"] = what
        world.close()
    assert not wrong, report(wrong)


# The judge can find fault.


def lose_answers(world: World) -> None:
    Plan(world, "item", FAULTS["500"].reply, "after", 1, "once")


def test_a_buyer_that_does_not_look_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def nothing(self: FlowClient, *args: object, **options: object) -> None:
        return None

    monkeypatch.setattr(FlowClient, "find_item", nothing)
    world = World("vendor", tmp_path)
    lose_answers(world)
    assert any("two live items" in what for what in judged(world))


def test_a_client_that_repeats_creations_blindly_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def blindly(self: Any, path: str, answer: Any, body: Any, key: str | None = None) -> Any:
        return await self._calls.call("POST", path, answer, body=body)

    monkeypatch.setattr(FlowClient, "_create", blindly)
    world = World("vendor", tmp_path)
    lose_answers(world)
    assert any("two live items" in what for what in judged(world))


def test_a_buyer_that_does_not_wait_for_the_list_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf_cli.feedback.buying._pause_s", lambda attempt: 0.0)
    world = World("vendor", tmp_path)
    world.feedback_options = {"settle_s": LAG_S / 4}
    lose_answers(world)
    assert any("two live items" in what for what in judged(world))


TURNED = {
    "winners and losers": matrix_of(data=lambda rows: [list(row) for row in zip(*rows, strict=True)]),
    "candidates": matrix_of(index=lambda names: names[::-1], columns=lambda names: names[::-1]),
}


@pytest.mark.parametrize("what", TURNED)
def test_votes_that_were_turned_around_are_found_out(what: str, tmp_path: Path) -> None:
    world = World("vendor", tmp_path)
    Plan(world, "matrix", TURNED[what], "after", 1, "once")
    assert any("is labelled" in one for one in judged(world))


def test_labels_made_of_nothing_are_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def invented(self: FlowClient, item_id: str, texts: Any, *, partial: bool = False) -> WinMatrix:
        return WinMatrix(np.ones((len(texts), len(texts))) - np.eye(len(texts)))

    monkeypatch.setattr(FlowClient, "vote_matrix", invented)
    assert any("has a label although" in what or "labelled" in what for what in judged(World("vendor", tmp_path)))


def test_votes_that_are_thrown_away_are_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def none(self: FlowClient, item_id: str, texts: Any, *, partial: bool = False) -> WinMatrix:
        return WinMatrix(np.zeros((len(texts), len(texts))))

    monkeypatch.setattr(FlowClient, "vote_matrix", none)
    assert any("lost 6 votes" in what for what in judged(World("vendor", tmp_path)))


def test_a_client_of_another_protocol_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf_cli.flow.client.RAPIDATA", Capabilities(idempotency=True))
    world = World("vendor", tmp_path)
    world.live()
    assert any("idempotency-key" in what for what in complaints(world))


def test_a_secret_in_an_error_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(HttpCalls, "redact", lambda self, content: content)
    world, service = at_vendor(tmp_path)
    echo = status(400, content=service.vendor.client_secret.encode())
    Plan(world, "list", echo, "before", 1, "for ever")
    world.live()
    assert any("a secret is in the error" in what for what in complaints(world, exits=(3,)))


def test_an_outcome_that_is_given_twice_is_found_out(tmp_path: Path) -> None:
    world = World("vendor", tmp_path)
    world.live().decided *= 2
    assert [what for what in complaints(world) if "delivered 2 times" in what]


def test_a_storm_of_requests_is_found_out(tmp_path: Path) -> None:
    world = World("vendor", tmp_path)
    world.feedback_options = {"poll_s": 0.02}
    assert any("requests within ten seconds" in what for what in judged(world))
