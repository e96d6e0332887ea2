"""Marks on their way from a rater to the journal: kept with the vote, served with the item, put on the right text."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from flow_world import PLAIN, SPEC, Clock, World, group, until

from rlhf_cli.errors import FlowRefused
from rlhf_cli.feedback.asking import SWEEP_S
from rlhf_cli.feedback.votes import DRAIN_S, SLACK_S, VotesFeedback
from rlhf_cli.flow.base import RAPIDATA, BadAnswer, FlowSpec, Responses
from rlhf_cli.flow.mapping import mapping
from rlhf_cli.flow.wire import OURS, CastSegment
from rlhf_cli.journal.events import DatasetCreated, Event, GroupRanked, GroupSampled, GroupSubmitted, ItemEnded
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import replay
from rlhf_cli.server import gold, voting
from rlhf_cli.server.store import Store
from rlhf_cli.types import RankedGroup, Segment, Unranked

MARKED = FlowSpec("marked", "Which?", Responses(2, 2, 2), ttl_s=60, segments=True)
TEXTS = ["short", "a longer text"]


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=world.transport, base_url="http://localhost") as http:
        yield http


def token(world: World, role: str) -> dict[str, str]:
    if role == "rater":
        return {"Authorization": f"Bearer {world.store.tokens.add('rater', 'ada')[1]}"}
    secret = world.store.tokens.issue_access(world.credentials.client_id, world.credentials.client_secret)
    return {"Authorization": f"Bearer {secret}"}


def item(store: Store, texts: list[str] = TEXTS, settings: dict[str, Any] | None = None, most: int = 6) -> str:
    flow_id = store.create_flow("f", "Which?", Responses(1, most, most), settings=settings or {"markSegments": True})
    dataset_id = store.create_dataset("d")
    for i, text in enumerate(texts):
        store.add_datapoint(dataset_id, i, text)
    return store.create_item(flow_id, dataset_id, "Why?", 600)


def mark(world: World, words: str, *, good: bool, outcome: str = "left") -> None:
    """A new rater marks these words in every text that has them, and answers."""
    rater = world.rater()
    pair = world.store.lease(rater)
    assert pair is not None
    sides = {"left": pair.left, "right": pair.right}
    found = [
        CastSegment(side=side, start=text.index(words), end=text.index(words) + len(words), good=good)  # type: ignore[arg-type]
        for side, text in sides.items()
        if words in text
    ]
    world.store.vote(pair.id, rater, outcome, segments=found)  # type: ignore[arg-type]


async def test_marks_come_in_with_the_vote_and_out_with_the_item(http: httpx.AsyncClient, world: World) -> None:
    item_id = item(world.store)
    rater, client = token(world, "rater"), token(world, "client")
    lease = (await http.post("/vote/lease", headers=rater)).json()
    assert lease["segments"] is True
    side = "left" if lease["left"] == TEXTS[1] else "right"
    vote = {"outcome": "left", "segments": [{"side": side, "start": 2, "end": 8, "good": False}]}
    assert (await http.post(f"/vote/{lease['lease']}", json=vote, headers=rater)).status_code == 204
    path = f"/flow/ranking/item/{item_id}"
    assert (await http.get(f"{path}/segments", headers=client)).status_code == 409
    world.store.stop(item_id)
    body = (await http.get(f"{path}/segments", headers=client)).json()
    assert body["index"] == TEXTS
    assert body["segments"] == [{"candidate": 1, "start": 2, "end": 8, "good": False}]
    raw = (await http.get(f"{path}/votes", headers=client)).json()["items"]
    assert raw[0]["segments"] == [{"completion": 1, "start": 2, "end": 8, "good": False}]


@pytest.mark.parametrize(
    "segment",
    [
        {"start": 0, "end": 14},
        {"start": 3, "end": 3},
        {"start": 4, "end": 3},
        {"start": -1, "end": 3},
        {"start": 0, "end": 10**12},
        {"start": 0.5, "end": 2},
        {"start": 0, "end": 2, "side": "both"},
    ],
    ids=str,
)
async def test_a_vote_with_a_mark_that_is_not_in_its_text_is_refused_and_can_be_given_again(
    http: httpx.AsyncClient, world: World, segment: dict[str, Any]
) -> None:
    item_id, rater = item(world.store), token(world, "rater")
    lease = (await http.post("/vote/lease", headers=rater)).json()
    side = "left" if lease["left"] == TEXTS[1] else "right"
    bad = {"outcome": "left", "segments": [{"side": side, "good": True, **segment}]}
    assert (await http.post(f"/vote/{lease['lease']}", json=bad, headers=rater)).status_code == 400
    assert world.store.votes(item_id) == []
    assert (await http.post(f"/vote/{lease['lease']}", json={"outcome": "left"}, headers=rater)).status_code == 204
    assert world.store.item(item_id).votes == 1


async def test_a_vote_may_have_64_marks_and_no_more(http: httpx.AsyncClient, world: World) -> None:
    item(world.store, ["x" * 200, "y" * 200])
    rater = token(world, "rater")
    lease = (await http.post("/vote/lease", headers=rater)).json()
    marks = [{"side": "left", "start": i, "end": i + 1, "good": True} for i in range(65)]
    many = {"outcome": "left", "segments": marks}
    assert (await http.post(f"/vote/{lease['lease']}", json=many, headers=rater)).status_code == 400
    most = {"outcome": "left", "segments": marks[:64]}
    assert (await http.post(f"/vote/{lease['lease']}", json=most, headers=rater)).status_code == 204


async def test_one_vote_marks_no_character_twice(http: httpx.AsyncClient, world: World) -> None:
    """Else one rater would outweigh all others where marks are pooled."""
    item(world.store)
    rater = token(world, "rater")
    lease = (await http.post("/vote/lease", headers=rater)).json()
    for start, code in ((1, 400), (2, 204)):
        marks = [
            {"side": "left", "start": start, "end": 5, "good": True},
            {"side": "right", "start": 0, "end": 5, "good": True},
            {"side": "left", "start": 0, "end": 2, "good": False},
        ]
        vote = {"outcome": "left", "segments": marks}
        assert (await http.post(f"/vote/{lease['lease']}", json=vote, headers=rater)).status_code == code


async def test_only_marks_of_votes_that_count_are_served(world: World, clock: Clock) -> None:
    item_id = item(world.store)
    mark(world, "short", good=True)
    mark(world, "longer", good=False, outcome="skip")
    rater = world.rater()
    pair = world.store.lease(rater)
    assert pair is not None
    clock.advance(1000)  # that pair goes back, the item ends
    late = CastSegment(side="left", start=0, end=1, good=True)
    assert not world.store.vote(pair.id, rater, "left", segments=[late])
    client = world.client()
    assert await client.segments(item_id, TEXTS) == (Segment(0, 0, 5, True),)
    assert [len(vote.segments) for vote in world.store.votes(item_id)] == [1, 1, 1]
    await client.close()


async def test_answers_that_may_be_marked_are_shown_as_they_are(http: httpx.AsyncClient, world: World) -> None:
    flags = {"featureFlags": [{"key": "use_main_text_markdown", "value": "true"}]}
    item(world.store, ["*one*", "*two*"], {**flags, "markSegments": True}, most=1)
    lease = (await http.post("/vote/lease", headers=token(world, "rater"))).json()
    assert lease["segments"] is True
    assert "leftHtml" not in lease


async def test_a_gold_pair_looks_like_any_other_and_its_marks_are_not_kept(world: World) -> None:
    item_id = item(world.store)
    flow_id = world.store.item(item_id).flow_id
    gold.set_pairs(world.store, flow_id, [gold.GoldPair("Is 4 even?", "Yes.", "No, never.")])
    with world.store.now() as (db, now):
        rater = world.rater()
        pair = gold.draw(db, flow_id, rater, now, 90, random.Random(1))
    assert pair is not None
    assert voting.vote(world.store, pair.id, rater, "left", 5, [CastSegment(side="left", start=0, end=2, good=True)])
    assert world.store.votes() == []


async def test_marks_are_put_on_the_text_they_were_made_in_whatever_the_order_of_the_answer(world: World) -> None:
    item_id = item(world.store)
    mark(world, "longer", good=True)
    world.store.stop(item_id)

    def turned(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if not request.url.path.endswith("/segments"):
            return None
        body = response.json()
        marks = [{**m, "candidate": 1 - m["candidate"]} for m in body["segments"]]
        return httpx.Response(200, json={"index": body["index"][::-1], "segments": marks})

    world.transport.after = turned
    client = world.client()
    assert await client.segments(item_id, TEXTS) == (Segment(1, 2, 8, True),)
    await client.close()


@pytest.mark.parametrize(
    "change",
    [
        {"index": ["short"]},
        {"index": ["short", "something else"], "sortIndex": None},
        {"segments": [{"candidate": 2, "start": 0, "end": 1, "good": True}]},
        {"segments": [{"candidate": 0, "start": 0, "end": 6, "good": True}]},
        {"segments": [{"candidate": 0, "start": 3, "end": 3, "good": True}]},
        {"segments": [{"candidate": 0, "start": -3, "end": 3, "good": True}]},
        {"segments": [{"candidate": 0, "start": 0, "end": 1}]},
    ],
    ids=str,
)
async def test_marks_that_are_not_in_the_texts_are_a_bad_answer(world: World, change: dict[str, Any]) -> None:
    item_id = item(world.store)
    world.store.stop(item_id)

    def changed(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        return httpx.Response(200, json=response.json() | change) if request.url.path.endswith("/segments") else None

    world.transport.after = changed
    client = world.client()
    with pytest.raises(BadAnswer):
        await client.segments(item_id, TEXTS)
    await client.close()


async def test_a_flow_that_asks_for_marks_is_another_flow(world: World) -> None:
    client = world.client()
    plain = FlowSpec(MARKED.name, MARKED.instruction, MARKED.responses, MARKED.ttl_s)
    assert plain.fingerprint() != MARKED.fingerprint()
    flow_id = await client.open_flow(MARKED)
    assert world.store.flow_settings(flow_id)["markSegments"] is True
    assert await client.asks(flow_id, MARKED)
    assert not await client.asks(flow_id, plain)
    await client.update_flow(flow_id, plain)
    assert not await client.asks(flow_id, MARKED)
    assert await client.find_flow(MARKED) is None
    await client.close()


def test_a_service_whose_raters_cannot_mark_is_refused_before_anything_is_paid(world: World) -> None:
    with pytest.raises(FlowRefused, match=r"run_online\.segments is set"):
        mapping("rapidata", RAPIDATA, FlowSpec("r", "?", Responses(2, 2, 2), 60, segments=True), 2, None)
    assert "markSegments true" in [row.sent for row in mapping("x", OURS, MARKED, 2, None)]
    assert "markSegments true" not in [row.sent for row in mapping("x", OURS, SPEC, 2, None)]
    feedback = VotesFeedback(lambda: world.client(PLAIN), world.open_flow(), MARKED, lambda event: None, run_id="run")
    with pytest.raises(FlowRefused, match=r"run_online\.segments"):
        until(lambda: feedback.collect())
    feedback.close()
    assert world.item_ids() == []


class Run:
    """A feedback that asks for marks, and the journal it writes."""

    def __init__(self, world: World, disk: list[Event], flow_id: str, **terms: Any) -> None:
        self.notes: list[str] = []
        settings = {"run_id": "run", "poll_s": 0.005, "settle_s": 0.0, "note": self.notes.append, **terms}
        self.feedback = VotesFeedback(world.client, flow_id, MARKED, disk.append, **settings)
        self.decided: list[RankedGroup | Unranked] = []

    def ranked(self) -> RankedGroup:
        def there() -> bool:
            self.decided.extend(self.feedback.collect())
            return bool(self.decided)

        until(there)
        self.feedback.close()
        (one,) = self.decided
        assert isinstance(one, RankedGroup)
        return one


def marked_flow(world: World) -> str:
    spec = MARKED
    return world.store.create_flow(spec.title, spec.instruction, spec.responses, settings={"markSegments": True})


def asked(world: World, disk: list[Event], texts: list[str], **terms: Any) -> Run:
    run = Run(world, disk, marked_flow(world), **terms)
    one = group(0, texts)
    disk.append(GroupSampled.of(one))
    run.feedback.submit(one)
    until(lambda: len(world.item_ids()) == 1)
    return run


def test_marks_of_all_raters_arrive_with_the_group_at_their_places_in_the_completions(world: World) -> None:
    disk: list[Event] = []
    run = asked(world, disk, ["  short", "", "a longer text", "short"])
    mark(world, "short", good=True)
    mark(world, "longer", good=False)
    ranked = run.ranked()
    # The first completion was shown without the blanks at its start.
    assert ranked.segments == (Segment(0, 2, 7, True), Segment(2, 2, 8, False))
    assert ranked.group.completions[0].text[2:7] == "short"
    (event,) = [event for event in disk if isinstance(event, GroupRanked)]
    assert event.ranked(ranked.group) == ranked
    assert replay(Entry(i, 0.0, e) for i, e in enumerate(disk)).groups["g0"].ranked == event


def test_marks_of_a_first_ask_survive_a_death_before_the_second_ends(world: World) -> None:
    disk: list[Event] = []
    run = asked(world, disk, TEXTS, incomplete="resubmit_once")
    mark(world, "short", good=True)
    world.store.stop(world.item_ids()[0])
    until(lambda: len(world.item_ids()) == 2)
    run.feedback.close()
    (ended,) = [event for event in disk if isinstance(event, ItemEnded)]
    assert ended.segments == ((0, 0, 5, True),)
    flow_id = world.store.item(world.item_ids()[0]).flow_id
    again = Run(world, disk, flow_id, incomplete="resubmit_once")
    again.feedback.resume(replay(Entry(i, 0.0, e) for i, e in enumerate(disk)).groups.values())
    mark(world, "longer", good=True)
    mark(world, "longer", good=True)
    ranked = again.ranked()
    assert set(ranked.segments) == {Segment(0, 0, 5, True), Segment(1, 2, 8, True)}
    assert len(ranked.segments) == 3


def test_votes_train_without_marks_where_these_make_no_sense(world: World) -> None:
    run = asked(world, [], TEXTS)

    def nonsense(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if not request.url.path.endswith("/segments") or response.status_code != 200:
            return None
        marks = [{"candidate": 0, "start": 0, "end": 999, "good": True}]
        return httpx.Response(200, json=response.json() | {"segments": marks})

    world.transport.after = nonsense
    world.vote(2)
    ranked = run.ranked()
    assert ranked.wins.votes == 2
    assert ranked.segments == ()
    assert any("train without marks" in note for note in run.notes)


def test_a_group_of_two_items_that_end_together_is_decided_once_with_the_marks_of_both(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_on = world.transport.handle_async_request

    async def slow_marks(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/segments"):
            while world.transport.count("GET", "/vote-matrix") < 2:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)  # the other item's votes are taken meanwhile
        return await pass_on(request)

    monkeypatch.setattr(world.transport, "handle_async_request", slow_marks)
    ours, disk = Clock(), list[Event]()
    run = asked(world, disk, TEXTS, clock=ours)
    until(lambda: any(isinstance(event, GroupSubmitted) for event in disk))
    (older,) = world.item_ids()
    mark(world, "short", good=True)
    clock.advance(0.1)
    (dataset_id,) = [event.dataset_id for event in disk if isinstance(event, DatasetCreated)]
    world.store.create_item(world.store.item(older).flow_id, dataset_id, "Why?", 60)

    def ends_with_the_other(request: httpx.Request) -> None:
        if request.url.path.endswith("/stop"):
            world.store.stop(older)

    world.transport.before = ends_with_the_other
    ours.advance(SWEEP_S + 1)
    ranked = run.ranked()  # one of them
    assert ranked.segments == (Segment(0, 0, 5, True),)
    assert len([event for event in disk if isinstance(event, GroupRanked)]) == 1


def test_marks_that_a_service_does_not_show_yet_are_waited_for(world: World) -> None:
    run = asked(world, [], TEXTS)
    early: list[httpx.Request] = []

    def not_yet(request: httpx.Request) -> httpx.Response | None:
        if not request.url.path.endswith("/segments") or len(early) == 3:
            return None
        early.append(request)
        return httpx.Response(409, json={"title": "the item still runs"})

    world.transport.before = not_yet
    mark(world, "short", good=True)
    mark(world, "longer", good=True)
    assert len(run.ranked().segments) == 2
    assert len(early) == 3


def test_votes_train_without_marks_that_a_service_never_shows(world: World) -> None:
    ours = Clock()
    run = asked(world, [], TEXTS, clock=ours)
    early: list[httpx.Request] = []

    def never(request: httpx.Request) -> httpx.Response | None:
        if not request.url.path.endswith("/segments"):
            return None
        early.append(request)
        return httpx.Response(409, json={"title": "the item still runs"})

    world.transport.before = never
    world.vote(2)
    until(lambda: len(early) > 2)
    ours.advance(MARKED.ttl_s + DRAIN_S + SLACK_S + 1)
    ranked = run.ranked()
    assert (ranked.wins.votes, ranked.segments) == (2, ())
    assert any("train without marks" in note for note in run.notes)
