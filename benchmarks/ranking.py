"""Milliseconds to fit one 8 x 8 matrix of 100 votes, beside evalica and choix, all in this one run.

    python benchmarks/ranking.py

Ours comes with the full covariance; of the others only choix's EP says how sure it is.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import choix
import evalica
import numpy as np

from rlhf_cli.ranking.bradley_terry import fit, rank
from rlhf_cli.types import WinMatrix

GROUPS, SIZE, VOTES = 200, 8, 100


def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """One group's win matrix and the same votes as (winner, loser) pairs; true scores have a spread of 1 logit."""
    scores = rng.normal(size=SIZE)
    wins, pairs = np.zeros((SIZE, SIZE)), []
    for _ in range(VOTES):
        i, j = (int(k) for k in rng.choice(SIZE, 2, replace=False))
        if rng.random() > 1 / (1 + np.exp(scores[j] - scores[i])):
            i, j = j, i
        wins[i, j] += 1
        pairs.append((i, j))
    return wins, pairs


def ms_per_fit(work: Callable[[], object], fits: int, repeats: int) -> float:
    """Median over `repeats` of the wall time of `work`, per fit; one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / fits


def main() -> None:
    rng = np.random.default_rng(0)
    groups = [draw(rng) for _ in range(GROUPS)]
    wins_BGG = np.stack([wins for wins, _ in groups])
    first, pairs = groups[0]
    names = [str(k) for k in range(SIZE)]
    xs, ys = [names[i] for i, _ in pairs], [names[j] for _, j in pairs]
    winners = [evalica.Winner.X] * VOTES
    matrices = [WinMatrix(wins) for wins in wins_BGG]

    rows = [
        ("ours, batched", "covariance", ms_per_fit(lambda: fit(wins_BGG), GROUPS, 15)),
        ("ours, single", "covariance", ms_per_fit(lambda: [fit(wins) for wins in wins_BGG], GROUPS, 7)),
        ("ours, rank()", "covariance, P(best), flags", ms_per_fit(lambda: [rank(m) for m in matrices], GROUPS, 7)),
        ("evalica", "none", ms_per_fit(lambda: evalica.bradley_terry(xs, ys, winners), 1, 101)),
        ("choix I-LSR", "none", ms_per_fit(lambda: choix.ilsr_pairwise_dense(first, alpha=0.01), 1, 51)),
        ("choix MAP", "none", ms_per_fit(lambda: choix.opt_pairwise(SIZE, pairs, alpha=0.44), 1, 15)),
        ("choix EP", "covariance", ms_per_fit(lambda: choix.ep_pairwise(SIZE, pairs, alpha=0.44), 1, 5)),
    ]
    print(f"{SIZE} x {SIZE}, {VOTES} votes, numpy {np.__version__}, Python {platform.python_version()}")
    print(f"{'':16} {'ms per fit':>10}   uncertainty")
    for name, uncertainty, ms in rows:
        print(f"{name:16} {ms:10.3f}   {uncertainty}")


if __name__ == "__main__":
    main()
