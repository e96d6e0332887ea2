"""Votes until the best of 8 is known with 90 %: `best` with its stopping rule, beside random pairs.

    OMP_NUM_THREADS=1 python benchmarks/votes.py                    # 1,000 groups a row, a few minutes
    OMP_NUM_THREADS=1 python benchmarks/votes.py --groups 100 --json FILE

True scores have a spread of 1.5 logits, at which two raters agree on a random pair 69 % of the time; 5 % of the votes
are thrown without looking. The ranking knows neither: it uses the default prior. All rows see the same groups.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, deque
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from machine import machine, write

from rlhf_cli.ranking.bradley_terry import fit
from rlhf_cli.ranking.intervals import Estimate, clustered_mean, win_rate
from rlhf_cli.ranking.pairs import Goal, Pair, choose_pair
from rlhf_cli.ranking.stopping import judge_best
from rlhf_cli.types import WinMatrix

PAIRS = list(combinations(range(8), 2))


@dataclass(frozen=True, slots=True)
class Settings:
    groups: int = 1000
    size: int = 8
    spread: float = 1.5
    lapses: float = 0.05
    threshold: float = 0.9
    min_votes: int = 8
    most_votes: int = 224


@dataclass(frozen=True, slots=True)
class Row:
    """Means over groups with 95 % intervals."""

    pairs: str
    votes: Estimate
    """Asked for, those still in flight at the end included."""
    right: Estimate
    """The leader is the best of its group."""
    stopped: float
    right_where_stopped: float


class Group:
    """One group of completions, its raters, and their votes so far."""

    def __init__(self, s: Settings, seed: int) -> None:
        self.rng = random.Random(seed)
        self.truth = np.random.default_rng(seed).normal(0, s.spread, s.size)
        self.wins = np.zeros((s.size, s.size))
        self._lapses = s.lapses

    def vote(self, pair: Pair) -> None:
        i, j = pair
        p = self._lapses / 2 + (1 - self._lapses) / (1 + np.exp(self.truth[j] - self.truth[i]))
        self.wins[(i, j) if self.rng.random() < p else (j, i)] += 1

    def next_pair(self, goal: Goal | None, in_flight: Counter[Pair]) -> Pair:
        """By goal; at random without one."""
        pair = self.rng.choice(PAIRS) if goal is None else choose_pair(self._matrix(), in_flight, (), self.rng, goal)
        assert pair is not None  # nothing was forbidden
        return pair

    def _matrix(self) -> WinMatrix:
        return WinMatrix(self.wins)


def until_known(s: Settings, name: str, goal: Goal | None, raters: int = 1) -> Row:
    """Ask until the stopping rule speaks or `most_votes` are in; `raters` look at a pair each at the same time."""
    votes, right, stopped = [], [], []
    for seed in range(s.groups):
        group, leased = Group(s, seed), deque[Pair]()
        verdict = judge_best(WinMatrix(group.wins), s.min_votes, s.threshold)
        while not verdict.stop and group.wins.sum() < s.most_votes:
            while len(leased) < raters:
                leased.append(group.next_pair(goal, Counter(leased)))
            group.vote(leased.popleft())
            verdict = judge_best(WinMatrix(group.wins), s.min_votes, s.threshold)
        votes.append(group.wins.sum() + len(leased))
        right.append(bool(verdict.leader == group.truth.argmax()))
        stopped.append(verdict.stop)
    where_stopped = [hit for hit, stop in zip(right, stopped, strict=True) if stop]
    return Row(
        name,
        clustered_mean([[v] for v in votes]),
        win_rate([(hit, 1 - hit) for hit in right]),
        float(np.mean(stopped)),
        float(np.mean(where_stopped)),
    )


def fixed(s: Settings, goal: Goal | None, votes: int) -> tuple[Estimate, Estimate]:
    """P(the leader is the best) and the share of pairs in the right order, after so many votes."""
    i_P, j_P = np.triu_indices(s.size, 1)
    right, ordered = [], []
    for seed in range(s.groups):
        group = Group(s, seed)
        for _ in range(votes):
            group.vote(group.next_pair(goal, Counter()))
        scores, truth = fit(group.wins)[0], group.truth
        right.append(bool(scores.argmax() == truth.argmax()))
        ordered.append(((scores[i_P] > scores[j_P]) == (truth[i_P] > truth[j_P])).mean())
    return win_rate([(hit, 1 - hit) for hit in right]), clustered_mean([[share] for share in ordered])


def show(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:.{digits}f} ({estimate.low:.{digits}f}-{estimate.high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write date, machine, settings and results")
    args = parser.parse_args()
    s = Settings(groups=args.groups)

    print(f"best of {s.size}, {s.groups} groups a row, stop at {s.threshold:g}, at most {s.most_votes} votes\n")
    print(f"{'pairs':24} {'votes':22} {'best found':22} stopped  right where stopped")
    rows = []
    for row in (
        until_known(s, "best", "best"),
        until_known(s, "best, 8 raters at once", "best", raters=8),
        until_known(s, "balanced", "balanced"),
        until_known(s, "random", None),
    ):
        rows.append(row)
        print(
            f"{row.pairs:24} {show(row.votes, 1):22} {show(row.right, 3):22} {row.stopped:7.0%}  "
            f"{row.right_where_stopped:.3f}",
            flush=True,
        )
    budgets = [("random", None, 100), ("random", None, 650), ("best", "best", 100)]
    orders = [(name, goal, votes) for votes in (28, 56) for name, goal in (("ranking", "ranking"), ("random", None))]
    print(f"\n{'pairs, fixed votes':24} {'votes':22} {'best found':22} pairs in the right order")
    fixed_rows = []
    for name, goal, votes in (*budgets, *orders):
        right, ordered = fixed(s, goal, votes)
        fixed_rows.append({"pairs": name, "votes": votes, "right": right._asdict(), "ordered": ordered._asdict()})
        print(f"{name:24} {votes:<22} {show(right, 3):22} {show(ordered, 3)}", flush=True)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        stopping = [asdict(r) | {"votes": r.votes._asdict(), "right": r.right._asdict()} for r in rows]
        write(args.json, {"settings": asdict(s), "stopping": stopping, "fixed": fixed_rows})


if __name__ == "__main__":
    main()
