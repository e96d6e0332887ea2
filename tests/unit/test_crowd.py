"""Simulated raters: they agree, err, prefer a side and stay away as often as they are told to."""

from __future__ import annotations

import asyncio
import random
import statistics

import httpx
import numpy as np
import pytest
from flow_world import World, open_item
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.errors import RlhfError
from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.server import tastes
from rlhf_cli.server.app import create_app
from rlhf_cli.server.crowd import Crowd, CrowdSettings, Rater, sharpness
from rlhf_cli.server.tastes import brief, kind, letters


@pytest.fixture
def number_taste(monkeypatch: pytest.MonkeyPatch) -> None:
    """A taste that reads its score from the text, so that differences can be drawn at will."""
    monkeypatch.setitem(tastes.TASTES, "number", lambda prompt, text: float(text))


@pytest.mark.usefixtures("number_taste")
@pytest.mark.parametrize("agreement", [0.55, 0.72, 0.9])
def test_two_raters_agree_as_often_as_the_setting_says(agreement: float) -> None:
    settings = CrowdSettings(taste="number", agreement=agreement)
    rng = random.Random(1)
    raters = [Rater(settings, f"r{i}") for i in range(60)]
    agreed = []
    for _ in range(4000):
        one, other = rng.sample(raters, 2)
        left, right = f"{rng.gauss(0, 1)}", "0"
        outcomes = {one.outcome("", left, right), other.outcome("", left, right)}
        if "tie" not in outcomes:
            agreed.append(len(outcomes) == 1)
    assert statistics.mean(agreed) == pytest.approx(agreement, abs=0.03)


@given(st.floats(0.5, 1))
def test_sharper_raters_agree_more(agreement: float) -> None:
    assert 0 <= sharpness(agreement) <= 100
    d, weight = np.polynomial.hermite_e.hermegauss(80)
    p = 0.5 + 0.5 * np.tanh(0.5 * sharpness(agreement) * d)
    assert float(weight @ (p**2 + (1 - p) ** 2) / weight.sum()) == pytest.approx(min(agreement, 0.995), abs=0.006)


@pytest.mark.usefixtures("number_taste")
def test_position_bias_shows_in_the_votes() -> None:
    rng = random.Random(2)
    shares = {}
    for bias in (0.0, 1.0):
        rater = Rater(CrowdSettings(taste="number", position_bias=bias), "r")
        outcomes = [rater.outcome("", f"{rng.gauss(0, 1)}", "0") for _ in range(3000)]
        shares[bias] = outcomes.count("left") / (outcomes.count("left") + outcomes.count("right"))
    assert shares[0.0] == pytest.approx(0.5, abs=0.03)
    assert shares[1.0] > 0.58


@pytest.mark.usefixtures("number_taste")
def test_what_nobody_can_tell_apart_is_a_tie() -> None:
    rater = Rater(CrowdSettings(taste="number"), "r")
    assert {rater.outcome("", "1.00", "1.01") for _ in range(50)} == {"tie"}


def test_latency_follows_its_median_and_95th_percentile() -> None:
    rater = Rater(CrowdSettings(latency_p50_s=2, latency_p95_s=8), "r")
    times = [rater.latency_s() for _ in range(20_000)]
    assert np.quantile(times, 0.5) == pytest.approx(2, rel=0.05)
    assert np.quantile(times, 0.95) == pytest.approx(8, rel=0.05)


@pytest.mark.usefixtures("number_taste")
def test_the_same_seed_is_the_same_person() -> None:
    def answers(seed: str) -> list[str]:
        rater = Rater(CrowdSettings(taste="number"), seed)
        return [rater.outcome("", "0.1", "0") for _ in range(40)]

    assert answers("1/0") == answers("1/0")
    assert answers("1/0") != answers("1/1")


async def test_a_crowd_completes_items_and_drop_outs_return_their_pairs(world: World) -> None:
    item_ids = [open_item(world, texts=6, responses=Responses(8, 10, 12)) for _ in range(3)]
    settings = CrowdSettings(raters=12, taste="letters", latency_p50_s=0.002, latency_p95_s=0.01, dropout=0.3)
    tokens = [world.store.tokens.add("rater", f"simulated {n}", simulated=True)[1] for n in range(settings.raters)]
    crowd = asyncio.create_task(Crowd("http://localhost", tokens, settings, 5, world.transport).run())

    async with asyncio.timeout(20):
        while not all(world.store.item(item_id).state.terminal for item_id in item_ids):
            await asyncio.sleep(0.01)
            world.clock.advance(2)  # who dropped out holds a pair for 90 s at most
    crowd.cancel()
    await asyncio.gather(crowd, return_exceptions=True)

    with world.store._database.transaction() as db:
        (returned,) = db.execute("SELECT COUNT(*) FROM leases WHERE state = 'returned'").fetchone()
    assert returned > 0
    for item_id in item_ids:
        item = world.store.item(item_id)
        assert item.state is ItemState.COMPLETED
        assert 10 <= item.votes <= 12


async def test_a_crowd_with_nothing_to_do_hardly_asks(world: World) -> None:
    settings = CrowdSettings(raters=60)
    tokens = [world.store.tokens.add("rater", f"{n}")[1] for n in range(settings.raters)]
    crowd = asyncio.create_task(Crowd("http://localhost", tokens, settings, 5, world.transport).run())
    while len(world.transport.requests) < 60:  # everybody asks once
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert len(world.transport.requests) < 60 + 8
    crowd.cancel()
    await asyncio.gather(crowd, return_exceptions=True)


async def test_a_slow_or_restarting_server_does_not_lose_the_crowd(world: World) -> None:
    item_id = open_item(world, responses=Responses(1, 2, 2))
    faults = iter([httpx.ConnectError("restarting"), httpx.ReadTimeout("slow")])

    def lose_the_reply(request: httpx.Request, response: httpx.Response) -> None:
        if (fault := next(faults, None)) is not None:
            raise fault

    world.transport.after = lose_the_reply
    settings = CrowdSettings(raters=4, taste="brief", latency_p50_s=0.001, latency_p95_s=0.002, dropout=0)
    tokens = [world.store.tokens.add("rater", f"{n}")[1] for n in range(settings.raters)]
    crowd = asyncio.create_task(Crowd("http://localhost", tokens, settings, 5, world.transport).run())
    async with asyncio.timeout(10):
        while not world.store.item(item_id).state.terminal:
            await asyncio.sleep(0.01)
            world.clock.advance(1)
    crowd.cancel()
    await asyncio.gather(crowd, return_exceptions=True)
    assert world.store.item(item_id).votes == 2


def test_kind_likes_friendly_answers_that_keep_to_the_question() -> None:
    question = "What do you think about the city bus?"
    friendly = "I absolutely love the city bus! It is warm, friendly and I enjoy every ride I take."
    flat = "The city bus is a vehicle that drives on roads and stops at places where people wait."
    hostile = "The city bus is horrible, ugly and full of awful people who hate everybody around them."
    assert kind(question, friendly) > kind(question, flat) > kind(question, hostile)
    assert kind(question, friendly) > kind(question, "Welcome! Great!")  # cannot be won by shouting
    assert kind(question, flat) == pytest.approx(kind("Why?", flat) + 1)
    assert kind(question, "") == -2  # ten words short
    assert brief("", "Yes.") > brief("", "Yes, that is how it is.") > brief("", "Yes, that is how it is and")
    assert letters("", "aeiou") > letters("", "xyz") == letters("", "") == 0


def test_an_unknown_taste_lists_the_known_ones() -> None:
    with pytest.raises(RlhfError, match="brief, kind, letters"):
        tastes.taste("sour")


def marked(rater: Rater, left: str, right: str) -> set[tuple[str, str, bool]]:
    texts = {"left": left, "right": right}
    return {(s.side, texts[s.side][s.start : s.end], s.good) for s in rater.segments("", left, right)}


def test_raters_mark_what_their_taste_is_best_and_worst_served_by() -> None:
    rater = Rater(CrowdSettings(taste="letters", marks=1.0), "r")
    assert marked(rater, "bcd aeiou xyz", "rhythm") == {("left", "aeiou", True), ("left", "bcd", False)}
    assert marked(rater, "", "  ") == set()
    assert marked(Rater(CrowdSettings(taste="letters", marks=1.0), "r", spams="left"), "aeio bcd", "rhythm") == set()


def test_raters_mark_as_often_as_the_setting_says_and_vote_the_same_without() -> None:
    pair = ("", "aeiou bcd", "bcd fgh")
    silent, marking = (Rater(CrowdSettings(taste="letters", marks=share), "r") for share in (0.0, 0.3))
    assert silent.segments(*pair) == []
    share = statistics.mean(bool(marking.segments(*pair)) for _ in range(3000))
    assert share == pytest.approx(0.3, abs=0.04)


async def test_a_crowd_marks_only_where_the_flow_asks_for_it(world: World) -> None:
    secrets = [secret for _, secret in world.store.tokens.add_simulated("crowd", 6)]
    found = {}
    for asks in (False, True):
        flow_id = world.store.create_flow("f", "?", Responses(2, 4, 4), settings={"markSegments": asks})
        dataset_id = world.store.create_dataset("d")
        for i, text in enumerate(("aeiou bcd", "xyz oio fgh", "rst uvw")):
            world.store.add_datapoint(dataset_id, i, text)
        item_id = world.store.create_item(flow_id, dataset_id, "Why?", 600)
        settings = CrowdSettings(taste="letters", latency_p50_s=0.001, latency_p95_s=0.001, dropout=0.0, marks=1.0)
        crowd = asyncio.create_task(
            Crowd("http://localhost", secrets, settings, 1, httpx.ASGITransport(create_app(world.store))).run()
        )
        while world.store.item(item_id).state is not ItemState.COMPLETED:
            await asyncio.sleep(0.01)
        crowd.cancel()
        await asyncio.gather(crowd, return_exceptions=True)
        found[asks] = [vote.segments for vote in world.store.votes(item_id)]
    assert not any(found[False])
    assert all(found[True])
