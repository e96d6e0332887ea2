"""What 500 items in flight cost the client, and what asking people costs the trainer's thread.

    OMP_NUM_THREADS=1 python benchmarks/client.py                   # about 5 minutes
    OMP_NUM_THREADS=1 python benchmarks/client.py --json FILE

The server is `rlhf serve` in a process of its own, on a real socket; the people are another process. CPU is that of
this process alone, all its threads, in percent of one core.

Rows of the first table, each 60 s of looking at 500 items every 2 s:
- new: the 500 are the newest of the flow;
- behind: 2,000 newer items have ended, so that the 500 lie far down the list;
- waiting: nothing but a sleep, for what the process costs by itself.

Second table: groups are asked about through `VotesFeedback` with a time to live of 300 s; people answer each 60 s after
it was made, so that about 480 are in flight. A step is 2 s long, as long as a sleep, and has 16 groups; in each the
trainer submits them, asks for figures and collects. Its time in these calls is measured on the wall, with all waiting
for the interpreter's lock in it. Measured for 60 s after the first 70. Most requests buy new items, 6 for each with 4
completions; those besides are looking, reading votes, and sweeping for items that nobody knows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from machine import machine, write

from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.flow.base import FlowSpec, Responses
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.journal import Journal
from rlhf_cli.server.store import Store
from rlhf_cli.types import Completion, Group, Message, Prompt

ITEMS, ENDED, POLL_S, TTL_S = 500, 2000, 2.0, 300.0
ANSWER_S, STEP_S, GROUPS = 60.0, 2.0, 16
SIZE = 4
SPEC = FlowSpec("benchmark", "Which answer is more helpful?", Responses(1, 1, 1), TTL_S)
Row = dict[str, float]


@contextlib.contextmanager
def serving() -> Iterator[tuple[Path, str, Credentials]]:
    """Folder, address and credentials of a server that runs until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        command = [sys.executable, "-m", "rlhf_cli", "serve", "--data", str(data), "--bind", "127.0.0.1:0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            url = server.stderr.readline().split()[1]
            with contextlib.closing(Store(data / "server.sqlite")) as store:
                credentials = Credentials(*store.tokens.add("client", "benchmark"))
            yield data, url, credentials
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def fill(data: Path, flow_id: str, count: int, *, ended: bool) -> list[str]:
    with contextlib.closing(Store(data / "server.sqlite")) as store, store._database.transaction():
        ids = []
        for number in range(count):
            dataset_id = store.create_dataset("group")
            for place in range(SIZE):
                store.add_datapoint(dataset_id, place, f"answer {place} of group {number}")
            ids.append(store.create_item(flow_id, dataset_id, "What is a river?", 86_400))
            if ended:
                store.stop(ids[-1])
        return ids


async def look(url: str, credentials: Credentials, flow_id: str, ids: list[str], seconds: float) -> Row:
    """Look at all of `ids` every 2 s."""
    client = FlowClient(url, credentials)
    await client.statuses(flow_id, ids)  # connect, and fetch a token
    times_s, sent = [], client.health()["flow/requests_total"]
    cpu_s, began = time.process_time(), time.perf_counter()
    while time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        if ids:
            found = await client.statuses(flow_id, ids)
            assert found.keys() == set(ids)
        times_s.append(time.perf_counter() - asked)
        await asyncio.sleep(POLL_S - (time.perf_counter() - asked))
    elapsed_s = time.perf_counter() - began
    requests = client.health()["flow/requests_total"] - sent
    await client.close()
    return {
        "cpu_percent": 100 * (time.process_time() - cpu_s) / elapsed_s,
        "requests_per_s_per_100_items": requests / elapsed_s / (ITEMS / 100),
        "look_p50_ms": 1000 * statistics.median(times_s),
        "seconds": elapsed_s,
    }


def people(data: Path, end: Event, answer_s: float) -> None:
    """A process of its own: answers every item once, so long after it was made."""
    store, made_at = Store(data / "server.sqlite"), dict[str, float]()
    rater_id = store.tokens.add_simulated("benchmark", 1)[0][0]
    while not end.is_set():
        flows = store.flows("", 0, 1, newest_first=True)[1]
        for item in store.items(flows[0].id, 0, 1000, newest_first=True)[1] if flows else []:
            if not item.state.terminal:
                made_at[item.id] = item.created_at
        for item_id in [one for one, at in made_at.items() if time.time() - at >= answer_s]:
            pair = store.lease(rater_id)  # the oldest item first
            assert pair is not None
            store.vote(pair.id, rater_id, "left")
            del made_at[item_id]
        end.wait(0.25)
    store.close()


def group(number: int) -> Group:
    texts = [f"Answer {place} to question {number}. " * 8 for place in range(SIZE)]
    completions = tuple(Completion(text, (1, 2), (-0.5, -0.25), (-0.5, -0.5), True) for text in texts)
    return Group(f"g{number}", number, Prompt(f"p{number}", (Message("user", "Why?"),)), (5, 6), completions, 0)


def train(data: Path, url: str, credentials: Credentials, warm_s: float, seconds: float) -> Row:
    """Steps as a trainer takes them, with a journal on disk."""

    async def opened() -> str:
        client = FlowClient(url, credentials)
        try:
            return await client.open_flow(SPEC)
        finally:
            await client.close()

    flow_id = asyncio.run(opened())
    made = collected = 0
    steps_s: list[float] = []
    in_calls_s: list[float] = []
    latencies_s: list[float] = []
    in_flight: list[float] = []
    with Journal.open(data.parent / "journal.jsonl") as journal:
        feedback = VotesFeedback(
            lambda: FlowClient(url, credentials), flow_id, SPEC, journal.append, run_id="benchmark", poll_s=POLL_S
        )
        began, at = time.perf_counter(), None
        while at is None or time.perf_counter() - at[0] < seconds:
            if at is None and time.perf_counter() - began >= warm_s:
                at = (time.perf_counter(), time.process_time(), feedback.status()["flow/requests_total"])
            groups = [group(made + n) for n in range(GROUPS)]
            made += GROUPS
            step = time.perf_counter()
            for one in groups:
                feedback.submit(one)
            status = feedback.status()
            answered = feedback.collect()
            spent = time.perf_counter() - step
            collected += len(answered)
            time.sleep(STEP_S)
            if at is not None:
                in_calls_s.append(spent)
                steps_s.append(time.perf_counter() - step)
                in_flight.append(status["flow/in_flight"])
                latencies_s += [one.latency_s for one in answered if hasattr(one, "latency_s")]
        elapsed_s, cpu_s = time.perf_counter() - at[0], time.process_time() - at[1]
        requests = feedback.status()["flow/requests_total"] - at[2]
        feedback.close()
    assert collected, "no answers came"
    bought_per_s = GROUPS * (SIZE + 2) * len(steps_s) / elapsed_s  # dataset, candidates, item
    return {
        "trainer_percent_of_step": 100 * sum(in_calls_s) / sum(steps_s),
        "trainer_p50_ms": 1000 * statistics.median(in_calls_s),
        "trainer_max_ms": 1000 * max(in_calls_s),
        "cpu_percent": 100 * cpu_s / elapsed_s,
        "requests_per_s": requests / elapsed_s,
        "besides_buying_per_s_per_100_items": (requests / elapsed_s - bought_per_s) / statistics.mean(in_flight) * 100,
        "in_flight": statistics.mean(in_flight),
        "answers_per_s": len(latencies_s) / elapsed_s,
        "answer_latency_p50_s": statistics.median(latencies_s),
    }


def show(name: str, row: Row) -> None:
    print(f"{name:10}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)


def looking(seconds: float) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    with serving() as (data, url, credentials):
        with contextlib.closing(Store(data / "server.sqlite")) as store:
            flow_id = store.create_flow("benchmark", "Which?", SPEC.responses)
        ids = fill(data, flow_id, ITEMS, ended=False)
        steps: dict[str, Callable[[], list[str]]] = {
            "waiting": lambda: [],
            "new": lambda: ids,
            "behind": lambda: fill(data, flow_id, ENDED, ended=True) and ids,
        }
        for name, asked in steps.items():
            rows[name] = asyncio.run(look(url, credentials, flow_id, asked(), seconds))
            show(name, rows[name])
    return rows


def training(answer_s: float, seconds: float) -> Row:
    with serving() as (data, url, credentials):
        context = multiprocessing.get_context("spawn")
        end = context.Event()
        crowd = context.Process(target=people, args=(data, end, answer_s))
        crowd.start()
        try:
            row = train(data, url, credentials, answer_s + 10, seconds)
        finally:
            end.set()
            crowd.join()
    show("training", row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write date, machine, settings and results")
    args = parser.parse_args()
    rows = looking(args.seconds)
    row = training(ANSWER_S, args.seconds)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        settings = {"items": ITEMS, "ended": ENDED, "poll_s": POLL_S, "ttl_s": TTL_S, "answer_s": ANSWER_S}
        settings |= {"step_s": STEP_S, "groups_per_step": GROUPS, "completions": SIZE}
        write(args.json, {"settings": settings, "looking": rows, "training": row})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
