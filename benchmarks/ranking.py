"""Milliseconds to fit one 8 x 8 matrix of 100 votes, beside evalica and choix, all in this one run.

    OMP_NUM_THREADS=1 python benchmarks/ranking.py
    OMP_NUM_THREADS=1 python benchmarks/ranking.py --json FILE

Ours comes with the full covariance; of the others only choix's EP says how sure it is. The libraries take turns, so a
busy moment of the machine hits all of them, and processor time stands beside wall time for the same reason. Below: what
a server pays for a lease and for a vote.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import choix
import evalica
import numpy as np
from machine import machine, write

from rlhf_cli.ranking.bradley_terry import fit, rank
from rlhf_cli.ranking.pairs import Goal, choose_pair
from rlhf_cli.ranking.prior import fit_tau
from rlhf_cli.ranking.stopping import judge_best
from rlhf_cli.types import WinMatrix

GROUPS, SIZE, VOTES = 200, 8, 100


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """One group's win matrix and the same votes as (winner, loser) pairs; true scores have a spread of 1 logit."""
    scores = rng.normal(size=size)
    wins, pairs = np.zeros((size, size)), []
    for _ in range(VOTES):
        i, j = (int(k) for k in rng.choice(size, 2, replace=False))
        if rng.random() > 1 / (1 + np.exp(scores[j] - scores[i])):
            i, j = j, i
        wins[i, j] += 1
        pairs.append((i, j))
    return wins, pairs


@dataclass(frozen=True, slots=True)
class Work:
    """Something to time."""

    name: str
    gives: str
    call: Callable[[], object]
    calls: int
    """How many fits, pairs or verdicts one call makes."""


def ms_each(works: list[Work], repeats: int) -> dict[str, tuple[float, float]]:
    """Median processor and wall time over `repeats` rounds, per fit; one call each to warm up."""
    cpu: dict[str, list[float]] = {work.name: [] for work in works}
    wall: dict[str, list[float]] = {work.name: [] for work in works}
    for work in works:
        work.call()
    for _ in range(repeats):
        for work in works:
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            work.call()
            cpu[work.name].append(1000 * (time.process_time() - cpu_start) / work.calls)
            wall[work.name].append(1000 * (time.perf_counter() - wall_start) / work.calls)
    return {work.name: (statistics.median(cpu[work.name]), statistics.median(wall[work.name])) for work in works}


def fits(groups: list[tuple[np.ndarray, list[tuple[int, int]]]]) -> list[Work]:
    wins_BGG = np.stack([wins for wins, _ in groups])
    first, pairs = groups[0]
    names = [str(k) for k in range(SIZE)]
    xs, ys = [names[i] for i, _ in pairs], [names[j] for _, j in pairs]
    winners = [evalica.Winner.X] * VOTES
    matrices = [WinMatrix(wins) for wins in wins_BGG]
    return [
        Work("ours, batched", "covariance", lambda: fit(wins_BGG), GROUPS),
        Work("ours, single", "covariance", lambda: [fit(wins) for wins in wins_BGG], GROUPS),
        Work("ours, rank()", "covariance, P(best), flags", lambda: [rank(m) for m in matrices], GROUPS),
        Work("evalica", "scores", lambda: [evalica.bradley_terry(xs, ys, winners) for _ in range(20)], 20),
        Work("choix I-LSR", "scores", lambda: [choix.ilsr_pairwise_dense(first, alpha=0.01) for _ in range(10)], 10),
        Work("choix MAP", "scores", lambda: choix.opt_pairwise(SIZE, pairs, alpha=0.44), 1),
        Work("choix EP", "covariance", lambda: choix.ep_pairwise(SIZE, pairs, alpha=0.44), 1),
        Work("ours, fit_tau()", "width of the prior", lambda: fit_tau(wins_BGG), GROUPS),
    ]


def server_calls(groups: list[tuple[np.ndarray, list[tuple[int, int]]]], size: int) -> list[Work]:
    """What a server does per lease and per vote, with pairs in flight and pairs that the rater has seen."""
    matrices = [WinMatrix(wins) for wins, _ in groups[:50]]
    in_flight, seen, rng = {(0, 1): 1, (2, 5): 2, (3, 4): 1}, [(0, k) for k in range(1, 6)], random.SystemRandom()

    def choose(goal: Goal) -> Work:
        name = f"pair for {goal}, G {size}"
        return Work(name, "", lambda: [choose_pair(m, in_flight, seen, rng, goal) for m in matrices], len(matrices))

    stopping = Work(f"stopping, G {size}", "", lambda: [judge_best(m, 8) for m in matrices], len(matrices))
    return [choose("ranking"), choose("best"), choose("balanced"), stopping]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write date, machine and results")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    groups, large = [draw(rng, SIZE) for _ in range(GROUPS)], [draw(rng, 16) for _ in range(50)]
    works = [*fits(groups), *server_calls(groups, SIZE), *server_calls(large, 16)]
    ms = ms_each(works, repeats=11)
    print(f"{SIZE} x {SIZE}, {VOTES} votes")
    print(f"{'ms each':24} {'cpu':>8} {'wall':>8}   gives")
    for work in works:
        cpu_ms, wall_ms = ms[work.name]
        print(f"{work.name:24} {cpu_ms:8.3f} {wall_ms:8.3f}   {work.gives}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        versions = {name: metadata.version(name) for name in ("evalica", "choix")}
        each = {name: {"cpu_ms": cpu_ms, "wall_ms": wall_ms} for name, (cpu_ms, wall_ms) in ms.items()}
        write(args.json, {"versions": versions, "groups": GROUPS, "size": SIZE, "votes": VOTES, "each": each})


if __name__ == "__main__":
    main()
