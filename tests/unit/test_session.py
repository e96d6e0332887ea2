"""Browsers and what they may do: every line of the security baseline that is about them, as a promise."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from flow_world import Clock, World
from test_server_store import open_item

from rlhf_cli.server.session import CSP, HEADERS
from rlhf_cli.server.tokens import LINK_TTL_S, SESSION_TTL_S

ORIGIN = "http://localhost"
FOREIGN = [
    "http://elsewhere.example",
    "null",
    "",
    "http://localhost:8000",
    "http://localhost.evil.example",
    "ftp://localhost",
]


def browser(world: World, origin: str = ORIGIN) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=world.transport, base_url=origin, headers={"Origin": origin})


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(world) as http:
        yield http


async def sign_in(http: httpx.AsyncClient, world: World, person: str) -> dict[str, str]:
    """Follow a link as a browser does; returns the headers that change things need."""
    assert (await http.get(f"/join/{world.store.tokens.add_link(person)}")).status_code == 303
    assert (await http.post("/join")).status_code == 200
    me = (await http.get("/session")).json()
    assert me["id"] == person
    return {"X-CSRF-Token": me["csrf"]}


async def test_the_secret_of_a_link_leaves_the_address_and_no_page_contains_it(
    http: httpx.AsyncClient, world: World
) -> None:
    secret = world.store.tokens.add_link(world.rater())
    reply = await http.get(f"/join/{secret}")
    assert reply.headers["Location"] == "/join"
    cookie = reply.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/join" in cookie
    page = await http.get("/join")
    assert secret not in page.text
    assert page.headers["Referrer-Policy"] == "no-referrer"


async def test_looking_at_a_link_does_not_use_it_up(http: httpx.AsyncClient, world: World) -> None:
    link = f"/join/{world.store.tokens.add_link(world.rater())}"
    for _ in range(3):  # previews and scanners
        await http.get(link)
    assert (await http.post("/join")).json() == {"home": "/vote"}


async def test_a_link_works_once(http: httpx.AsyncClient, world: World) -> None:
    link = f"/join/{world.store.tokens.add_link(world.rater())}"
    await http.get(link)
    assert (await http.post("/join")).status_code == 200
    async with browser(world) as other:
        await other.get(link)
        assert (await other.post("/join")).status_code == 410
        assert (await other.get("/session")).status_code == 401


async def test_a_link_ends_with_its_time_or_its_person(http: httpx.AsyncClient, world: World, clock: Clock) -> None:
    old, gone = world.store.tokens.add_link(world.rater()), world.rater()
    clock.advance(LINK_TTL_S)
    orphan = world.store.tokens.add_link(gone)
    world.store.tokens.revoke(gone)
    for secret in (old, orphan, "", "x" * 43):
        await http.get(f"/join/{secret or '-'}")
        assert (await http.post("/join")).status_code == 410


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_sites(world: World, scheme: str) -> None:
    async with browser(world, f"{scheme}://localhost") as http:
        await http.get(f"/join/{world.store.tokens.add_link(world.rater())}")
        reply = await http.post("/join")
    (cookie,) = (c for c in reply.headers.get_list("Set-Cookie") if "session" in c)
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/" in cookie
    assert "Domain" not in cookie
    assert ("Secure" in cookie) == (scheme == "https")
    assert cookie.startswith("__Host-") == (scheme == "https")


async def test_a_session_votes_with_its_csrf_token_and_not_without(http: httpx.AsyncClient, world: World) -> None:
    item_id = open_item(world)
    headers = await sign_in(http, world, world.rater())
    other = await sign_in(browser(world), world, world.rater())
    for wrong in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "x" * 43}, other):
        assert (await http.post("/vote/lease", headers=wrong)).status_code == 403
    lease = (await http.post("/vote/lease", headers=headers)).json()["lease"]
    vote = {"outcome": "left", "response_ms": 900}
    assert (await http.post(f"/vote/{lease}", json=vote)).status_code == 403
    assert world.store.votes(item_id) == []
    assert (await http.post(f"/vote/{lease}", json=vote, headers=headers)).status_code == 204


@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_page_of_another_origin_changes_nothing(http: httpx.AsyncClient, world: World, origin: str) -> None:
    item_id = open_item(world)
    headers = await sign_in(http, world, world.rater())
    lease = (await http.post("/vote/lease", headers=headers)).json()["lease"]
    link = world.store.tokens.add_link(world.rater())
    await http.get(f"/join/{link}")
    _, secret = world.store.tokens.add("owner", "me")
    forged = {**headers, "Origin": origin}
    for method, path, body in (
        ("POST", f"/vote/{lease}", {"outcome": "left"}),
        ("POST", "/vote/lease", None),
        ("POST", f"/vote/{lease}/renew", None),
        ("POST", f"/vote/{lease}/undo", None),
        ("DELETE", "/session", None),
        ("POST", "/join", None),
        ("POST", "/login", {"secret": secret}),
    ):
        reply = await http.request(method, path, json=body, headers=forged)
        assert reply.status_code == 403, path
        assert "Set-Cookie" not in reply.headers
    assert world.store.votes(item_id) == []


async def test_a_request_without_an_origin_changes_nothing(http: httpx.AsyncClient, world: World) -> None:
    headers = await sign_in(http, world, world.rater())
    del http.headers["Origin"]
    assert (await http.post("/vote/lease", headers=headers)).status_code == 403


async def test_a_bearer_token_needs_neither_cookie_nor_origin(world: World) -> None:
    open_item(world)
    _, secret = world.store.tokens.add("rater", "machine")
    async with httpx.AsyncClient(transport=world.transport, base_url=ORIGIN) as http:
        assert (await http.post("/vote/lease", headers={"Authorization": f"Bearer {secret}"})).status_code == 200


async def test_a_wrong_bearer_token_is_not_saved_by_a_cookie(http: httpx.AsyncClient, world: World) -> None:
    open_item(world)
    headers = await sign_in(http, world, world.rater())
    reply = await http.post("/vote/lease", headers={**headers, "Authorization": "Bearer wrong"})
    assert reply.status_code == 401


async def test_a_session_is_no_bearer_token_and_no_way_into_the_api(http: httpx.AsyncClient, world: World) -> None:
    owner, _ = world.store.tokens.add("owner", "me")
    headers = await sign_in(http, world, owner)
    secret = http.cookies["rlhf_session"]
    flow = {"name": "f", "criteria": "c"}
    assert (await http.post("/flow/ranking", json=flow, headers=headers)).status_code == 401
    bearer = {"Authorization": f"Bearer {secret}"}
    assert (await http.post("/flow/ranking", json=flow, headers=bearer)).status_code == 401


async def test_the_session_of_a_revoked_rater_ends_at_once(http: httpx.AsyncClient, world: World) -> None:
    open_item(world)
    rater_id = world.rater()
    headers = await sign_in(http, world, rater_id)
    lease = (await http.post("/vote/lease", headers=headers)).json()["lease"]
    world.store.tokens.revoke(rater_id)
    assert (await http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=headers)).status_code == 401
    assert (await http.get("/session")).status_code == 401
    assert world.store.votes() == []


async def test_a_session_ends_with_its_time_and_with_signing_out(
    http: httpx.AsyncClient, world: World, clock: Clock
) -> None:
    rater_id = world.rater()
    headers = await sign_in(http, world, rater_id)
    kept = http.cookies["rlhf_session"]
    assert (await http.delete("/session", headers=headers)).status_code == 204
    assert "rlhf_session" not in http.cookies
    http.cookies.set("rlhf_session", kept)  # a copy somebody made
    assert (await http.get("/session")).status_code == 401
    http.cookies.clear()
    await sign_in(http, world, rater_id)
    clock.advance(SESSION_TTL_S)
    assert (await http.get("/session")).status_code == 401


async def test_only_people_and_owners_sign_in_with_a_secret(http: httpx.AsyncClient, world: World) -> None:
    _, owner = world.store.tokens.add("owner", "me")
    assert (await http.post("/login", json={"secret": owner})).json() == {"home": "/owner"}
    for wrong in (world.credentials.client_secret, "wrong", "x" * 200):
        assert (await http.post("/login", json={"secret": wrong})).status_code == 403
    assert (await http.post("/login", json={"secret": "x" * 201})).status_code == 400


async def test_a_rater_sees_no_figures_and_an_owner_casts_no_votes(http: httpx.AsyncClient, world: World) -> None:
    item_id = open_item(world)
    headers = await sign_in(http, world, world.rater())
    for path in ("/owner/board", f"/owner/groups/{item_id}"):
        assert (await http.get(path)).status_code == 403
    http.cookies.clear()
    headers = await sign_in(http, world, world.store.tokens.add("owner", "me")[0])
    assert (await http.get("/owner/board")).status_code == 200
    assert (await http.get(f"/owner/groups/{item_id}")).status_code == 200
    assert (await http.post("/vote/lease", headers=headers)).status_code == 403


async def test_every_answer_carries_the_policy_and_none_opens_up_to_other_origins(
    http: httpx.AsyncClient, world: World
) -> None:
    paths = ["/", "/vote", "/owner", "/join", "/login", "/join/x", "/pages/vote.js", "/pages/style.css", "/pages/none"]
    paths += ["/session", "/owner/board", "/nowhere", "/healthz", "/flow", "/media/x", "/pages/..%2fstore.py"]
    for path in paths:
        reply = await http.get(path, headers={"Origin": "http://elsewhere.example"})
        for name, value in HEADERS.items():
            assert reply.headers.get_list(name) == [value], (path, name)
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]
    reply = await http.get("/vote", headers={"Host": "rebound.example"})
    assert (reply.status_code, reply.headers["Content-Security-Policy"]) == (400, CSP)
    assert (await http.options("/vote/lease")).status_code == 405


def test_the_policy_is_the_one_that_was_agreed_on() -> None:
    assert CSP == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


async def test_no_page_has_a_script_or_a_style_of_its_own(http: httpx.AsyncClient) -> None:
    for path in ("/vote", "/owner", "/join", "/login"):
        page = (await http.get(path)).text
        assert "<style" not in page
        assert " style=" not in page
        assert page.count("<script") == page.count('<script type="module" src="/pages/') == 1
        assert re.search(r"<[^>]*\son\w+=", page) is None
        assert "http://" not in page
        assert "https://" not in page


@pytest.mark.parametrize(
    "name", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "vote.html%00", "__init__.py"]
)
async def test_only_the_pages_are_served(http: httpx.AsyncClient, name: str) -> None:
    assert (await http.get(f"/pages/{name}")).status_code == 404


async def test_pages_are_taken_from_the_cache_until_they_change(http: httpx.AsyncClient) -> None:
    first = await http.get("/pages/vote.js")
    again = await http.get("/pages/vote.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
