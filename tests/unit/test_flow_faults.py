"""Whatever a service or the network does, the client answers with an error that says what to do, or with the truth."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from flow_world import PLAIN, SPEC, World
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run_virtually

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.flow import wire
from rlhf_cli.flow.base import BadAnswer, FlowSpec, Responses
from rlhf_cli.flow.client import FlowClient, in_order_of
from rlhf_cli.flow.credentials import Credentials, credentials_from_environment
from rlhf_cli.flow.http import MAX_ANSWER_BYTES, HttpCalls, Patience, http_date, retry_after_s
from rlhf_cli.flow.wire import VoteMatrix


def once(*answers: httpx.Response | Exception, path_end: str) -> object:
    """A `before` hook: the first requests to a path are answered like this, then the server takes over."""
    left = list(answers)

    def before(request: httpx.Request) -> httpx.Response | None:
        if left and request.url.path.endswith(path_end):
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        return None

    return before


@pytest.mark.parametrize(
    "fault",
    [
        httpx.Response(429),
        httpx.Response(500),
        httpx.Response(502),
        httpx.Response(503),
        httpx.Response(504),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
    ],
    ids=repr,
)
async def test_a_passing_fault_when_reading_is_ridden_out(world: World, fault: httpx.Response | Exception) -> None:
    client = world.client(PLAIN)
    flow_id = await client.open_flow(SPEC)
    item_id = await world.item(client, flow_id, ["a", "b"])
    world.transport.before = once(fault, path_end=item_id)
    assert item_id in await client.statuses(flow_id, [item_id])
    await client.close()


async def test_a_lasting_fault_ends_in_an_error_that_names_the_endpoint_and_the_way_on(world: World) -> None:
    client = world.client(PLAIN)
    world.transport.before = lambda r: httpx.Response(503) if r.url.path == "/flow" else None
    with pytest.raises(FlowUnavailable, match=r"GET http://127\.0\.0\.1/flow: answered 503\. .*resume"):
        await client.find_flow(SPEC)
    assert 3 <= world.transport.count("GET", "/flow") <= 12
    await client.close()


async def test_a_process_that_slept_through_its_deadline_still_tries_again(world: World) -> None:
    client = world.client(PLAIN, patience=Patience(attempt_s=5.0, outage_s=1e-9))
    world.transport.before = once(httpx.ReadTimeout("slept"), path_end="/flow")
    assert await client.find_flow(SPEC) is None
    world.transport.before = once(*[httpx.ReadTimeout("gone")] * 2, path_end="/flow")
    with pytest.raises(FlowUnavailable):
        await client.find_flow(SPEC)
    await client.close()


@pytest.mark.parametrize("fault", [httpx.Response(500), httpx.Response(502), httpx.ReadError("reset")], ids=repr)
async def test_a_creation_that_may_have_happened_is_not_repeated(
    world: World, fault: httpx.Response | Exception
) -> None:
    client = world.client(PLAIN)
    world.transport.before = once(fault, path_end="/flow/ranking")
    with pytest.raises(FlowUnavailable, match="not known"):
        await client.open_flow(SPEC)
    assert world.transport.count("POST", "/flow/ranking") == 1
    await client.close()


@pytest.mark.parametrize("fault", [httpx.Response(429), httpx.ConnectError("refused")], ids=repr)
async def test_a_creation_that_surely_did_not_happen_is_repeated(world: World, fault: httpx.Response) -> None:
    client = world.client(PLAIN)
    world.transport.before = once(fault, path_end="/flow/ranking")
    await client.open_flow(SPEC)
    assert world.transport.count("POST", "/flow/ranking") == 2
    await client.close()


async def test_with_idempotency_keys_a_lost_answer_costs_nothing(world: World) -> None:
    client = world.client()
    lost = iter([True])

    def after(request: httpx.Request, response: httpx.Response) -> None:
        if request.url.path == "/flow/ranking" and next(lost, False):
            raise httpx.ReadError("reset")

    world.transport.after = after
    flow_id = await client.open_flow(SPEC)
    assert world.store.flows("", 0, 10, newest_first=True)[0] == 1
    assert world.store.flow(flow_id)[0].name == SPEC.title
    await client.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("0", 0),
        ("-3", 0),
        ("86400", 60),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("Fri, 20 Nov 2026 12:00:30 GMT", 30),
        ("Fri, 20 Nov 2026 11:00:00 GMT", 0),
        ("Fri, 20 Nov 2026", None),
    ],
)
def test_retry_after_is_honoured_within_a_minute(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, datetime(2026, 11, 20, 12, tzinfo=UTC)) == seconds


@pytest.mark.parametrize("off_s", [-3600, 0, 3600])
def test_a_date_to_wait_for_is_read_by_the_clock_of_the_service(off_s: int) -> None:
    """Our clock may be an hour off either way; what counts is how far the date is from the service's own."""
    theirs = datetime.now(UTC) + timedelta(seconds=off_s)
    header = format_datetime(theirs + timedelta(seconds=20), usegmt=True)
    service = Raw(httpx.Response(429, headers={"Retry-After": header, "Date": format_datetime(theirs, usegmt=True)}))

    async def run() -> None:
        calls = service.calls()
        start = asyncio.get_running_loop().time()
        await calls.call("GET", "/flow", wire.Page[wire.FlowRow])
        assert 20 <= asyncio.get_running_loop().time() - start <= 21

    run_virtually(run())


@pytest.mark.parametrize(
    "date",
    ["", "soon", "Fri, 20 Nov 2026 12:00:30 -0000", "Fri, 99 Nov 2026 12:00:30 GMT", "Fri, 20 Nov 99999 12:00:30 GMT"],
)
def test_a_date_that_is_none_is_none(date: str) -> None:
    assert http_date(date) is None
    assert retry_after_s(date) is None


async def test_a_401_in_mid_run_buys_one_new_token_and_then_counts(world: World) -> None:
    client = world.client(PLAIN)
    world.transport.before = once(httpx.Response(401), path_end="/flow")
    assert await client.find_flow(SPEC) is None
    assert world.transport.count("POST", "/connect/token") == 2

    world.store.tokens.revoke(world.credentials.client_id)
    with pytest.raises(CredentialsError, match=r"\$ID and \$SECRET"):
        await client.find_flow(SPEC)
    await client.close()


async def test_a_403_is_about_credentials(world: World) -> None:
    client = world.client(PLAIN)
    world.transport.before = lambda r: httpx.Response(403) if r.url.path == "/flow" else None
    with pytest.raises(CredentialsError, match="not allowed"):
        await client.find_flow(SPEC)
    await client.close()


async def test_a_refusal_carries_what_the_service_said(world: World) -> None:
    client = world.client()
    with pytest.raises(FlowRefused, match=r"answered 404: .*flow flw_gone does not exist"):
        await client.create_item("flw_gone", "dts_gone", "", 60, "key")
    await client.close()


async def test_a_redirect_is_not_followed(world: World) -> None:
    client = world.client(PLAIN)
    world.transport.before = once(
        httpx.Response(307, headers={"Location": "http://evil.example/flow"}), path_end="/flow"
    )
    with pytest.raises(FlowRefused, match="Redirects are not followed"):
        await client.find_flow(SPEC)
    assert {r.url.host for r in world.transport.requests} == {"127.0.0.1"}
    await client.close()


@pytest.mark.parametrize(
    "content",
    [
        b"<html>\x1b[31mMaintenance</html>",
        b"",
        b'{"total": 1',
        b"[]",
        b'{"total": "many", "page": 1, "pageSize": 1, "items": []}',
        b"\xff\xfe\x00",
        b'{"total": 1, "page": 1, "pageSize": 1, "items": [{"id": "x", "datasetId": "y", "state": "Paused"}]}',
        b"[" * 100_000,
    ],
    ids=["html", "empty", "cut off", "list", "wrong type", "no text", "unknown state", "deep"],
)
async def test_what_is_not_the_protocol_is_refused_by_name(world: World, content: bytes) -> None:
    client = world.client(PLAIN)
    world.transport.before = once(httpx.Response(200, content=content), path_end="/item")
    with pytest.raises(BadAnswer, match=r"GET http://127\.0\.0\.1/flow/ranking/flw_1/item answered 200") as caught:
        await client.find_item("flw_1", "dts_1")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700
    await client.close()


async def test_a_service_that_echoes_our_secrets_does_not_get_them_into_the_error(world: World) -> None:
    client = world.client(PLAIN)
    await client.find_flow(SPEC)
    access = world.transport.requests[-1].headers["Authorization"].removeprefix("Bearer ")
    echo = f"secret {world.credentials.client_secret} token {access}".encode()
    world.transport.before = once(httpx.Response(400, content=echo), path_end="/flow")
    with pytest.raises(FlowRefused) as caught:
        await client.find_flow(SPEC)
    assert world.credentials.client_secret not in str(caught.value)
    assert access not in str(caught.value)
    await client.close()


async def test_a_secret_on_the_edge_of_an_excerpt_is_not_shown_by_half(world: World) -> None:
    client = world.client(PLAIN)
    await client.find_flow(SPEC)
    secret = world.credentials.client_secret
    echo = b" " * (800 - len(secret) // 2) + secret.encode()
    world.transport.before = once(httpx.Response(400, content=echo), path_end="/flow")
    with pytest.raises(FlowRefused) as caught:
        await client.find_flow(SPEC)
    assert secret[: len(secret) // 2] not in str(caught.value)
    await client.close()


ANSWERS = {
    "flow": lambda client: client.find_flow(SPEC),
    "list": lambda client: client.find_item("flw_1", "dts_1"),
    "item": lambda client: client.statuses("flw_1", ["fli_1"]),
    "matrix": lambda client: client.vote_matrix("fli_1", ["a", "b"]),
    "dataset": lambda client: client.create_dataset("name", "key"),
    "datapoint": lambda client: client.add_datapoint("dts_1", 0, "text"),
    "create item": lambda client: client.create_item("flw_1", "dts_1", "why", 60, "key"),
    "open flow": lambda client: client.open_flow(SPEC),
}
BODIES = {
    "html": b"<html><title>Maintenance</title></html>",
    "cut off": b'{"total": 1, "items": [{"id": "x", "na',
    "error with 200": b'{"error": "internal", "message": "try later"}',
    "problem with 200": b'{"type": "about:blank", "title": "Unavailable", "status": 503, "detail": "try later"}',
    "utf-16": '{"total": 0}'.encode("utf-16"),
    "latin-1": '{"flowId": "caf\u00e9", "datasetId": "caf\u00e9"}'.encode("latin-1"),
    "null": b"null",
    "NaN": b"NaN",
    "huge number": b'{"total": ' + b"9" * 5000 + b"}",
    "huge exponent": b'{"total": 1e999999, "page": 1, "pageSize": 1, "items": [], "votes": 1e999999}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("ask", ANSWERS.values(), ids=ANSWERS)
async def test_no_answer_of_any_endpoint_is_believed_that_is_not_one(
    world: World, ask: Callable[[FlowClient], Awaitable[object]], body: bytes
) -> None:
    client = world.client(PLAIN)
    world.transport.before = lambda r: None if "token" in r.url.path else httpx.Response(200, content=body)
    with pytest.raises(BadAnswer, match=r"(GET|POST) http://127\.0\.0\.1/\S+ answered 200 with a body") as caught:
        await ask(client)
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()
    await client.close()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_no_token_is_read_from_what_is_none(world: World, body: bytes) -> None:
    client = world.client(PLAIN)
    world.transport.before = once(httpx.Response(200, content=body), path_end="/connect/token")
    with pytest.raises(BadAnswer, match=r"POST http://127\.0\.0\.1/connect/token answered 200"):
        await client.find_flow(SPEC)
    await client.close()


class Drip(httpx.AsyncByteStream):
    """A body that keeps coming: `chunk` every `pause_s`."""

    def __init__(self, chunk: bytes, pause_s: float) -> None:
        self._chunk, self._pause_s = chunk, pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(self._pause_s)
            yield self._chunk


async def test_an_endless_body_is_cut_at_the_size_cap(world: World) -> None:
    client = world.client(PLAIN)
    endless = httpx.Response(200, stream=Drip(b" " * (1 << 20), 0))
    world.transport.before = once(endless, path_end="/flow")
    with pytest.raises(BadAnswer, match=f"more than {MAX_ANSWER_BYTES >> 20} MiB"):
        await client.find_flow(SPEC)
    await client.close()


async def test_a_body_that_drips_is_cut_at_the_total_deadline(world: World) -> None:
    client = world.client(PLAIN, patience=Patience(attempt_s=0.05, outage_s=0.1, pause_s=0.01))
    world.transport.before = lambda r: httpx.Response(200, stream=Drip(b" ", 0.01)) if r.url.path == "/flow" else None
    with pytest.raises(FlowUnavailable, match=r"no whole answer within 0\.05 s"):
        await client.find_flow(SPEC)
    await client.close()


async def test_a_compressed_body_is_refused_before_it_is_unpacked(world: World) -> None:
    client = world.client(PLAIN)
    bomb = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Drip(b"x", 0))
    world.transport.before = once(bomb, path_end="/flow")
    with pytest.raises(BadAnswer, match="compressed"):
        await client.find_flow(SPEC)
    await client.close()


@dataclass
class Raw(httpx.AsyncBaseTransport):
    """Gives or raises `first`, then an empty page for ever."""

    first: httpx.Response | Exception
    requests: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        if self.requests > 1:
            return httpx.Response(200, json={"total": 0, "page": 1, "pageSize": 1, "items": []})
        if isinstance(self.first, Exception):
            raise self.first
        return self.first

    def calls(self) -> HttpCalls:
        url = "http://127.0.0.1"
        return HttpCalls(url, url + "/connect/token", Credentials(token="a-token"), transport=self)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "fault",
    [
        caused(httpx.ConnectError("certificate verify failed"), ssl.SSLCertVerificationError("self-signed")),
        caused(httpx.ConnectError("wrong version number"), ssl.SSLError("wrong version number")),
        httpx.LocalProtocolError("Illegal header value b'a-token'"),
        httpx.UnsupportedProtocol("no scheme"),
    ],
    ids=repr,
)
def test_what_cannot_pass_is_refused_at_once(fault: Exception) -> None:
    service = Raw(fault)
    with pytest.raises(FlowRefused, match=r"TLS to 127\.0\.0\.1 failed|cannot be sent") as caught:
        run_virtually(service.calls().call("GET", "/flow", wire.Page[wire.FlowRow]))
    assert service.requests == 1
    assert "a-token" not in str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [
        caused(httpx.ConnectError("no such host"), socket.gaierror(-2, "Name or service not known")),
        caused(httpx.ConnectError("hung up"), ssl.SSLEOFError("EOF in the middle of the handshake")),
        caused(httpx.ReadError("bad record mac"), ssl.SSLError("bad record mac")),
        httpx.ConnectTimeout("slow"),
        httpx.ProxyError("502"),
    ],
    ids=repr,
)
def test_what_may_pass_is_asked_again(fault: Exception) -> None:
    service = Raw(fault)
    run_virtually(service.calls().call("GET", "/flow", wire.Page[wire.FlowRow]))
    assert service.requests == 2


async def test_a_server_without_tls_is_told_apart_from_one_that_is_down() -> None:
    """Over real sockets: what the libraries underneath raise is not ours to decide."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = FlowClient(f"https://127.0.0.1:{port}", Credentials(token="t0ken"), patience=Patience(5.0, 0.2, 0.01))
        with pytest.raises(FlowRefused, match=r"TLS to 127\.0\.0\.1 failed"):
            await client.find_flow(SPEC)
        await client.close()
    client = FlowClient(f"https://127.0.0.1:{port}", Credentials(token="t0ken"), patience=Patience(5.0, 0.2, 0.01))
    with pytest.raises(FlowUnavailable, match="ConnectError"):
        await client.find_flow(SPEC)
    await client.close()


async def test_a_host_that_does_not_resolve_is_asked_for_until_the_patience_ends() -> None:
    client = FlowClient("http://rlhf.invalid", Credentials(token="t0ken"), patience=Patience(5.0, 0.2, 0.01))
    with pytest.raises(FlowUnavailable, match=r"GET http://rlhf\.invalid/flow: ConnectError: .*resume"):
        await client.find_flow(SPEC)
    await client.close()


@pytest.mark.parametrize(
    "url", ["votes.example.org", "ftp://votes.example.org", "http://", "", "http://[::1", "http://localhost:99999"]
)
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(FlowRefused, match="no address"):
        FlowClient(url, Credentials())


def test_missing_credentials_are_named() -> None:
    with pytest.raises(CredentialsError, match="RAPIDATA_CLIENT_SECRET is not set"):
        credentials_from_environment(environment={"RAPIDATA_CLIENT_ID": "me", "RAPIDATA_CLIENT_SECRET": " "})
    with pytest.raises(CredentialsError, match="VOTES_TOKEN"):
        credentials_from_environment(token_env="VOTES_TOKEN", environment={})
    found = credentials_from_environment("A", "B", environment={"A": "me", "B": "secret"})
    assert (found.client_id, found.client_secret) == ("me", "secret")


@pytest.mark.parametrize("counts", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_thresholds_out_of_order_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="min <= desired <= max"):
        Responses(*counts)


def test_a_fingerprint_follows_the_content() -> None:
    same = FlowSpec(SPEC.name, SPEC.instruction, SPEC.responses, SPEC.ttl_s)
    assert same.fingerprint() == SPEC.fingerprint()
    assert len(SPEC.fingerprint()) == 64
    assert FlowSpec(SPEC.name, SPEC.instruction + "?", SPEC.responses, SPEC.ttl_s).fingerprint() != SPEC.fingerprint()


# The vote matrix: whatever cannot be mapped to the candidates for sure is refused.

GOOD = {"index": ["a", "b", "c"], "columns": ["a", "b", "c"], "data": [[0, 2, 1], [1, 0, 0.5], [0, 0.5, 0]]}


@pytest.mark.parametrize(
    "change",
    [
        {"index": ["a", "b", "x"], "columns": ["a", "b", "x"]},
        {"index": ["a", "b"], "columns": ["a", "b"], "data": [[0, 1], [1, 0]]},
        {"index": ["a", "a", "c"]},
        {"columns": ["a", "a", "c"]},
        {"columns": ["a", "b", "x"]},
        {"columns": ["a", "b"]},
        {"data": [[0, 2], [1, 0], [0, 0]]},
        {"data": [[0, 2, 1], [1, 0, 0]]},
        {"data": [[0, -2, 1], [1, 0, 0], [0, 0, 0]]},
        {"data": [[1, 2, 1], [1, 0, 0], [0, 0, 0]]},
        {"sortIndex": [0, 2, 1]},
        {"sortIndex": [0, 1]},
    ],
)
def test_a_matrix_about_other_candidates_is_never_used(change: dict[str, object]) -> None:
    with pytest.raises(BadAnswer, match="item fli_7"):
        in_order_of(["a", "b", "c"], VoteMatrix.model_validate({**GOOD, **change}), "fli_7")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "null", '"many"', "[]"])
async def test_a_matrix_with_something_that_is_no_count_is_never_used(world: World, number: str) -> None:
    content = json.dumps(GOOD).replace("0.5", number).encode()
    world.transport.before = once(httpx.Response(200, content=content), path_end="/vote-matrix")
    client = world.client(PLAIN)
    with pytest.raises(BadAnswer, match="fli_7"):
        await client.vote_matrix("fli_7", ["a", "b", "c"])
    await client.close()


@given(order=st.permutations(range(3)), columns=st.permutations(range(3)))
def test_rows_and_columns_are_matched_by_label_each_by_itself(order: list[int], columns: list[int]) -> None:
    texts, data = GOOD["index"], GOOD["data"]
    shuffled = VoteMatrix(
        index=[texts[i] for i in order],
        columns=[texts[j] for j in columns],
        data=[[data[i][j] for j in columns] for i in order],
    )
    assert in_order_of(texts, shuffled, "fli_7").wins.tolist() == data
