"""The security baseline of the server: each test is one of its lines."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from flow_world import Clock, World, open_item
from serve_world import Served, serve

from rlhf_cli.server import protocol
from rlhf_cli.server.app import create_app
from rlhf_cli.server.limits import Buckets, Guard, Limits, Rate
from rlhf_cli.server.problems import TooMany
from rlhf_cli.server.store import Store


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    limits = Limits(rater=Rate(1, 3), client=Rate(1, 3), owner=Rate(1, 3), address=Rate(1, 8), refused=Rate(1, 2))
    app = create_app(world.store, limits=limits, monotonic=world.clock)
    transport = httpx.ASGITransport(app=app, client=("192.0.2.7", 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


# Rates.


async def test_a_token_that_asks_too_often_is_told_when_to_come_back(
    http: httpx.AsyncClient, world: World, clock: Clock
) -> None:
    _, secret = world.store.tokens.add("rater", "ada")
    statuses = [(await http.post("/vote/lease", headers=bearer(secret))).status_code for _ in range(4)]
    assert statuses == [204, 204, 204, 429]
    reply = await http.post("/vote/lease", headers=bearer(secret))
    assert reply.headers["Retry-After"] == "1"
    assert reply.headers["content-type"] == "application/problem+json"
    _, other = world.store.tokens.add("rater", "eve")
    assert (await http.post("/vote/lease", headers=bearer(other))).status_code == 204  # nobody else suffers
    clock.advance(1)
    assert (await http.post("/vote/lease", headers=bearer(secret))).status_code == 204


async def test_a_client_does_not_get_more_by_taking_more_tokens(http: httpx.AsyncClient, world: World) -> None:
    client_id, secret = world.store.tokens.add("client", "trainer")
    tokens = [world.store.tokens.issue_access(client_id, secret) for _ in range(4)]
    statuses = [(await http.get("/flow", headers=bearer(str(token)))).status_code for token in tokens]
    assert statuses == [200, 200, 200, 429]


async def test_an_address_that_asks_too_often_is_held_back_whatever_it_asks(http: httpx.AsyncClient) -> None:
    statuses = [(await http.get("/healthz")).status_code for _ in range(9)]
    assert statuses == [200] * 8 + [429]


async def test_guessing_secrets_is_slow(http: httpx.AsyncClient, world: World) -> None:
    statuses = [(await http.get("/flow", headers=bearer(f"guess {n}"))).status_code for n in range(3)]
    assert statuses == [401, 401, 429]
    pair = {"grant_type": "client_credentials", "client_id": "x", "client_secret": "y"}
    assert (await http.post("/connect/token", data=pair)).status_code == 429


def test_simulated_raters_and_this_machine_have_no_rate_of_their_own(world: World, clock: Clock) -> None:
    guard = Guard(Limits(rater=Rate(1, 1), address=Rate(1, 1)), clock)
    ((_, secret),) = world.store.tokens.add_simulated("crowd", 1)
    token = world.store.tokens.authenticate(secret)
    assert token is not None
    for _ in range(5):
        guard.token(token)
        guard.address("127.0.0.1")
    guard.address("192.0.2.1")
    with pytest.raises(TooMany):
        guard.address("192.0.2.1")


def test_buckets_forget_who_has_not_asked_for_a_while(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.server.limits._KEPT", 3)
    buckets = Buckets(Rate(1, 2), clock)
    for n in range(50):
        buckets.take(str(n))
        clock.advance(1)
    assert len(buckets._levels) <= 3


# Tokens.


def test_a_link_lets_in_once_and_its_session_is_no_bearer_token(world: World, clock: Clock) -> None:
    tokens = world.store.tokens
    rater_id, secret = tokens.add("rater", "ada")
    link = tokens.add_link(rater_id)
    entered = tokens.redeem_link(link)
    assert entered is not None
    token, session = entered
    assert (token.id, token.role) == (rater_id, "rater")
    assert tokens.redeem_link(link) is None
    assert tokens.session(session) == token
    assert tokens.session(secret) is None
    assert tokens.authenticate(session) is None
    assert tokens.authenticate(link) is None
    tokens.end_session(session)
    assert tokens.session(session) is None
    late = tokens.add_link(rater_id, ttl_s=60)
    clock.advance(60)
    assert tokens.redeem_link(late) is None


def test_revoking_a_person_ends_sessions_and_links(world: World) -> None:
    tokens = world.store.tokens
    rater_id, secret = tokens.add("rater", "ada")
    session, link = tokens.open_session(rater_id), tokens.add_link(rater_id)
    assert tokens.session(session) is not None
    assert tokens.revoke(rater_id)
    assert not tokens.revoke("nobody")
    assert (tokens.session(session), tokens.authenticate(secret), tokens.redeem_link(link)) == (None, None, None)


def test_a_token_ends_at_its_time_also_when_it_was_used_before(world: World, clock: Clock) -> None:
    _, secret = world.store.tokens.add("owner", "o", ttl_s=60)
    assert world.store.tokens.authenticate(secret) is not None
    clock.advance(60)
    assert world.store.tokens.authenticate(secret) is None


def test_what_another_process_revokes_ends_here_at_once(tmp_path: Path) -> None:
    server, command = Store(tmp_path / "s.sqlite"), Store(tmp_path / "s.sqlite")
    rater_id, secret = command.tokens.add("rater", "ada")
    assert server.tokens.authenticate(secret) is not None
    command.tokens.revoke(rater_id)
    assert server.tokens.authenticate(secret) is None
    server.close()
    command.close()


def test_no_secret_of_any_kind_is_on_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    rater_id, first = store.tokens.add("rater", "ada")
    secrets = [first, store.tokens.add_link(rater_id), store.tokens.open_session(rater_id)]
    store.close()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"ada" in content
    assert not any(secret.encode() in content for secret in secrets)


# Bodies, and clocks that are wrong.


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"outcome": "left", "x": ' + b"[" * 40 + b"]" * 40 + b"}", 400),
        (b'{"outcome": "left", "x": "' + b"[" * 100 + b'"}', 204),
        (b'{"outcome": "best"}', 400),
        (b'{"outcome": "left", "response_ms": -1}', 400),
        (b'{"outcome": "left", "response_ms": 1e999}', 400),
        (b'{"outcome": "left", "outcome": "right"}', 400),
        (b"\xff", 400),
    ],
)
async def test_a_vote_that_is_malformed_counts_nothing(world: World, body: bytes, status: int) -> None:
    item_id = open_item(world)
    _, secret = world.store.tokens.add("rater", "ada")
    async with httpx.AsyncClient(transport=world.transport, base_url="http://localhost") as http:
        lease = (await http.post("/vote/lease", headers=bearer(secret))).json()["lease"]
        reply = await http.post(f"/vote/{lease}", content=body, headers=bearer(secret))
    assert reply.status_code == status
    assert len(world.store.votes(item_id)) == (status == 204)


async def test_two_tabs_and_replays_count_once(world: World) -> None:
    item_id = open_item(world)
    _, secret = world.store.tokens.add("rater", "ada")
    async with httpx.AsyncClient(transport=world.transport, base_url="http://localhost") as http:
        lease = (await http.post("/vote/lease", headers=bearer(secret))).json()["lease"]
        votes = [http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=bearer(secret)) for _ in range(5)]
        statuses = sorted(reply.status_code for reply in await asyncio.gather(*votes))
    assert statuses == [204, 409, 409, 409, 409]
    assert world.store.item(item_id).votes == 1


def test_a_clock_that_jumps_back_ends_nothing_early_and_loses_nothing(world: World, clock: Clock) -> None:
    item_id = open_item(world, ttl_s=60)
    world.vote(1)
    clock.advance(-3600)
    assert world.vote(1) == 1
    assert world.store.item(item_id).votes == 2
    clock.advance(2 * 3600)
    assert world.store.item(item_id).ended_at == world.store.item(item_id).expires_at
    clock.advance(-7200)
    assert world.store.item(item_id).state.terminal  # what has ended stays so


# The listening socket.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    with serve(tmp_path_factory.mktemp("served")) as served:
        yield served


def raw(served: Served, request: bytes, more: bytes = b"") -> bytes:
    """What comes back until the server closes, b"" when it just does."""
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        try:
            connection.sendall(request)
            for _ in range(64 if more else 0):
                connection.sendall(more)
            return connection.recv(4096)
        except (ConnectionResetError, BrokenPipeError):
            return b""


def test_headers_without_end_are_cut_off(served: Served) -> None:
    endless = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: "
    assert raw(served, endless, b"x" * 4096) == b""
    many = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    assert raw(served, many, b"X-Y: z\r\n" * 512) == b""
    assert raw(served, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


async def test_headers_that_never_come_are_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_S", 0.05)
    listening = protocol.listen("127.0.0.1", 0)
    server = protocol.server_of(create_app(world.store))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    for said in (b"", b"GET /healthz HT"):
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(said)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
    server.should_exit = True
    await serving
    listening.close()


def test_a_body_that_claims_to_be_small_and_is_not_stays_within_its_claim(served: Served) -> None:
    answer = raw(
        served, b"POST /connect/token HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\na=b" + b"x" * 100
    )
    assert answer.startswith(b"HTTP/1.1 400")


def test_other_host_names_are_not_answered(served: Served) -> None:
    assert raw(served, b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 400"
    )


def test_no_answer_is_shared_across_origins_and_none_names_the_software(served: Served) -> None:
    reply = httpx.get(f"{served.url}/healthz", headers={"Origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in reply.headers)
    assert "server" not in reply.headers


def test_addresses_are_written_down_nowhere(served: Served) -> None:
    httpx.get(f"{served.url}/flow", headers=bearer("wrong"))
    content = b"".join(file.read_bytes() for file in served.data.iterdir() if "sqlite" in file.name)
    assert b"127.0.0.1" not in content
