"""The real client against the real server, in one process, on a clock turned by hand."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from flow_world import PLAIN, SPEC, Clock, World

from rlhf_cli.errors import CredentialsError, FlowRefused
from rlhf_cli.flow.base import Capabilities, FlowSpec, ItemState, Responses
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.wire import OURS
from rlhf_cli.server.app import create_app
from rlhf_cli.server.store import Store

TEXTS = ["a", "bb", "ccc", "dddd"]


async def test_a_group_becomes_an_item_and_its_votes_come_back_in_the_callers_order(world: World) -> None:
    client = world.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await world.item(client, flow_id, TEXTS)

    assert await client.vote_matrix(item_id, TEXTS) is None  # not before the end
    world.vote(4)

    status = (await client.statuses(flow_id, [item_id]))[item_id]
    assert (status.state, status.votes) == (ItemState.COMPLETED, 4)
    assert await client.vote_matrix(item_id, TEXTS) == world.store.matrix(item_id)
    assert [c.text for c in world.store.candidates(item_id)] == TEXTS  # they arrived in any order
    await client.close()


async def test_our_server_is_asked_what_it_can_do_and_shows_votes_while_they_come_in(world: World) -> None:
    client = world.client()
    assert await client.capabilities() == OURS
    flow_id = await client.open_flow(SPEC)
    item_id = await world.item(client, flow_id, TEXTS)
    world.vote(1)

    matrix = await client.vote_matrix(item_id, TEXTS, partial=True)

    assert matrix is not None
    assert matrix.votes == 1
    assert (await client.statuses(flow_id, [item_id]))[item_id].votes == 1
    await client.close()


async def test_a_service_without_a_capability_document_is_taken_to_have_none(world: World) -> None:
    world.transport.before = lambda r: httpx.Response(404) if "well-known" in r.url.path else None
    client = world.client()
    assert await client.capabilities() == Capabilities()
    await client.close()


async def test_the_same_question_finds_its_flow_again_and_a_changed_one_does_not(world: World) -> None:
    client = world.client()
    assert await client.find_flow(SPEC) is None
    flow_id = await client.open_flow(SPEC)

    assert await client.find_flow(SPEC) == flow_id
    assert await client.find_flow(FlowSpec(SPEC.name, "Which is kinder?", SPEC.responses, SPEC.ttl_s)) is None
    assert await client.find_flow(FlowSpec(SPEC.name, SPEC.instruction, Responses(1, 4, 6), SPEC.ttl_s)) is None
    await client.close()


async def test_repeated_creations_with_one_key_make_one_item(world: World) -> None:
    client = world.client()
    flow_id = await client.open_flow(SPEC)
    ids = [await world.item(client, flow_id, TEXTS) for _ in range(3)]

    assert len(set(ids)) == 1
    assert world.item_ids() == ids[:1]
    with pytest.raises(FlowRefused, match="another body"):
        await client.create_item(flow_id, "dts_other", "What is a river?", 60, "key-item")
    await client.close()


async def test_without_keys_an_item_is_found_by_its_dataset(world: World) -> None:
    client = world.client(PLAIN)
    flow_id = await client.open_flow(SPEC)
    await world.item(client, flow_id, TEXTS)
    dataset_id = await client.create_dataset("other", "unused")
    assert await client.find_item(flow_id, dataset_id) is None
    await asyncio.gather(*(client.add_datapoint(dataset_id, i, text) for i, text in enumerate(TEXTS)))
    item_id = await client.create_item(flow_id, dataset_id, "", 60, "unused")

    found = await client.find_item(flow_id, dataset_id)

    assert found is not None
    assert found.item_id == item_id
    assert "Idempotency-Key" not in world.transport.requests[-2].headers
    await client.close()


async def test_many_items_are_looked_at_with_one_list_request(world: World) -> None:
    client = world.client(PLAIN)
    flow_id = await client.open_flow(SPEC)
    ids = [await world.item(client, flow_id, TEXTS) for _ in range(40)]
    before = len(world.transport.requests)

    statuses = await client.statuses(flow_id, [*ids, "fli_unknown"])

    assert statuses.keys() == set(ids)
    assert len(world.transport.requests) - before == 2  # one page, and the unknown one by itself
    await client.close()


async def test_a_stopped_item_shows_the_votes_it_has(world: World) -> None:
    client = world.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await world.item(client, flow_id, TEXTS)
    world.vote(1)

    await client.stop(item_id)
    await client.stop(item_id)  # safe to repeat

    assert (await client.statuses(flow_id, [item_id]))[item_id].state is ItemState.STOPPED
    matrix = await client.vote_matrix(item_id, TEXTS)
    assert matrix is not None
    assert matrix.votes == 1
    await client.close()


async def test_an_item_without_enough_votes_ends_incomplete_after_its_ttl(world: World, clock: Clock) -> None:
    client = world.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await world.item(client, flow_id, TEXTS, ttl_s=60)
    world.vote(1)

    clock.advance(61)

    assert (await client.statuses(flow_id, [item_id]))[item_id].state is ItemState.INCOMPLETE
    matrix = await client.vote_matrix(item_id, TEXTS)
    assert matrix is not None
    assert matrix.votes == 1  # partial, kept, never turned into a zero
    await client.close()


async def test_an_old_token_is_replaced_before_it_expires(world: World, clock: Clock) -> None:
    client = world.client(PLAIN)
    await client.open_flow(SPEC)
    clock.advance(3000)
    await client.open_flow(SPEC)
    assert world.transport.count("POST", "/connect/token") == 1

    clock.advance(550)  # 50 s of its hour are left
    await client.open_flow(SPEC)

    assert world.transport.count("POST", "/connect/token") == 2
    await client.close()


async def test_wrong_credentials_are_named_by_where_they_came_from_and_never_shown(store: Store) -> None:
    credentials = Credentials("client_x", "top-secret", origin="$RLHF_ID and $RLHF_SECRET")
    client = FlowClient("http://localhost", credentials, transport=httpx.ASGITransport(app=create_app(store)))

    with pytest.raises(CredentialsError, match=r"RLHF_SECRET") as caught:
        await client.open_flow(SPEC)

    assert "top-secret" not in str(caught.value)
    assert "top-secret" not in repr(credentials)
    await client.close()


async def test_a_token_given_as_it_is_works_without_a_token_request(world: World) -> None:
    access = world.store.tokens.issue_access(world.credentials.client_id, world.credentials.client_secret)
    assert access is not None
    client = FlowClient("http://localhost", Credentials(token=access), transport=world.transport)
    await client.open_flow(SPEC)
    assert world.transport.count("POST", "/connect/token") == 0
    await client.close()


async def test_the_results_use_the_labels_and_the_votes_of_the_matrix(world: World) -> None:
    client = world.client()
    flow_id = await client.open_flow(SPEC)
    item_id = await world.item(client, flow_id, ["same", "same", "longer", "same (2)"])
    world.vote(4)
    access = world.store.tokens.issue_access(world.credentials.client_id, world.credentials.client_secret)
    headers = {"Authorization": f"Bearer {access}"}
    async with httpx.AsyncClient(transport=world.transport, base_url="http://localhost", headers=headers) as http:
        results = (await http.get(f"/flow/ranking/item/{item_id}/results")).json()
        matrix = (await http.get(f"/flow/ranking/item/{item_id}/vote-matrix")).json()

    names = [row["asset"]["identifier"] for row in results["datapoints"]]
    assert names == matrix["index"] == matrix["columns"] == ["same", "same (3)", "longer", "same (2)"]
    assert results["totalVotes"] == sum(map(sum, matrix["data"])) == 4
    assert all(isinstance(row["elo"], int) for row in results["datapoints"])
    assert max(results["datapoints"], key=lambda row: row["elo"])["asset"]["text"] != "same"
    await client.close()
