"""The server inside the training process: starts, votes, ends without a trace, goes on later."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from flow_world import group, until

from rlhf_cli.errors import CredentialsError, RlhfError
from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.flow.base import FlowSpec, Responses
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import Event, GroupSubmitted
from rlhf_cli.server.crowd import CrowdSettings
from rlhf_cli.server.embedded import EmbeddedFlow
from rlhf_cli.types import RankedGroup

SPEC = FlowSpec("smoke", "Which has more vowels?", Responses(4, 6, 8), ttl_s=30)
CROWD = CrowdSettings(raters=10, taste="letters", latency_p50_s=0.01, latency_p95_s=0.03, dropout=0.02, agreement=0.9)
TEXTS = ["xxxx", "axxx", "aaxx", "aaax", "aaaa"]


def client_of(flow: EmbeddedFlow) -> FlowClient:
    return FlowClient(flow.url, Credentials(flow.client_id, flow.client_secret))


async def open_flow(flow: EmbeddedFlow) -> str:
    client = client_of(flow)
    try:
        return await client.find_flow(SPEC) or await client.open_flow(SPEC)
    finally:
        await client.close()


def test_simulated_people_rank_groups_over_real_http_and_every_vote_is_in_the_store(tmp_path: Path) -> None:
    events: list[Event] = []
    threads = threading.active_count()
    with EmbeddedFlow(tmp_path / "flow" / "server.sqlite", CROWD, seed=3) as flow:
        flow_id = asyncio.run(open_flow(flow))
        votes = VotesFeedback(lambda: client_of(flow), flow_id, SPEC, events.append, run_id="run", poll_s=0.05)
        groups = [group(number, TEXTS) for number in range(6)]
        for one in groups:
            votes.submit(one)
        decided: list[RankedGroup] = []

        def all_back() -> bool:
            decided.extend(votes.collect())  # type: ignore[arg-type]
            return len(decided) == len(groups)

        until(all_back, 30)
        status = votes.status()
        votes.close()

        assert {ranked.group.id for ranked in decided} == {one.id for one in groups}
        for ranked in decided:
            item_id = ranked.source.removeprefix("item:")
            assert ranked.wins == flow.store.matrix(item_id)
            assert ranked.complete
            assert 6 <= ranked.wins.votes <= 8
        total = sum(ranked.wins.wins for ranked in decided)
        assert total[4].sum() > total[:, 4].sum()  # the crowd's favourite wins
        assert all(vote.rater_id.startswith("rater_simulated") for vote in flow.store.votes())
        assert status["flow/in_flight"] == 0
        assert status["flow/votes_total"] == sum(ranked.wins.votes for ranked in decided)
        began = time.monotonic()
    assert time.monotonic() - began < 1.0
    assert threading.active_count() == threads
    assert len([event for event in events if isinstance(event, GroupSubmitted)]) == 6


def test_reopening_goes_on_with_the_same_items_and_new_credentials(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite"
    with EmbeddedFlow(path) as first:
        flow_id, old_secret = asyncio.run(open_flow(first)), first.client_secret
        item_id = asyncio.run(make_item(first, flow_id))
    with EmbeddedFlow(path, CROWD) as second:
        assert asyncio.run(open_flow(second)) == flow_id  # found again
        until(lambda: second.store.item(item_id).state.terminal)
        assert second.store.item(item_id).votes >= 6
        with pytest.raises(CredentialsError):
            asyncio.run(open_with(second.url, old_secret))
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert old_secret.encode() not in content
    assert second.client_secret.encode() not in content


async def make_item(flow: EmbeddedFlow, flow_id: str) -> str:
    client = client_of(flow)
    dataset_id = await client.create_dataset("dataset", "key")
    for place, text in enumerate(TEXTS):
        await client.add_datapoint(dataset_id, place, text)
    item_id = await client.create_item(flow_id, dataset_id, "", 30, "key")
    await client.close()
    return item_id


async def open_with(url: str, secret: str) -> None:
    client = FlowClient(url, Credentials("client_embedded", secret))
    try:
        await client.open_flow(SPEC)
    finally:
        await client.close()


def test_it_listens_on_loopback_and_only_while_open(tmp_path: Path) -> None:
    with EmbeddedFlow(tmp_path / "server.sqlite") as flow:
        host, port = flow.url.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        assert httpx.get(f"{flow.url}/healthz").json() == {"status": "ok"}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=1)


def test_a_proxy_of_the_environment_does_not_stand_between_us_and_ourselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with EmbeddedFlow(tmp_path / "server.sqlite", CROWD) as flow:
        item_id = asyncio.run(make_item(flow, asyncio.run(open_flow(flow))))
        until(lambda: flow.store.item(item_id).state.terminal)


def test_an_unknown_taste_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RlhfError, match="no taste 'sour'"):
        EmbeddedFlow(tmp_path / "server.sqlite", CrowdSettings(taste="sour"))
    assert list(tmp_path.iterdir()) == []


def test_a_crowd_that_breaks_is_a_failure_and_not_silence(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught, EmbeddedFlow(tmp_path / "server.sqlite", CROWD) as flow:  # noqa: PT012
        for number in range(CROWD.raters):
            flow.store.tokens.revoke(f"rater_simulated_embedded_{number:03d}")
        until(lambda: not flow._thread.is_alive())
    assert caught.group_contains(httpx.HTTPStatusError)
