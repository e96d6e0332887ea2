"""Durable votes a second that `rlhf serve` acknowledges to 8 clients, beside a bare SQLite loop in the same run.

    OMP_NUM_THREADS=1 python benchmarks/server.py
    OMP_NUM_THREADS=1 python benchmarks/server.py --votes 4000 --rounds 5 --json FILE

Three processes: this one, `rlhf serve`, and one with the 8 clients, each on a connection of its own. A vote is counted
when its 204 has arrived, which the server sends after its transaction is on disk. Raters are simulated ones, so that
no rate limit is in the way. Groups have 8 completions and want 8, 12, at most 16 votes.

Rows:
- bare loop: one thread, one INSERT of the same row into the same tables' `votes` and its indexes, one transaction each,
  WAL and FULL as in the server; no HTTP, no lease, no counting;
- votes: pairs were leased before the clock started, so that only votes are timed, as in the bare loop;
- lease and vote: every client takes a pair, then votes on it; both requests are durable and both are in the time.

Bare loop and server take turns, and the ratio is the median over rounds, because the disk is shared with others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import httpx
import uvloop
from machine import write

from rlhf_cli.flow.base import Responses
from rlhf_cli.server.store import Store

CLIENTS = 8
SIZE, RESPONSES = 8, Responses(8, 12, 16)
HEAD_END = b"\r\n\r\n"


def prepare(folder: Path, votes: int) -> str:
    """Items enough for so many votes; returns an owner's secret."""
    store = Store(folder / "server.sqlite")
    flow_id = store.create_flow("benchmark", "Which answer is more helpful?", RESPONSES)
    with store._database.transaction():  # one flush for all of them
        for _ in range(votes // RESPONSES.desired + CLIENTS):
            dataset_id = store.create_dataset("group")
            for place in range(SIZE):
                store.add_datapoint(dataset_id, place, f"Answer {place} of some length, as answers have it. " * 4)
            store.create_item(flow_id, dataset_id, "What is a river?", 86_400)
    _, secret = store.tokens.add("owner", "benchmark")
    store.close()
    return secret


def bare_loop(folder: Path, votes: int) -> float:
    """Votes a second of one thread that inserts and commits."""
    path = folder / "bare.sqlite"
    for file in folder.glob("bare.sqlite*"):
        file.unlink()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(
        "CREATE TABLE votes (id INTEGER PRIMARY KEY, lease_id TEXT NOT NULL UNIQUE, item_id TEXT NOT NULL, "
        "rater_id TEXT NOT NULL, left INTEGER NOT NULL, right INTEGER NOT NULL, outcome TEXT NOT NULL, "
        "response_ms INTEGER, late INTEGER NOT NULL, created_at REAL NOT NULL) STRICT"
    )
    db.execute("CREATE INDEX votes_by_item ON votes (item_id)")
    rows = [(f"{random.getrandbits(128):032x}", f"fli_{n // 12:016x}", f"rater_{n % 500:08x}") for n in range(votes)]
    began = time.perf_counter()
    for lease_id, item_id, rater_id in rows:
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            "INSERT INTO votes VALUES (NULL, ?, ?, ?, 0, 1, 'left', 1000, 0, ?)",
            (lease_id, item_id, rater_id, time.time()),
        )
        db.execute("COMMIT")
    elapsed_s = time.perf_counter() - began
    db.close()
    return votes / elapsed_s


class Client:
    """One connection; sends a request and reads its answer."""

    async def connect(self, port: int) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)

    async def post(self, path: str, secret: str, body: bytes = b"") -> tuple[int, bytes]:
        self._writer.write(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (path.encode(), secret.encode(), len(body), body)
        )
        head = await self._reader.readuntil(HEAD_END)
        status, length = int(head[9:12]), 0
        if status != 204:
            lower = head.lower()
            start = lower.index(b"content-length:") + 15
            length = int(lower[start : lower.index(b"\r\n", start)])
        return status, await self._reader.readexactly(length) if length else b""


async def take(client: Client, secret: str) -> str:
    status, body = await client.post("/vote/lease", secret)
    assert status == 200, f"no pair: {status}"
    return str(json.loads(body)["lease"])


async def cast(client: Client, secret: str, lease: str) -> None:
    status, body = await client.post(f"/vote/{lease}", secret, b'{"outcome":"left","response_ms":1000}')
    assert status == 204, f"not counted: {status} {body!r}"


def drive(port: int, secrets: list[str], votes: int, in_hand: bool) -> dict[str, float]:
    """Runs in a process of its own. `in_hand`: pairs are leased before the clock starts."""
    times_s: list[float] = []
    people = deque(secrets)

    async def vote(client: Client, leased: deque[tuple[str, str]], count: int) -> None:
        for _ in range(count):
            began = time.perf_counter()
            if in_hand:
                secret, lease = leased.popleft()
            else:
                people.rotate(1)
                secret = people[0]
                lease = await take(client, secret)
                began_vote = time.perf_counter()
            await cast(client, secret, lease)
            times_s.append(time.perf_counter() - (began if in_hand else began_vote))

    async def main() -> float:
        clients = [Client() for _ in range(CLIENTS)]
        leased: deque[tuple[str, str]] = deque()
        for client in clients:
            await client.connect(port)

        async def lease_some(client: Client, some: list[str]) -> None:
            for secret in some:
                leased.append((secret, await take(client, secret)))

        if in_hand:
            await asyncio.gather(*(lease_some(c, secrets[n:votes:CLIENTS]) for n, c in enumerate(clients)))
            random.Random(0).shuffle(leased)
        began = time.perf_counter()
        await asyncio.gather(*(vote(client, leased, votes // CLIENTS) for client in clients))
        return time.perf_counter() - began

    elapsed_s = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
    ordered = sorted(times_s)
    return {
        "per_s": len(ordered) / elapsed_s,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[int(0.99 * len(ordered))],
    }


def served(folder: Path, votes: int, in_hand: bool) -> dict[str, float]:
    """One round against a fresh server on `folder`."""
    owner = prepare(folder, votes)
    server = subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli", "serve", "--data", str(folder), "--bind", "127.0.0.1:0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        port = int(server.stderr.readline().rsplit(":", 1)[1])
        made = httpx.post(
            f"http://127.0.0.1:{port}/owner/simulated-raters",
            json={"count": votes},
            headers={"Authorization": f"Bearer {owner}"},
            timeout=60,
        ).raise_for_status()
        secrets = [rater["secret"] for rater in made.json()["raters"]]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(drive, (port, secrets, votes, in_hand))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    store = Store(folder / "server.sqlite")
    kept = sum(vote.counts for vote in store.votes())
    store.close()
    assert kept == votes // CLIENTS * CLIENTS, f"{kept} votes in the store"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--votes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the databases are, to measure another disk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"bare loop": [], "votes": [], "lease and vote": []}
    for _ in range(args.rounds):
        for name in rows:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                if name == "bare loop":
                    rows[name].append({"per_s": bare_loop(Path(folder), args.votes)})
                else:
                    rows[name].append(served(Path(folder), args.votes, name == "votes"))
    table = {}
    for name, rounds in rows.items():
        row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        ratios = [one["per_s"] / bare["per_s"] for one, bare in zip(rounds, rows["bare loop"], strict=True)]
        table[name] = row | {"of_bare": statistics.median(ratios)}
        print(f"{name:16}", "  ".join(f"{key} {value:9.2f}" for key, value in table[name].items()))
    if args.json:
        write(args.json, {"clients": CLIENTS, "votes": args.votes, "rows": table, "rounds": rows})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
