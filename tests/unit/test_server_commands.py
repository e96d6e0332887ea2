"""`rlhf serve`, `raters`, `tokens` and `crowd` as somebody types them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import pytest
from serve_world import RLHF, Served, serve
from typer.testing import CliRunner, Result

from rlhf_cli.cli.crowd import find_taste
from rlhf_cli.cli.main import app
from rlhf_cli.errors import RlhfError, UsageError
from rlhf_cli.server.data_dir import DataDir


def rlhf(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_a_client_made_by_the_command_gets_a_token_until_it_is_revoked(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        add = ("tokens", "add", "trainer", "--role", "client", "--data", str(tmp_path))
        made = json.loads(rlhf(*add, "--json").stdout)
        assert made.keys() == {"name", "role", "id", "secret"}
        form = {"grant_type": "client_credentials"}

        def ask() -> int:
            return httpx.post(f"{served.url}/connect/token", data=form, auth=(made["id"], made["secret"])).status_code

        assert ask() == 200
        assert isinstance(rlhf(*add).exception, UsageError)
        listed = json.loads(rlhf("tokens", "ls", "--data", str(tmp_path), "--json").stdout)
        assert [(row["name"], row["role"], row["state"]) for row in listed] == [("trainer", "client", "active")]
        assert made["secret"] not in str(listed)
        assert rlhf("tokens", "revoke", "trainer", "--data", str(tmp_path)).exit_code == 0
        assert ask() == 401


def test_a_rater_gets_a_link_to_the_running_server_that_lets_in_once(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        made = json.loads(rlhf("raters", "add", "ada", "--data", str(tmp_path), "--json").stdout)
        again = json.loads(rlhf("raters", "add", "ada", "--data", str(tmp_path), "--json").stdout)
        assert made.keys() == {"name", "link"}
        assert made["link"].startswith(f"{served.url}/join/")
        assert made["link"] != again["link"]
        with served.store() as store:
            secret = made["link"].rsplit("/", 1)[1]
            entered = store.tokens.redeem_link(secret)
            assert entered is not None
            assert (entered[0].label, entered[0].role) == ("ada", "rater")
            assert store.tokens.redeem_link(secret) is None
        (row,) = json.loads(rlhf("raters", "stats", "--data", str(tmp_path), "--json").stdout)
        assert (row["name"], row["votes"], row["left_share"]) == ("ada", 0, None)
        assert rlhf("raters", "revoke", "ada", "--data", str(tmp_path)).exit_code == 0
        assert isinstance(rlhf("raters", "revoke", "ada", "--data", str(tmp_path)).exception, UsageError)


@pytest.mark.parametrize(
    "command", [("raters", "ls"), ("raters", "stats"), ("tokens", "ls"), ("tokens", "revoke", "x")]
)
def test_a_folder_without_a_server_is_not_made_by_looking(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = rlhf(*command, "--data", str(tmp_path / "typo"))
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bind", "0.0.0.0:0"], "--allow-remote"),
        (["--bind", "0.0.0.0:0", "--allow-remote"], "--insecure-http"),
        (["--bind", "0.0.0.0:0", "--allow-remote", "--tls-cert", "a.pem"], "belong together"),
        (["--bind", "8080"], "HOST:PORT"),
        (["--bind", "127.0.0.1:99999"], "HOST:PORT"),
        (["--bind", "no-such-host.invalid:80"], "no address"),
        (["--bind", "127.0.0.1:0", "--tls-cert", "missing.pem", "--tls-key", "missing.pem"], "certificate"),
    ],
)
def test_what_would_not_be_safe_or_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, options: list[str], says: str
) -> None:
    result = rlhf("serve", "--data", str(tmp_path / "data"), *options)
    assert isinstance(result.exception, RlhfError)
    assert says in str(result.exception)


def test_a_second_server_on_the_same_folder_is_refused_with_exit_code_8(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        command = [*RLHF, "serve", "--data", str(tmp_path), "--bind", "127.0.0.1:0"]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 8
        assert str(served.process.pid) in second.stderr


def test_other_machines_are_served_when_asked_to_and_under_the_name_that_was_given(tmp_path: Path) -> None:
    command = [*RLHF, "serve", "--data", str(tmp_path), "--bind", "0.0.0.0:0", "--allow-remote", "--insecure-http"]
    process = subprocess.Popen([*command, "--url", "https://votes.example.org"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == "serving https://votes.example.org\n"
        port = int(process.stderr.readline().rsplit(":", 1)[1])
        for host, status in (("votes.example.org", 200), ("evil.example", 400)):
            assert httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"Host": host}).status_code == status
        assert DataDir(tmp_path).url() == "https://votes.example.org"
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    rlhf("tokens", "add", "boss", "--role", "owner", "--data", str(tmp_path / "data"))
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0


def crowd(served: Served, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*RLHF, "crowd", served.url, "--raters", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_crowd_needs_an_owner_and_says_so(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        assert crowd(served).returncode == 4
        assert crowd(served, "--token", "wrong").returncode == 4
        refused = crowd(served, "--token", served.token("client", "c")[1])
        assert refused.returncode == 4
        assert "--role owner" in refused.stderr
    assert crowd(served, "--token", "any").returncode == 75


def test_tastes_are_found_by_name_or_function() -> None:
    assert find_taste("letters")("", "aa") == 10
    assert find_taste("rlhf_cli.server.tastes:brief")("", "Yes.") == 0.9
    for name in ("sour", "no.such.module:f", "rlhf_cli.server.tastes:nothing", "rlhf_cli.server.tastes:TASTES"):
        with pytest.raises(UsageError):
            find_taste(name)
