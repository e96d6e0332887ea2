"""The rest of the ranking-flow protocol, and what is ours beyond it: goals, images, intervals, raw votes, figures."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flow_world import SPEC, Clock, World, open_item, take

from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.server.app import create_app
from rlhf_cli.server.store import Store

PNG, JPEG, GIF, WEBP = b"\x89PNG\r\n\x1a\n1", b"\xff\xd8\xff1", b"GIF89a1", b"RIFF1234WEBP1"


@pytest.fixture
def world(tmp_path: Path, clock: Clock) -> World:
    """On disk, since images need a folder."""
    return World(Store(tmp_path / "server.sqlite", clock=clock, rng=random.Random(7)), clock, None, None)  # type: ignore[arg-type]


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    _, secret = world.store.tokens.add("owner", "owner")
    transport = httpx.ASGITransport(app=create_app(world.store))
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
        yield http
    world.store.close()


async def flow_with(http: httpx.AsyncClient, **members: Any) -> str:
    reply = await http.post("/flow/ranking", json={"name": "f", "criteria": "Which?", **members})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["flowId"])


@pytest.mark.parametrize("path", ["/flow/ranking/{}", "/flow/ranking/{}/config"])
async def test_a_flow_is_changed_for_later_items_alone(http: httpx.AsyncClient, world: World, path: str) -> None:
    flow_id = await flow_with(http, minResponses=2, maxResponses=8, serveResponses=4, serveTimeoutSeconds=20)
    before = world.store.create_item(flow_id, two_texts(world), "", 60)

    change = {"criteria": "Now?", "maxResponses": 10, "serveTimeoutSeconds": None, "goal": "best"}
    assert (await http.patch(path.format(flow_id), json=change)).status_code == 204

    after = world.store.create_item(flow_id, two_texts(world), "", 60)
    old, new = world.store.item(before), world.store.item(after)
    assert (old.instruction, old.responses, old.goal, old.lease_s) == ("Which?", Responses(2, 4, 8), "ranking", 20)
    assert (new.instruction, new.responses, new.goal, new.lease_s) == ("Now?", Responses(2, 4, 10), "best", None)
    document = (await http.get(f"/flow/{flow_id}")).json()
    assert (document["criteria"], document["serveResponses"], document["serveTimeoutSeconds"]) == ("Now?", 4, None)
    refused = await http.patch(path.format(flow_id), json={"minResponses": 99})
    assert (refused.status_code, refused.json()["errors"].keys()) == (400, {"minResponses"})


async def test_what_a_flow_was_made_with_is_shown_again(http: httpx.AsyncClient) -> None:
    flags = [{"key": "no_shuffle", "value": "true"}]
    flow_id = await flow_with(
        http, featureFlags=flags, startingElo=1000, pidBatchMode="PerBatch", targetResponseCount=7
    )
    document = (await http.get(f"/flow/{flow_id}")).json()
    assert document["featureFlags"] == flags
    assert (document["startingElo"], document["pidBatchMode"], document["targetResponseCount"]) == (1000, "PerBatch", 7)
    plain = (await http.get(f"/flow/{await flow_with(http, featureFlags=None)}")).json()
    assert (plain["featureFlags"], plain["_t"]) == ([], "RankingFlow")
    assert (plain["minResponses"], plain["maxResponses"]) == (20, 100)


async def test_a_deleted_flow_is_gone_its_items_stop_and_their_votes_stay(
    http: httpx.AsyncClient, world: World
) -> None:
    item_id = open_item(world)
    flow_id = world.store.item(item_id).flow_id
    world.vote(2)
    assert (await http.delete(f"/flow/{flow_id}")).status_code == 204
    assert (await http.get(f"/flow/{flow_id}")).status_code == 404
    assert (await http.delete(f"/flow/{flow_id}")).status_code == 404
    assert (await http.get("/flow")).json()["total"] == 0
    assert (await http.post(f"/flow/ranking/{flow_id}/item", json={"datasetId": "x"})).status_code == 404
    assert (await http.get(f"/flow/ranking/item/{item_id}")).json()["state"] == "Stopped"
    assert (await http.get(f"/flow/ranking/item/{item_id}/results")).json()["totalVotes"] == 2


async def test_lists_are_filtered(http: httpx.AsyncClient, world: World, clock: Clock) -> None:
    for name in ("alpha", "beta", "alphabet"):
        clock.advance(10)
        world.store.create_flow(name, "Which?", SPEC.responses)

    async def names(query: str) -> list[str]:
        reply = await http.get(f"/flow?sort=created_at&{query}")
        return [row["name"] for row in reply.json()["items"]]

    assert await names("name[contains]=") == ["alpha", "beta", "alphabet"]
    assert await names("name[eq]=beta") == ["beta"]
    assert await names("name[starts_with]=alpha&name[neq]=alpha") == ["alphabet"]
    assert await names("name[ends_with]=bet") == ["alphabet"]
    assert await names("name[in]=alpha&name[in]=beta") == ["alpha", "beta"]
    assert await names("name[eq]=beta&name[eq]=alpha&logic=or") == ["alpha", "beta"]
    assert await names("name[not_contains]=alpha") == ["beta"]
    middle = (await http.get("/flow?name[eq]=beta")).json()["items"][0]["createdAt"].replace("+", "%2B")
    assert await names(f"created_at[gt]={middle}") == ["alphabet"]
    for query in ("secret[eq]=1", "name[like]=a", "created_at[gt]=yesterday", "logic=xor", "name%5Beq%5D=%27;DROP"):
        assert (await http.get(f"/flow?{query}")).status_code == (200 if "DROP" in query else 400)

    item_id = open_item(world)
    flow_id = world.store.item(item_id).flow_id
    world.store.stop(item_id)
    path = f"/flow/ranking/{flow_id}/item"
    assert (await http.get(f"{path}?state[in]=Stopped&state[in]=Failed")).json()["total"] == 1
    assert (await http.get(f"{path}?state[eq]=Running")).json()["total"] == 0
    assert (await http.get(f"{path}?state[eq]=Nonsense")).status_code == 400


async def test_both_shapes_of_a_datapoint_are_taken(http: httpx.AsyncClient, world: World) -> None:
    dataset_id = world.store.create_dataset("d")
    asset = {"_t": "TextAssetInput", "text": "a"}
    path = f"/dataset/{dataset_id}/datapoint"
    segments = [{"key": "asset", "kind": "Asset", "asset": asset}]
    one = await http.post(path, json={"segments": segments, "sortIndex": 0, "group": None})
    assert (await http.post(path, json={"asset": asset, "sortIndex": 0})).json() == one.json()
    for body in ({"sortIndex": 1}, {"asset": asset, "segments": segments}, {"asset": {"_t": "NullAsset"}}):
        assert (await http.post(path, json=body)).status_code == 400


# Goals and thresholds.


def two_texts(world: World) -> str:
    dataset_id = world.store.create_dataset("d")
    for n in range(2):
        world.store.add_datapoint(dataset_id, n, "x" * (n + 1))
    return dataset_id


def test_with_goal_best_an_item_ends_once_the_best_is_known(world: World) -> None:
    item_id = open_item(world, texts=3, responses=Responses(4, 200, 200), goal="best")
    pair, slow = take(world)
    while world.vote(1):
        assert world.store.item(item_id).votes < 60
    item = world.store.item(item_id)
    assert item.decided
    assert item.state is ItemState.RUNNING  # somebody still holds a pair, and may answer
    assert world.store.vote(pair.id, slow, "left")
    assert world.store.item(item_id).state is ItemState.COMPLETED
    assert world.store.item(item_id).votes == item.votes + 1


def test_with_other_goals_nothing_but_the_thresholds_ends_an_item(world: World) -> None:
    for goal in ("ranking", "balanced"):
        item_id = open_item(world, texts=3, responses=Responses(4, 60, 60), goal=goal)  # type: ignore[arg-type]
        assert world.vote(60) == 60
        assert world.store.item(item_id).votes == 60


def test_a_draining_item_is_given_to_nobody_new_but_answers_count(world: World, clock: Clock) -> None:
    flow_id = world.store.create_flow("f", "Which?", SPEC.responses, settings={"drainDurationSeconds": 20})
    item_id = world.store.create_item(flow_id, two_texts(world), "", 60)
    clock.advance(39)
    pair, rater_id = take(world)
    clock.advance(1)
    assert world.store.lease(world.rater()) is None
    assert world.store.vote(pair.id, rater_id, "left")
    assert world.store.item(item_id).votes == 1


def test_the_flow_says_how_long_a_pair_may_be_kept(world: World, clock: Clock) -> None:
    flow_id = world.store.create_flow("f", "Which?", SPEC.responses, settings={"serveTimeoutSeconds": 5})
    world.store.create_item(flow_id, two_texts(world), "", 60)
    pair, rater_id = take(world)
    assert pair.expires_at == clock() + 5
    clock.advance(5)
    assert not world.store.vote(pair.id, rater_id, "left")


# What the votes say.


async def test_results_come_with_intervals_and_warnings(http: httpx.AsyncClient, world: World) -> None:
    item_id = open_item(world, texts=4, responses=Responses(10, 12, 12))
    world.vote(3)
    world.store.stop(item_id)
    document = (await http.get(f"/flow/ranking/item/{item_id}/results")).json()
    rows = document["datapoints"]
    assert document["totalVotes"] == 3
    assert [row["sortIndex"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["eloLow"] < row["elo"] < row["eloHigh"]
        assert "below_min_votes" in row["flags"]
    assert sum(row["pBest"] for row in rows) == pytest.approx(1, abs=0.01)
    assert "never_lost" in rows[3]["flags"] or rows[3]["votes"] == 0


async def test_the_ranking_can_be_read_while_votes_come_in(http: httpx.AsyncClient, world: World) -> None:
    item_id = open_item(world, texts=3, responses=Responses(2, 9, 9))
    world.vote(4)
    document = (await http.get(f"/flow/ranking/item/{item_id}/ranking")).json()
    assert (document["state"], document["votes"], document["goal"]) == ("Running", 4, "ranking")
    assert not document["disconnected"]
    scores = [row["score"] for row in document["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert document["candidates"][0]["sortIndex"] == 2
    partial = await http.get(f"/flow/ranking/item/{item_id}/results?partial=true")
    assert partial.json()["totalVotes"] == 4


async def test_intervals_learn_their_width_from_earlier_items_and_do_not_change_afterwards(
    http: httpx.AsyncClient, world: World, clock: Clock
) -> None:
    flow_id = world.store.create_flow("f", "Which?", Responses(1, 20, 20))

    async def ask() -> float:
        return float((await http.get(f"/flow/ranking/item/{first}/ranking")).json()["priorSd"])

    def one_more() -> str:
        clock.advance(1)
        item_id = world.store.create_item(flow_id, two_texts(world), "", 60)
        world.vote(20)  # all say the same, so these two are far apart
        return item_id

    first = one_more()
    assert await ask() == 1.5
    last = [one_more() for _ in range(17)][-1]
    assert await ask() == 1.5
    later = (await http.get(f"/flow/ranking/item/{last}/ranking")).json()["priorSd"]
    assert later > 1.5


async def test_raw_votes_have_pseudonyms_and_say_what_does_not_count(
    http: httpx.AsyncClient, world: World, clock: Clock
) -> None:
    item_id = open_item(world, responses=Responses(1, 5, 5), ttl_s=60)
    (simulated, _), *_ = world.store.tokens.add_simulated("crowd", 1)
    pair = world.store.lease(simulated)
    assert pair is not None
    world.store.vote(pair.id, simulated, "tie", 1234)
    late, rater_id = take(world)
    clock.advance(60)
    world.store.vote(late.id, rater_id, "left")
    document = (await http.get(f"/flow/ranking/item/{item_id}/votes?page_size=1")).json()
    assert (document["total"], document["totalPages"]) == (2, 2)
    (first,) = document["items"]
    assert (first["simulated"], first["outcome"], first["counts"], first["responseMs"]) == (True, "tie", True, 1234)
    (second,) = (await http.get(f"/flow/ranking/item/{item_id}/votes?page_size=1&page=2")).json()["items"]
    assert (second["rater"], second["late"], second["counts"]) == (rater_id, True, False)
    assert "rater 0" not in str(second)  # the name stays with the owner


async def test_figures_for_the_owner_and_for_prometheus(http: httpx.AsyncClient, world: World) -> None:
    empty = (await http.get("/owner/summary")).json()
    assert empty["agreement"]["alpha"] is None
    item_id = open_item(world, texts=2, responses=Responses(2, 6, 6))
    world.vote(6)
    summary = (await http.get("/owner/summary")).json()
    assert summary["items"] == {"Completed": 1}
    assert (summary["votes"]["counted"], summary["votesPerMinute"]) == (6, 6)
    assert summary["agreement"]["observed"] == 1.0
    assert 0.5 < summary["agreement"]["expected"] <= 1
    assert sum(row["votes"] for row in summary["raters"]) == world.store.item(item_id).votes
    text = (await http.get("/metrics")).text
    assert 'rlhf_items{state="Completed"} 1' in text
    assert "# TYPE rlhf_votes_total counter" in text
    counted = [line for line in text.splitlines() if line.startswith("rlhf_votes_total")]
    assert sum(int(line.split()[-1]) for line in counted) == 6


async def test_owners_make_simulated_raters_and_the_same_population_is_the_same_people(http: httpx.AsyncClient) -> None:
    async def make(body: dict[str, object]) -> httpx.Response:
        return await http.post("/owner/simulated-raters", json=body)

    first = (await make({"count": 3, "population": "p"})).json()["raters"]
    again = (await make({"count": 3, "population": "p"})).json()["raters"]
    assert [rater["id"] for rater in first] == [rater["id"] for rater in again]
    assert {rater["secret"] for rater in first}.isdisjoint(rater["secret"] for rater in again)
    for body in ({"count": 0}, {"count": 10_001}, {"count": 1, "population": "../x"}, {"count": 1, "role": "owner"}):
        assert (await make(body)).status_code == 400


# Images.


async def upload(http: httpx.AsyncClient, content: bytes, name: str = "a.png") -> httpx.Response:
    return await http.post("/asset/file", files={"file": (name, content, "image/png")})


@pytest.mark.parametrize(("content", "kind"), [(PNG, "png"), (JPEG, "jpeg"), (GIF, "gif"), (WEBP, "webp")])
async def test_an_image_is_known_by_its_first_bytes_and_shown_as_what_it_is(
    http: httpx.AsyncClient, world: World, content: bytes, kind: str
) -> None:
    name = (await upload(http, content, "x.html")).json()["fileName"]
    dataset_id = world.store.create_dataset("d")
    for _ in range(2):
        asset = {"_t": "ExistingAssetInput", "name": name}
        reply = await http.post(f"/dataset/{dataset_id}/datapoint", json={"asset": asset})
        assert reply.status_code == 200
    flow_id = await flow_with(http)
    item_id = world.store.create_item(flow_id, dataset_id, "", 60, context_media=[name])
    pair, _ = take(world)
    assert pair.images
    assert pair.left == pair.context_images[0]
    shown = await http.get(pair.left)
    assert (shown.content, shown.headers["Content-Type"]) == (content, f"image/{kind}")
    assert shown.headers["X-Content-Type-Options"] == "nosniff"
    assert shown.headers["Content-Disposition"].startswith("inline; filename=")
    assert "sandbox" in shown.headers["Content-Security-Policy"]
    world.store.stop(item_id)
    rows = (await http.get(f"/flow/ranking/item/{item_id}/results")).json()["datapoints"]
    labels = [row["asset"]["metadata"]["originalFilename"]["originalFilename"] for row in rows]
    assert labels == ["x.html", "x.html (2)"]


@pytest.mark.parametrize(
    "content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"PK\x03\x04", b"%PDF"]
)
async def test_what_is_no_image_is_refused_whatever_it_calls_itself(http: httpx.AsyncClient, content: bytes) -> None:
    assert (await upload(http, content)).status_code == 415


async def test_uploads_are_limited_in_size_and_form(http: httpx.AsyncClient, world: World, tmp_path: Path) -> None:
    assert (await upload(http, PNG + bytes(8 * 1024 * 1024))).status_code == 413
    assert (await http.post("/asset/file", content=PNG)).status_code == 400
    for content in (b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n" + PNG):
        reply = await http.post(
            "/asset/file", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        assert reply.status_code == 400
    assert (await http.post("/asset/file", files={"other": PNG})).status_code == 400
    assert not (tmp_path / "media").exists()


async def test_names_and_hashes_never_become_paths(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    await upload(http, PNG, "../../../evil.png")
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and "sqlite" not in file.name]
    assert {file.relative_to(tmp_path).parts[0] for file in kept} == {"secret.png", "media"}
    for path in ("/media/../secret.png", "/media/%2e%2e%2fsecret.png", "/media/secret.png", "/media/" + "0" * 64):
        assert (await http.get(path)).status_code == 404
    assert (await http.get("/media/" + "A" * 64)).status_code == 404


async def test_addresses_are_never_fetched(http: httpx.AsyncClient) -> None:
    batch = await http.post("/asset/batch-upload", json={"urls": ["http://169.254.169.254/"], "correlationId": "c"})
    single = await http.post("/asset/url?url=http://169.254.169.254/")
    for reply in (batch, single):
        assert reply.status_code == 422
        assert "upload their bytes" in reply.json()["detail"]


async def test_texts_and_images_are_not_compared_and_unknown_images_are_named(
    http: httpx.AsyncClient, world: World
) -> None:
    name = (await upload(http, PNG)).json()["fileName"]
    path = f"/dataset/{world.store.create_dataset('d')}/datapoint"
    await http.post(path, json={"asset": {"_t": "TextAssetInput", "text": "a"}})
    mixed = await http.post(path, json={"asset": {"_t": "ExistingAssetInput", "name": name}})
    unknown = await http.post(path, json={"asset": {"_t": "ExistingAssetInput", "name": "img_lost"}})
    assert (mixed.status_code, unknown.status_code) == (400, 400)
    assert "upload it again" in unknown.json()["detail"]
