"""What is acknowledged is kept: kill -9 of a real server under load, a full disk, a database that is locked."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import httpx
import pytest
from flow_world import Clock, World, open_item, take
from serve_world import serve, start

from rlhf_cli.flow.base import Responses
from rlhf_cli.server.database import Database
from rlhf_cli.server.store import Store


async def vote_until_it_dies(url: str, secrets: list[str], acknowledged: list[str]) -> None:
    """Everybody takes pairs and votes; `acknowledged` holds leases whose vote was answered with 204."""
    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=8)) as http:

        async def person(secret: str) -> None:
            headers = {"Authorization": f"Bearer {secret}"}
            while True:
                try:
                    lease = (await http.post("/vote/lease", headers=headers)).json()["lease"]
                    reply = await http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=headers)
                except (httpx.TransportError, ValueError):
                    return
                if reply.status_code == 204:
                    acknowledged.append(lease)

        await asyncio.gather(*map(person, secrets))


async def test_kill_9_under_load_loses_no_acknowledged_vote(tmp_path: Path) -> None:
    store = Store(tmp_path / "server.sqlite")
    world = World(store, Clock(), None, None)  # type: ignore[arg-type]
    for _ in range(60):
        open_item(world, texts=8, responses=Responses(8, 12, 16), ttl_s=3600)
    secrets = [secret for _, secret in store.tokens.add_simulated("load", 8)]
    store.close()

    for _ in range(2):  # the second server starts on what the first one left
        acknowledged: list[str] = []
        served = start(tmp_path)
        voting = asyncio.create_task(vote_until_it_dies(served.url, secrets, acknowledged))
        while len(acknowledged) < 60:
            await asyncio.sleep(0.01)
        served.process.kill()
        await voting
        served.process.wait()
        assert served.process.stderr is not None
        served.process.stderr.close()

        check = sqlite3.connect(tmp_path / "server.sqlite")
        assert check.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert check.execute("PRAGMA foreign_key_check").fetchall() == []
        kept = {row[0] for row in check.execute("SELECT lease_id FROM votes WHERE late = 0")}
        counters = check.execute(
            "SELECT votes, live, (SELECT COUNT(*) FROM votes v WHERE v.item_id = items.id AND NOT late), "
            "(SELECT COUNT(*) FROM leases l WHERE l.item_id = items.id AND l.state = 'live') FROM items"
        ).fetchall()
        check.close()
        assert set(acknowledged) <= kept
        assert all((votes, live) == (counted, held) for votes, live, counted, held in counters)


def test_a_signal_stops_it_cleanly_and_the_folder_is_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        with serve(tmp_path) as served:
            assert httpx.get(f"{served.url}/healthz").status_code == 200
        assert not (tmp_path / "server.sqlite-wal").exists()  # closed, not abandoned


@pytest.fixture
def served_world(tmp_path: Path) -> World:
    return World(Store(tmp_path / "server.sqlite"), Clock(), None, None)  # type: ignore[arg-type]


async def test_a_full_disk_is_answered_503_and_takes_nothing_acknowledged_with_it(served_world: World) -> None:
    store = served_world.store
    item_id = open_item(served_world, texts=16, responses=Responses(1, 100, 100))
    pairs = [take(served_world) for _ in range(40)]
    connection = store._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    acknowledged, failed = set(), set()
    for start_at in range(0, 40, 8):  # eight at a time share a transaction
        batch = pairs[start_at : start_at + 8]

        def vote(lease: str, rater_id: str) -> bool:
            store._database._connection.execute("CREATE TABLE IF NOT EXISTS ballast (x BLOB)")
            store._database._connection.execute("INSERT INTO ballast VALUES (zeroblob(1500))")
            return store.vote(lease, rater_id, "left")

        results = await asyncio.gather(
            *(store.together(lambda p=pair, r=rater_id: vote(p.id, r)) for pair, rater_id in batch),
            return_exceptions=True,
        )
        for (pair, _), result in zip(batch, results, strict=True):
            (acknowledged if result is True else failed).add(pair.id)
            assert result is True or isinstance(result, sqlite3.OperationalError)
    assert failed
    assert {vote.lease_id for vote in store.votes(item_id)} == acknowledged
    connection.execute("PRAGMA max_page_count = 100000")
    for pair, rater_id in pairs:
        if pair.id in failed:
            assert await store.together(lambda p=pair, r=rater_id: store.vote(p.id, r, "left"))
    assert len(store.votes(item_id)) == 40
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    store.close()


async def test_one_bad_vote_in_a_shared_transaction_spoils_no_other(served_world: World) -> None:
    store = served_world.store
    item_id = open_item(served_world)
    (first, one), (second, other) = take(served_world), take(served_world)
    results = await asyncio.gather(
        store.together(lambda: store.vote(first.id, one, "left")),
        store.together(lambda: store.vote(second.id, other, None)),  # type: ignore[arg-type]
        store.together(lambda: store.vote(second.id, one, "left")),
        store.together(lambda: store.vote(second.id, other, "right")),
        return_exceptions=True,
    )
    assert results[0] is True
    assert isinstance(results[1], sqlite3.IntegrityError)
    assert getattr(results[2], "status", None) == 403
    assert results[3] is True
    assert [vote.outcome for vote in store.votes(item_id)] == ["left", "right"]
    store.close()


async def test_a_database_that_another_process_holds_is_answered_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_cli.server import database
    from rlhf_cli.server.app import create_app

    monkeypatch.setattr(database, "BUSY_S", 0.05)
    store = Store(tmp_path / "server.sqlite")
    _, secret = store.tokens.add("rater", "ada")
    world = World(store, Clock(), None, None)  # type: ignore[arg-type]
    item_id = open_item(world)
    transport = httpx.ASGITransport(app=create_app(store))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        headers = {"Authorization": f"Bearer {secret}"}
        lease = (await http.post("/vote/lease", headers=headers)).json()["lease"]
        other = Database(tmp_path / "server.sqlite")
        with other.transaction():
            began = time.monotonic()
            reply = await http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=headers)
            assert time.monotonic() - began < 5
        other.close()
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
        assert (await http.post(f"/vote/{lease}", json={"outcome": "left"}, headers=headers)).status_code == 204
    assert len(store.votes(item_id)) == 1
    store.close()
