"""One client, the same promises, at our server and at a strict stand-in for the vendor's service.

The stand-in is there four times, once for each way in which the vendor may label candidates, which is not documented.
After every test no request may have been outside the documented protocol.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from services import TTL_S, Ours, Service, Theirs, ask, ask_many, png
from vendor import Vendor
from virtual_time import VirtualLoop, run_virtually

from rlhf_cli.errors import FlowRefused, FlowUnavailable
from rlhf_cli.flow.base import BadAnswer, FlowSpec, ImageFile, ImageUrl, ItemState, Responses
from rlhf_cli.flow.bodies import keep_bodies
from rlhf_cli.flow.client import UPLOAD_S, FlowClient
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.mapping import mapping

SPEC = FlowSpec("helpful", "Which answer is more helpful?", Responses(2, 6, 6), ttl_s=TTL_S)
TEXTS = ["a", "bb", "ccc", "dddd"]
VENDOR_LABELS = ("identifier", "text", "unique", "datapoint")


@pytest.fixture(params=["ours", *(f"vendor-{labels}" for labels in VENDOR_LABELS)])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    made = Ours(tmp_path) if request.param == "ours" else Theirs(request.param.partition("-")[2])
    yield made
    assert made.violations == []
    if isinstance(made, Ours):
        made.store.close()


# A group, from its texts to its votes.


async def test_votes_come_back_in_the_callers_order_and_not_before_the_end(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await ask(client, flow_id, TEXTS)
    service.start()
    service.vote(item_id, 4)
    assert await client.vote_matrix(item_id, TEXTS) is None  # 409
    assert await client.results(item_id, TEXTS) is None
    assert (await client.statuses(flow_id, [item_id]))[item_id].state is ItemState.RUNNING

    service.vote(item_id, 2)  # the maximum

    assert (await client.statuses(flow_id, [item_id]))[item_id].state is ItemState.COMPLETED
    matrix = await client.vote_matrix(item_id, TEXTS)
    assert matrix is not None
    assert matrix.wins.tolist() == service.truth(item_id).tolist()
    assert matrix.votes == 6
    await client.close()


async def test_the_services_own_scores_come_in_the_callers_order_with_as_many_votes(service: Service) -> None:
    client = service.client()
    item_id = await ask(client, await client.open_flow(SPEC), TEXTS)
    service.start()
    service.vote(item_id, 6)

    results = await client.results(item_id, TEXTS)

    assert results is not None
    assert results.votes == 6
    truth = service.truth(item_id)
    balance, elo = truth.sum(1) - truth.sum(0), np.array(results.elo)
    assert elo[balance.argmax()] > elo[balance.argmin()]
    await client.close()


async def test_texts_arrive_as_they_are_whatever_is_in_them(service: Service) -> None:
    texts = ["\u202ereversed", '<script>alert("x")</script>', "line\nline\ttab", "nul\x00 nul", "😀" * 100, "rlhf:x:0"]
    client = service.client()
    item_id = await ask(client, await client.open_flow(SPEC), texts)
    service.start()
    service.vote(item_id, 6)

    matrix = await client.vote_matrix(item_id, texts)

    assert matrix is not None
    assert matrix.wins.tolist() == service.truth(item_id).tolist()
    await client.close()


async def test_identical_texts_stay_apart_or_their_votes_are_refused(service: Service) -> None:
    texts = ["same", "same", "other", "same (2)"]
    client = service.client()
    item_id = await ask(client, await client.open_flow(SPEC), texts)
    service.start()
    service.vote(item_id, 6)
    if isinstance(service, Theirs) and service.vendor.labels != "identifier":
        # A service that drops our identifiers leaves nothing to tell them by; nobody guesses.
        with pytest.raises(BadAnswer, match="Nothing was learned"):
            await client.vote_matrix(item_id, texts)
    else:
        matrix = await client.vote_matrix(item_id, texts)
        assert matrix is not None
        assert matrix.wins.tolist() == service.truth(item_id).tolist()
    await client.close()


async def test_a_client_that_knows_only_the_item_reads_the_same_votes(service: Service) -> None:
    first = service.client()
    item_id = await ask(first, await first.open_flow(SPEC), TEXTS)
    await first.close()
    service.start()
    service.vote(item_id, 6)

    second = service.client()
    matrix = await second.vote_matrix(item_id, TEXTS)

    assert matrix is not None
    assert matrix.wins.tolist() == service.truth(item_id).tolist()
    with pytest.raises(BadAnswer):
        await second.vote_matrix(item_id, TEXTS[:3])
    await second.close()


@pytest.mark.parametrize("what", ["vote-matrix", "results"])
async def test_a_candidate_that_got_lost_on_the_way_back_is_noticed(service: Service, what: str) -> None:
    client = service.client()
    item_id = await ask(client, await client.open_flow(SPEC), TEXTS)
    service.start()
    service.vote(item_id, 6)

    def lose(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if not request.url.path.endswith(what):
            return None
        body = response.json()
        for key in ("index", "columns", "data", "datapoints", "sortIndex"):
            if key in body:
                body[key] = body[key][1:]
        body["data"] = [row[1:] for row in body.get("data", [])]
        return httpx.Response(200, json=body)

    service.transport.after = lose
    with pytest.raises(BadAnswer, match="4 candidates were sent"):
        await (client.vote_matrix if what == "vote-matrix" else client.results)(item_id, TEXTS)
    await client.close()


async def test_a_candidate_that_got_lost_on_the_way_in_is_noticed_before_anybody_is_asked(service: Service) -> None:
    client = service.client()
    dataset_id = await client.create_dataset("one", "key")
    first: list[httpx.Response] = []

    def same_answer(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if request.url.path.endswith("/datapoint"):
            first.append(response)
            return httpx.Response(200, content=first[0].content)
        return None

    service.transport.after = same_answer
    with pytest.raises(BadAnswer, match=r"4 candidates were put into dataset .* and 1 arrived"):
        await client.fill_dataset(dataset_id, TEXTS)
    await client.close()


# Images.


async def test_local_images_are_uploaded_and_ranked_without_telling_where_they_were(
    service: Service, tmp_path: Path
) -> None:
    files = [tmp_path / f"{who}" / "the answer.PNG" for who in ("alice", "bob", "carol")]
    for shade, file in enumerate(files):
        file.parent.mkdir()
        file.write_bytes(png(shade))
    images = [ImageFile(file) for file in files]
    client = service.client()
    item_id = await ask(client, await client.open_flow(SPEC), [*images])
    service.start()
    service.vote(item_id, 6)

    matrix, results = await client.vote_matrix(item_id, images), await client.results(item_id, images)

    assert matrix is not None
    assert matrix.wins.tolist() == service.truth(item_id).tolist()
    assert results is not None
    assert len(results.elo) == 3
    assert [service.image(item_id, i) for i in range(3)] == [f"candidate-{i}.png" for i in range(3)]
    assert not any(b"alice" in request.content for request in service.transport.requests)
    await client.close()


async def test_images_by_address_are_fetched_by_the_service_or_refused_with_a_reason(service: Service) -> None:
    images = [ImageUrl(f"https://example.org/{name}.png") for name in "cab"]
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    if not service.fetches_urls:
        with pytest.raises(FlowRefused, match="upload their bytes"):
            await ask(client, flow_id, [*images])
    else:
        item_id = await ask(client, flow_id, [*images])
        service.start()
        service.vote(item_id, 6)
        matrix = await client.vote_matrix(item_id, images)
        assert matrix is not None
        assert matrix.wins.tolist() == service.truth(item_id).tolist()
        assert [service.image(item_id, i) for i in range(3)] == [image.url for image in images]
    await client.close()


async def test_one_address_twice_and_a_file_that_is_not_there_are_refused_before_anything_is_sent(
    service: Service, tmp_path: Path
) -> None:
    client = service.client()
    with pytest.raises(FlowRefused, match="same image address"):
        await client.fill_dataset("dts_1", [ImageUrl("https://example.org/a.png")] * 2)
    with pytest.raises(FlowRefused, match=r"missing\.png cannot be read"):
        await client.add_datapoint("dts_1", 0, ImageFile(tmp_path / "missing.png"))
    assert service.transport.count("POST", "/datapoint") == 0
    await client.close()


def test_images_that_never_arrive_are_given_up_at_a_deadline_and_their_upload_is_aborted() -> None:
    async def upload() -> tuple[Vendor, float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        vendor = Vendor(loop.wall, upload_s=1e6)
        credentials = Credentials(vendor.client_id, vendor.client_secret)
        client = FlowClient.rapidata(credentials, domain=vendor.domain, transport=vendor.transport(), clock=loop.time)
        dataset_id = await client.create_dataset("one", "key")
        began = loop.time()
        with pytest.raises(FlowUnavailable, match="did not fetch 1 images within 300 s"):
            await client.fill_dataset(dataset_id, [ImageUrl("https://example.org/slow.png")])
        await client.close()
        return vendor, loop.time() - began

    vendor, waited_s = run_virtually(upload())
    assert waited_s == pytest.approx(UPLOAD_S, abs=1)
    assert [upload["aborted"] for upload in vendor.uploads.values()] == [True]
    assert vendor.violations == []


# How an item ends.


@pytest.mark.parametrize(
    ("votes", "state"), [(0, ItemState.INCOMPLETE), (1, ItemState.INCOMPLETE), (3, ItemState.COMPLETED)]
)
async def test_at_the_end_of_its_time_an_item_shows_the_votes_it_has(
    service: Service, votes: int, state: ItemState
) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await ask(client, flow_id, TEXTS)
    service.start()
    service.vote(item_id, votes)

    service.clock.advance(TTL_S + 1)

    assert (await client.statuses(flow_id, [item_id]))[item_id].state is state
    matrix = await client.vote_matrix(item_id, TEXTS)
    assert matrix is not None
    assert matrix.votes == votes
    assert matrix.wins.tolist() == service.truth(item_id).tolist()
    await client.close()


async def test_a_stopped_item_ends_at_once_and_shows_the_votes_it_has(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await ask(client, flow_id, TEXTS)
    service.start()
    service.vote(item_id, 3)

    await client.stop(item_id)
    await client.stop(item_id)  # safe to repeat

    assert (await client.statuses(flow_id, [item_id]))[item_id].state in (ItemState.STOPPING, ItemState.STOPPED)
    service.finish_stop()
    assert (await client.statuses(flow_id, [item_id]))[item_id].state is ItemState.STOPPED
    matrix = await client.vote_matrix(item_id, TEXTS)
    assert matrix is not None
    assert matrix.votes == 3
    await client.close()


async def test_an_item_that_the_service_does_not_know_is_left_out(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await ask(client, flow_id, TEXTS)
    assert (await client.statuses(flow_id, [item_id, "fli_unknown"])).keys() == {item_id}
    assert (await client.statuses(flow_id, [item_id, "fli_1", "fli_2", "fli_3"])).keys() == {item_id}
    await client.close()


async def test_a_failed_item_says_why_and_has_no_votes() -> None:
    service = Theirs("identifier")
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await ask(client, flow_id, TEXTS)
    service.vendor.items[item_id].failure = "no workflow"

    status = (await client.statuses(flow_id, [item_id]))[item_id]

    assert (status.state, status.failure) == (ItemState.FAILED, "no workflow")
    assert await client.vote_matrix(item_id, TEXTS) is None
    assert service.violations == []
    await client.close()


# Many items.


async def test_hundreds_of_items_cost_a_request_for_each_hundred(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    ids = await ask_many(client, flow_id, 250)
    before = len(service.transport.requests)

    assert (await client.statuses(flow_id, ids)).keys() == set(ids)

    assert len(service.transport.requests) - before == 3
    await client.close()


async def test_old_items_that_still_run_are_found_behind_hundreds_that_ended(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    old = await ask_many(client, flow_id, 20, "old")
    service.clock.advance(1)
    for item_id in await ask_many(client, flow_id, 250, "new"):
        await client.stop(item_id)
    service.finish_stop()
    before = len(service.transport.requests)

    statuses = await client.statuses(flow_id, old)

    assert {status.state for status in statuses.values()} <= {ItemState.PENDING, ItemState.RUNNING}
    assert statuses.keys() == set(old)
    assert len(service.transport.requests) - before == 3  # two newest pages, one page of those that run
    await client.close()


async def test_the_newest_items_come_first_and_an_item_is_found_by_its_dataset(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    ids = []
    for number in range(4):
        ids.append(await ask(client, flow_id, TEXTS, f"item {number}"))
        service.clock.advance(1)

    newest = await client.newest_items(flow_id)

    assert [status.item_id for status in newest] == ids[::-1]
    for status in newest:
        found = await client.find_item(flow_id, status.dataset_id)
        assert found is not None
        assert found.item_id == status.item_id
    assert await client.find_item(flow_id, "dts_unknown") is None
    await client.close()


# Flows.


async def test_the_same_question_finds_its_flow_again_and_a_changed_one_does_not(service: Service) -> None:
    client = service.client()
    assert await client.find_flow(SPEC) is None
    flow_id = await client.open_flow(SPEC)
    assert await client.find_flow(SPEC) == flow_id
    assert await client.find_flow(replace(SPEC, instruction="Which is kinder?")) is None
    assert await client.find_flow(replace(SPEC, responses=Responses(1, 6, 6))) is None
    await client.close()


async def test_a_flow_that_was_changed_asks_otherwise_from_then_on_and_is_not_adopted(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    before = await ask(client, flow_id, TEXTS, "before")
    for changed in (replace(SPEC, instruction="Which is kinder?"), replace(SPEC, responses=Responses(1, 6, 6))):
        await client.update_flow(flow_id, changed)
        assert not await client.asks(flow_id, SPEC)
        assert await client.asks(flow_id, changed)

    fewer = replace(SPEC, responses=Responses(2, 5, 6))
    await client.update_flow(flow_id, fewer)
    assert await client.asks(flow_id, fewer)
    # A service that knows no desired number asks both the same.
    assert await client.asks(flow_id, SPEC) != (await client.capabilities()).desired

    await client.update_flow(flow_id, replace(SPEC, instruction="Which is kinder?", responses=Responses(1, 2, 2)))

    assert await client.find_flow(SPEC) is None
    service.start()
    service.vote(before, 6)  # which goes by what held when it was made
    assert (await client.statuses(flow_id, [before]))[before].votes in (6, None)
    after = await ask(client, flow_id, TEXTS, "after")
    service.start()
    service.vote(after, 2)
    assert (await client.statuses(flow_id, [after]))[after].state is ItemState.COMPLETED
    await client.close()


# Tokens.


async def test_a_token_is_renewed_before_it_ends_and_once_when_the_service_forgot_it(service: Service) -> None:
    seconds = [0.0]
    client = service.client(clock=lambda: seconds[0])
    await client.open_flow(SPEC)
    seconds[0] += 3590  # ten seconds before its end
    await client.open_flow(SPEC)
    assert service.transport.count("POST", "/connect/token") == 2

    service.clock.advance(3601)  # over at the service, good for an hour by our clock
    await client.open_flow(SPEC)

    assert service.transport.count("POST", "/connect/token") == 3
    await client.close()


# Capabilities: each one that is claimed can be seen, each one that is not claimed is not there.


async def test_a_creation_is_repeated_safely_exactly_where_that_is_claimed(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    dataset_id = await client.create_dataset("one", "dataset")
    await client.fill_dataset(dataset_id, TEXTS)
    made = {await client.create_item(flow_id, dataset_id, "", TTL_S, "key") for _ in range(2)}
    assert (len(made) == 1) == (await client.capabilities()).idempotency
    keys = [request for request in service.transport.requests if "Idempotency-Key" in request.headers]
    assert bool(keys) == (await client.capabilities()).idempotency
    await client.close()


async def test_an_item_ends_at_the_desired_votes_exactly_where_that_is_claimed(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(replace(SPEC, responses=Responses(2, 4, 6)))
    item_id = await ask(client, flow_id, TEXTS)
    service.start()
    service.vote(item_id, 4)
    ended = (await client.statuses(flow_id, [item_id]))[item_id].state.terminal
    assert ended == (await client.capabilities()).desired
    await client.close()


async def test_votes_are_shown_while_they_come_in_exactly_where_that_is_claimed(service: Service) -> None:
    client = service.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await ask(client, flow_id, TEXTS)
    service.start()
    service.vote(item_id, 3)
    matrix = await client.vote_matrix(item_id, TEXTS, partial=True)
    status = (await client.statuses(flow_id, [item_id]))[item_id]
    if (await client.capabilities()).live_votes:
        assert matrix is not None
        assert matrix.wins.tolist() == service.truth(item_id).tolist()
        assert status.votes == 3
    else:
        assert matrix is None
        assert status.votes is None
    await client.close()


async def test_what_was_said_about_ended_items_is_kept_word_for_word_raw_votes_where_claimed(
    service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "flow" / "bodies.jsonl"
    client = service.client(on_body=keep_bodies(path))
    item_id = await ask(client, await client.open_flow(SPEC), TEXTS)
    service.start()
    service.vote(item_id, 3)
    await client.vote_matrix(item_id, TEXTS)
    await client.vote_matrix(item_id, TEXTS, partial=True)
    assert not path.exists()  # only once it has ended
    service.vote(item_id, 3)

    await client.vote_matrix(item_id, TEXTS)
    await client.results(item_id, TEXTS)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["item_id"] for row in rows} == {item_id}
    assert all(row.keys() == {"at", "kind", "item_id", "body"} for row in rows)
    bodies = {row["kind"]: json.loads(row["body"]) for row in rows}
    assert sum(map(sum, bodies["vote-matrix"]["data"])) == bodies["results"]["totalVotes"] == 6
    assert ("votes" in bodies) == (await client.capabilities()).raw_votes
    if "votes" in bodies:
        assert bodies["votes"]["total"] == len(bodies["votes"]["items"]) == 6
    assert not any(secret in path.read_text() for secret in service.credentials.secrets)
    await client.close()


async def test_raw_votes_that_make_no_sense_do_not_cost_the_votes(service: Service, tmp_path: Path) -> None:
    client = service.client(on_body=keep_bodies(tmp_path / "bodies.jsonl"))
    item_id = await ask(client, await client.open_flow(SPEC), TEXTS)
    service.start()
    service.vote(item_id, 6)
    service.transport.after = lambda request, response: (
        httpx.Response(200, text="<html>") if request.url.path.endswith("/votes") else None
    )

    matrix = await client.vote_matrix(item_id, TEXTS)

    assert matrix is not None
    assert matrix.wins.tolist() == service.truth(item_id).tolist()
    kept = "<html>" in (tmp_path / "bodies.jsonl").read_text()
    assert kept == (await client.capabilities()).raw_votes
    await client.close()


async def test_preheating_reaches_a_service_exactly_where_that_is_claimed(service: Service) -> None:
    client = service.client()
    await client.preheat()
    assert service.transport.count("POST", "/boost/preheat") == (await client.capabilities()).preheat
    await client.close()


async def test_bounds_are_taken_and_what_is_beyond_them_is_refused_before_it_is_sent(service: Service) -> None:
    client = service.client()
    can = await client.capabilities()
    flow_id = await client.open_flow(SPEC)
    for number, ttl_s in enumerate((max(can.ttl_min_s, 1), can.ttl_max_s)):
        await ask(client, flow_id, TEXTS, f"item {number}", ttl_s=ttl_s)
        mapping("the service", can, replace(SPEC, ttl_s=ttl_s), 4)
    for ttl_s in (can.ttl_min_s - 1, can.ttl_max_s + 1):
        with pytest.raises(FlowRefused, match=r"the service: flow\.ttl_s"):
            mapping("the service", can, replace(SPEC, ttl_s=ttl_s), 4)
    if can.max_candidates is not None:
        await ask(client, flow_id, [str(n) for n in range(can.max_candidates)], "most")
        with pytest.raises(FlowRefused, match=f"{can.max_candidates} here"):
            mapping("the service", can, SPEC, can.max_candidates + 1)
    await client.close()


async def test_the_figures_on_the_connection_count_every_request(service: Service) -> None:
    client = service.client()
    await client.open_flow(SPEC)
    health = client.health()
    assert health.keys() == {
        "flow/circuit_open",
        "flow/unreachable_s",
        "flow/requests_total",
        "flow/retries_total",
    }
    assert health["flow/requests_total"] == len(service.transport.requests)
    assert (health["flow/circuit_open"], health["flow/unreachable_s"], health["flow/retries_total"]) == (0, 0, 0)
    await client.close()
