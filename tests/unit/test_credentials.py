"""Credentials are found where the vendor's own client finds them, kept fresh, and shown to nobody."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from virtual_time import run_virtually

from rlhf_cli.errors import CredentialsError
from rlhf_cli.flow.base import BadAnswer
from rlhf_cli.flow.credentials import Credentials, credentials_from_environment, read_token_file
from rlhf_cli.flow.http import HttpCalls, Patience
from rlhf_cli.flow.wire import FlowRow, Page

AUTH = "https://auth.rapidata.ai"
BOTH = {"RAPIDATA_CLIENT_ID": "env-id", "RAPIDATA_CLIENT_SECRET": "env-secret"}
Rows = Page[FlowRow]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def token_file(folder: Path, token: str = "file-token", **members: object) -> Path:
    path = folder / "token.json"
    path.write_text(json.dumps({"access_token": token, "token_type": "Bearer", **members}))
    return path


def stored(home: Path, *entries: dict[str, object], url: str = AUTH, mode: int = 0o600) -> Path:
    path = home / ".config/rapidata/credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({url: entries}))
    path.chmod(mode)
    return path


def entry(name: str, last_used: str | None) -> dict[str, object]:
    return {
        "display_name": name,
        "client_id": f"{name}-id",
        "client_secret": f"{name}-secret",
        "endpoint": AUTH,
        "created_at": "2026-01-01T00:00:00+00:00",
        "last_used": last_used,
    }


OLD, NEW = entry("old", "2026-10-01T00:00:00+00:00"), entry("new", "2026-11-01T00:00:00+00:00")


def test_the_vendors_order_holds(home: Path) -> None:
    stored(home, OLD, NEW, entry("never", None))
    path = token_file(home)

    everything = credentials_from_environment(environment={**BOTH, "RAPIDATA_TOKEN_FILE": str(path)}, auth_url=AUTH)
    variables = credentials_from_environment(environment=BOTH, auth_url=AUTH + "/")
    login = credentials_from_environment(environment={}, auth_url=AUTH)

    assert (everything.token_file, everything.client_secret) == (path, "")
    assert (variables.client_id, variables.client_secret) == ("env-id", "env-secret")
    assert (login.client_id, login.client_secret) == ("new-id", "new-secret")
    assert "credentials.json" in login.origin


def test_what_was_made_for_the_vendor_goes_to_no_other_service(home: Path) -> None:
    stored(home, NEW)
    everything = {**BOTH, "RAPIDATA_TOKEN_FILE": str(token_file(home))}
    assert credentials_from_environment(environment=everything).client_id == "env-id"
    with pytest.raises(CredentialsError, match="not set"):
        credentials_from_environment(environment={}, auth_url="https://auth.example.org")
    with pytest.raises(CredentialsError, match="MY_ID"):
        credentials_from_environment("MY_ID", "MY_SECRET", environment=everything, auth_url=AUTH)


def test_one_variable_of_two_is_a_mistake_and_not_a_reason_to_look_elsewhere(home: Path) -> None:
    stored(home, NEW)
    with pytest.raises(CredentialsError, match="RAPIDATA_CLIENT_SECRET is not set"):
        credentials_from_environment(environment={"RAPIDATA_CLIENT_ID": "env-id"}, auth_url=AUTH)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_stored_secrets_that_others_may_read_are_refused(home: Path, mode: int) -> None:
    stored(home, NEW, mode=mode)
    with pytest.raises(CredentialsError, match="chmod 600"):
        credentials_from_environment(environment={}, auth_url=AUTH)


@pytest.mark.parametrize("content", ["", "[]", '{"https://auth.rapidata.ai": [{"client_secret": "top-secret"}]}'])
def test_a_stored_file_that_is_none_is_named_without_its_content(home: Path, content: str) -> None:
    stored(home).write_text(content)
    with pytest.raises(CredentialsError, match=r"credentials\.json is not what") as caught:
        credentials_from_environment(environment={}, auth_url=AUTH)
    assert "top-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"access_token": ""}',
        '{"access_token": "top secret"}',
        '{"access_token": "top-secret\\n"}',
        '{"access_token": "caf\u00e9"}',
    ],
)
def test_a_token_file_without_a_token_is_named_without_its_content(home: Path, content: str) -> None:
    path = home / "token.json"
    path.write_text(content)
    with pytest.raises(CredentialsError, match=r"token\.json .* holds no token") as caught:
        read_token_file(path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_token_file_that_is_not_there_is_named() -> None:
    with pytest.raises(CredentialsError, match=r"nowhere.*No such file"):
        credentials_from_environment(environment={"RAPIDATA_TOKEN_FILE": "nowhere"}, auth_url=AUTH)


def test_a_token_with_a_line_break_never_reaches_a_header() -> None:
    with pytest.raises(CredentialsError, match="TOKEN holds something that is no token") as caught:
        credentials_from_environment(token_env="TOKEN", environment={"TOKEN": "top\nsecret"})
    assert "secret" not in str(caught.value)


@dataclass
class Service(httpx.AsyncBaseTransport):
    """Takes the tokens in `valid`; sells what `token` says."""

    valid: set[str]
    token: dict[str, object] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    """The token of each request, `basic` where one was asked for."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/connect/token":
            self.seen.append("basic")
            return httpx.Response(200, json=self.token)
        token = request.headers["Authorization"].removeprefix("Bearer ")
        self.seen.append(token)
        if token not in self.valid:
            return httpx.Response(401, text=f"{request.headers['Authorization']} is over")
        return httpx.Response(200, json={"total": 0, "page": 1, "pageSize": 1, "items": []})

    def calls(self, credentials: Credentials, clock: list[float]) -> HttpCalls:
        url = "http://127.0.0.1"
        return HttpCalls(
            url,
            url + "/connect/token",
            credentials,
            patience=Patience(),
            transport=self,
            clock=lambda: clock[0],
        )


async def ask(calls: HttpCalls) -> None:
    await calls.call("GET", "/flow", Rows)


def test_a_token_file_is_read_again_near_the_end_of_its_token(home: Path) -> None:
    path, clock, service = token_file(home, "one", expires_at=time.time() + 600), [0.0], Service({"one", "two"})

    async def run() -> None:
        calls = service.calls(Credentials(token_file=path), clock)
        await ask(calls)
        token_file(home, "two", expires_at=time.time() + 1200)
        clock[0] = 500.0
        await ask(calls)
        clock[0] = 545.0
        await ask(calls)

    run_virtually(run())
    assert service.seen == ["one", "one", "two"]


def test_a_token_file_is_read_again_once_on_401(home: Path) -> None:
    path, service = token_file(home, "one", expires_at=time.time() + 600), Service({"one"})

    async def run() -> None:
        calls = service.calls(Credentials(token_file=path, origin="$RAPIDATA_TOKEN_FILE"), [0.0])
        await ask(calls)
        token_file(home, "two")
        service.valid = {"two"}
        await ask(calls)
        service.valid = set()
        with pytest.raises(CredentialsError, match=r"\$RAPIDATA_TOKEN_FILE: expired") as caught:
            await ask(calls)
        assert "two" not in str(caught.value)

    run_virtually(run())
    assert service.seen == ["one", "one", "two", "two", "two"]


def test_a_token_file_caught_while_it_is_written_does_not_end_the_run(home: Path) -> None:
    path, service = token_file(home, "one", expires_at=0), Service({"one"})

    async def run() -> None:
        calls = service.calls(Credentials(token_file=path), [0.0])
        await ask(calls)
        path.write_text("")
        await ask(calls)
        service.valid = set()
        with pytest.raises(CredentialsError, match="holds no token"):
            await ask(calls)

    run_virtually(run())


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_a_wrong_wall_clock_neither_ends_nor_renews_a_token(
    home: Path, off_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time
    path = token_file(home, "file", expires_at=right() + 600)
    monkeypatch.setattr(time, "time", lambda: right() + off_s)
    service = Service({"bought", "file", "later"}, {"access_token": "bought", "expires_in": 600})

    async def run() -> None:
        bought, clock = Credentials("id", "secret"), [0.0]
        calls = service.calls(bought, clock)
        for clock[0] in (0.0, 530.0, 545.0):
            await ask(calls)
        calls = service.calls(Credentials(token_file=path), clock)
        await ask(calls)
        token_file(home, "later", expires_at=right() + 1200)
        service.valid -= {"file"}
        await ask(calls)

    run_virtually(run())
    assert service.seen[:5] == ["basic", "bought", "bought", "basic", "bought"]
    assert service.seen[5] == "file"
    assert service.seen[-1] == "later"
    assert len(service.seen) <= 8


@pytest.mark.parametrize("expires_in", [0, -5, None, "3600", 10**400])
def test_a_lifetime_that_makes_no_sense_does_not_buy_a_token_for_each_call(expires_in: object) -> None:
    service = Service({"x"}, {"access_token": "x", "expires_in": expires_in})

    async def run() -> None:
        calls = service.calls(Credentials("id", "secret"), [0.0])
        for _ in range(3):
            await ask(calls)

    run_virtually(run())
    assert service.seen == ["basic", "x", "x", "x"]


def test_a_bought_token_that_cannot_be_sent_is_a_bad_answer() -> None:
    service = Service(set(), {"access_token": "top\nsecret"})

    async def run() -> None:
        with pytest.raises(BadAnswer, match="cannot be sent in a header") as caught:
            await ask(service.calls(Credentials("id", "secret"), [0.0]))
        assert "secret" not in str(caught.value)

    run_virtually(run())


def test_no_form_of_the_secret_is_shown() -> None:
    credentials = Credentials("id", "top-secret", origin="here")
    said = credentials.redact(f"id, top-secret, Basic {credentials.basic}")
    assert said == "id, [redacted], Basic [redacted]"
    assert "top-secret" not in repr(credentials)
