"""What the server says to whom over HTTP: roles, limits, blindness, statuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from flow_world import SPEC, Clock, World, open_item

from rlhf_cli.server.requests import MAX_BODY_BYTES


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=world.transport, base_url="http://localhost") as http:
        yield http


@pytest.fixture
def client_token(world: World) -> dict[str, str]:
    secret = world.store.tokens.issue_access(world.credentials.client_id, world.credentials.client_secret)
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def rater_token(world: World) -> dict[str, str]:
    return {"Authorization": f"Bearer {world.store.tokens.add('rater', 'ada')[1]}"}


async def test_voting_over_http_is_blind_and_counts_once(
    http: httpx.AsyncClient, world: World, rater_token: dict[str, str]
) -> None:
    item_id = open_item(world)
    reply = await http.post("/vote/lease", headers=rater_token)
    assert reply.status_code == 200
    lease = reply.json()
    assert lease.keys() == {
        "lease",
        "prompt",
        "instruction",
        "kind",
        "left",
        "right",
        "contextImages",
        "segments",
        "expires",
        "secondsLeft",
    }
    assert (lease["prompt"], lease["instruction"]) == ("Why?", "Which?")

    vote = {"outcome": "left", "response_ms": 1234}
    assert (await http.post(f"/vote/{lease['lease']}", json=vote, headers=rater_token)).status_code == 204
    assert (await http.post(f"/vote/{lease['lease']}", json=vote, headers=rater_token)).status_code == 409

    (kept,) = world.store.votes(item_id)
    assert (kept.outcome, kept.response_ms, kept.late) == ("left", 1234, False)
    candidates = world.store.candidates(item_id)
    assert (candidates[kept.left].text, candidates[kept.right].text) == (lease["left"], lease["right"])


async def test_there_is_nothing_to_vote_on_without_items(http: httpx.AsyncClient, rater_token: dict[str, str]) -> None:
    assert (await http.post("/vote/lease", headers=rater_token)).status_code == 204


async def test_voting_on_a_closed_item_is_gone(
    http: httpx.AsyncClient, world: World, rater_token: dict[str, str]
) -> None:
    item_id = open_item(world)
    lease = (await http.post("/vote/lease", headers=rater_token)).json()
    world.store.stop(item_id)
    reply = await http.post(f"/vote/{lease['lease']}", json={"outcome": "left"}, headers=rater_token)
    assert reply.status_code == 410
    assert world.store.votes(item_id)[0].late


async def test_voting_on_a_foreign_lease_is_forbidden(
    http: httpx.AsyncClient, world: World, rater_token: dict[str, str]
) -> None:
    item_id = open_item(world)
    lease = (await http.post("/vote/lease", headers=rater_token)).json()
    other = {"Authorization": f"Bearer {world.store.tokens.add('rater', 'eve')[1]}"}
    reply = await http.post(f"/vote/{lease['lease']}", json={"outcome": "left"}, headers=other)
    assert reply.status_code == 403
    assert world.store.votes(item_id) == []


ROUTES = [
    ("POST", "/flow/ranking"),
    ("GET", "/flow"),
    ("GET", "/flow/x"),
    ("POST", "/dataset"),
    ("POST", "/dataset/x/datapoint"),
    ("POST", "/flow/ranking/x/item"),
    ("GET", "/flow/ranking/x/item"),
    ("GET", "/flow/ranking/item/x"),
    ("GET", "/flow/ranking/item/x/results"),
    ("GET", "/flow/ranking/item/x/vote-matrix"),
    ("POST", "/flow/item/x/stop"),
]


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("POST", "/vote/lease"), ("POST", "/vote/x")])
async def test_every_route_wants_a_token_of_the_right_role(
    http: httpx.AsyncClient, client_token: dict[str, str], rater_token: dict[str, str], method: str, path: str
) -> None:
    assert (await http.request(method, path)).status_code == 401
    assert (await http.request(method, path, headers={"Authorization": "Bearer x"})).status_code == 401
    assert (await http.request(method, path, headers={"Authorization": "Basic eA=="})).status_code == 401
    wrong = client_token if path.startswith("/vote") else rater_token
    assert (await http.request(method, path, headers=wrong)).status_code == 403


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if "/x" in r[1]])
async def test_unknown_ids_are_a_404_problem_document(
    http: httpx.AsyncClient, client_token: dict[str, str], method: str, path: str
) -> None:
    asset = {"key": "asset", "kind": "Asset", "asset": {"_t": "TextAssetInput", "text": "a"}}
    body = {"segments": [asset]} if "datapoint" in path else {"datasetId": "x"}
    reply = await http.request(method, path, headers=client_token, json=body if method == "POST" else None)
    assert reply.status_code == 404
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json().keys() == {"type", "title", "status", "detail", "instance"}


async def test_results_and_matrix_are_a_conflict_before_the_end(
    http: httpx.AsyncClient, world: World, client_token: dict[str, str]
) -> None:
    item_id = open_item(world)
    for path in ("results", "vote-matrix"):
        reply = await http.get(f"/flow/ranking/item/{item_id}/{path}", headers=client_token)
        assert (reply.status_code, reply.json()["detail"]) == (409, "flow item is Pending")
    reply = await http.get(f"/flow/ranking/item/{item_id}/vote-matrix?partial=true", headers=client_token)
    assert (reply.status_code, reply.json()["sortIndex"]) == (200, [0, 1, 2, 3])


FLOW = {"name": "a", "criteria": "b", "minResponses": 1, "maxResponses": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        json.dumps(FLOW | {"maxResponses": float("nan")}).encode(),
        b'{"name": "a", "name": "b", "criteria": "c"}',
        json.dumps(FLOW | {"minResponses": 3}).encode(),
        json.dumps(FLOW | {"minResponses": 0}).encode(),
        json.dumps(FLOW | {"serveResponses": 5}).encode(),
        json.dumps(FLOW | {"name": ""}).encode(),
        b'{"name": "\\ud800", "criteria": "c"}',
        b'{"name": "a\xff", "criteria": "c"}',
        b"[" * 50_000,
    ],
)
async def test_a_body_that_is_not_valid_is_refused_by_field(
    http: httpx.AsyncClient, world: World, client_token: dict[str, str], content: bytes
) -> None:
    reply = await http.post("/flow/ranking", headers=client_token, content=content)
    assert (reply.status_code, reply.headers["content-type"]) == (400, "application/problem+json")
    assert world.store.flows("", 0, 10, newest_first=True)[0] == 0


async def test_sizes_are_limited(http: httpx.AsyncClient, world: World, client_token: dict[str, str]) -> None:
    too_large = b" " * (MAX_BODY_BYTES + 1)
    assert (await http.post("/dataset", headers=client_token, content=too_large)).status_code == 413

    async def add(text: str) -> int:
        asset = {"key": "asset", "kind": "Asset", "asset": {"_t": "TextAssetInput", "text": text}}
        path = f"/dataset/{dataset_id}/datapoint"
        return (await http.post(path, headers=client_token, json={"segments": [asset]})).status_code

    async def ask(ttl_s: float | None = 60) -> int:
        body = {"datasetId": dataset_id, "context": None, "timeToLiveInSeconds": ttl_s}
        return (await http.post(f"/flow/ranking/{flow_id}/item", headers=client_token, json=body)).status_code

    flow_id, dataset_id = world.open_flow(), world.store.create_dataset("dataset")
    assert await add("") == 400
    assert await add("ä" * 16_385) == 400
    assert await add("ä" * 16_384) == 200
    assert await ask() == 400  # one candidate is nothing to compare
    assert [await add(f"{i}") for i in range(16)] == [200] * 15 + [400]
    assert [await ask(ttl_s) for ttl_s in (0, -1, 10_000_000)] == [400, 400, 400]
    assert await ask(None) == 200


async def test_only_our_own_names_are_answered(http: httpx.AsyncClient) -> None:
    for host, status in (("localhost", 200), ("127.0.0.1:81", 200), ("[::1]:8", 200), ("evil.example", 400), ("", 400)):
        assert (await http.get("/healthz", headers={"Host": host})).status_code == status


async def test_the_token_request_takes_basic_and_form_and_refuses_the_rest(
    http: httpx.AsyncClient, world: World
) -> None:
    pair = (world.credentials.client_id, world.credentials.client_secret)
    grant = {"grant_type": "client_credentials"}
    basic = await http.post("/connect/token", data=grant, auth=pair)
    form = await http.post("/connect/token", data={**grant, "client_id": pair[0], "client_secret": pair[1]})
    for reply in (basic, form):
        assert reply.status_code == 200
        assert reply.json()["token_type"] == "Bearer"
    for reply in (
        await http.post("/connect/token", data=grant, auth=(pair[0], "wrong")),
        await http.post("/connect/token", data=grant),
        await http.post("/connect/token", data=grant, headers={"Authorization": "Basic ???"}),
        await http.post("/connect/token", data=grant, auth=world.store.tokens.add("rater", "r")),
    ):
        assert (reply.status_code, reply.json()["error"]) == (401, "invalid_client")
    reply = await http.post("/connect/token", data={"grant_type": "password"}, auth=pair)
    assert (reply.status_code, reply.json()["error"]) == (400, "unsupported_grant_type")


async def test_pages_count_from_one_and_end(
    http: httpx.AsyncClient, world: World, clock: Clock, client_token: dict[str, str]
) -> None:
    ids = []
    for number in range(5):
        clock.advance(1)
        ids.append(world.store.create_flow(f"flow {number}", "Which?", SPEC.responses))

    async def page(query: str) -> dict[str, object]:
        return (await http.get(f"/flow?{query}", headers=client_token)).json()

    newest = await page("page=1&page_size=2&sort=-created_at&name[contains]=")
    assert (newest["total"], newest["totalPages"], newest["pageSize"]) == (5, 3, 2)
    assert [row["id"] for row in newest["items"]] == ids[:2:-1]
    assert [row["id"] for row in (await page("page=3&page_size=2&sort=created_at"))["items"]] == ids[4:]
    assert (await page("page=9"))["items"] == []
    assert [row["id"] for row in (await page("name[contains]=w 3"))["items"]] == [ids[3]]
    for query in ("page=0", "page=x", "page_size=9999", "sort=name", "page=%F0%9D%9F%8F"):
        assert (await page(query))["status"] == 400


async def test_a_full_or_locked_database_asks_to_come_back(
    http: httpx.AsyncClient, world: World, rater_token: dict[str, str]
) -> None:
    open_item(world)
    lease = (await http.post("/vote/lease", headers=rater_token)).json()["lease"]
    world.store._database._connection.execute("PRAGMA query_only = ON")
    reply = await http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=rater_token)
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
    world.store._database._connection.execute("PRAGMA query_only = OFF")
    assert (await http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=rater_token)).status_code == 204


async def test_unknown_paths_and_methods_are_problem_documents(http: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/flow", 405), ("GET", "/../etc/passwd", 404)):
        reply = await http.request(method, path)
        assert (reply.status_code, reply.json()["status"]) == (status, status)
