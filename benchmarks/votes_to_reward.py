"""True reward against votes and against wall time, at 2 s until an answer: ours beside TRL's OnlineDPOTrainer.

    python benchmarks/votes_to_reward.py --json FILE --plot FILE      # every run in turn: about an hour
    python benchmarks/votes_to_reward.py --tune        # learning rates, on seeds that are not reported

Same start, prompts, new tokens, beta and raters for all (see `task.py`); float32 on one torch thread, each run in a
process of its own. Every loop gets the learning rate that did best for itself with `--tune`. A run ends when its votes
are spent. The clock stops while the true reward is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from machine import machine, write
from overlap import QUIET
from task import (
    NEW_TOKENS,
    PROMPTS,
    Clock,
    Meter,
    Point,
    Raters,
    mean_and_half_width,
    prompts,
    start_model,
)

VERSIONS = ("rlhf-cli", "torch", "trl", "transformers", "accelerate")
SEEDS, TUNED_ON = (1, 2, 3, 4, 5), (98, 99)
LATENCY_S = 2.0
BETA = 0.1
VOTES = 768
"""What each run may spend, if nothing else is said."""
MEASUREMENTS = 6
GROUP = 8
FIRST, FIRST_VOTES, FIRST_RATE = 192, 4, 1e-5
"""Votes that the reward model starts with: how many, on each group, and the learning rate of the policy meanwhile."""
REWARD_MODEL = {"epochs": 10, "learning_rate": 3e-4, "batch_size": 8}


@dataclass(frozen=True, slots=True)
class Loop:
    """One way to spend votes."""

    trl: bool
    votes: int
    """On each group; on each pair with TRL, which always samples 2."""
    prompts: int
    """A step."""
    learning_rate: float
    learner: tuple[tuple[str, Any], ...] = ()
    """Keys of `run_online.learner` besides the common ones."""
    share: float | None = None
    """Part of the groups that people see, where a reward model answers for the others; it starts from the first
    votes."""
    budget: int = VOTES

    @property
    def steps(self) -> int:
        return self.budget // (self.votes * self.prompts)


@dataclass(frozen=True, slots=True)
class Run:
    """One loop on one seed."""

    loop: str
    seed: int
    load_average: float
    points: list[Point]

    @property
    def most_kl_nats(self) -> float:
        return max(p.kl_nats for p in self.points)


LOOPS = {
    "rlhf": Loop(False, votes=4, prompts=4, learning_rate=3e-4),
    "rlhf, best v. worst": Loop(False, votes=4, prompts=4, learning_rate=3e-4, learner=(("pairs", "best_worst"),)),
    "rlhf, 8 votes a group": Loop(False, votes=8, prompts=4, learning_rate=3e-4),
    "TRL, 1 vote a pair": Loop(True, votes=1, prompts=16, learning_rate=3e-4),
    "TRL, 1 vote a pair, 1e-3": Loop(True, votes=1, prompts=16, learning_rate=1e-3),
    "TRL, 5 votes a pair": Loop(True, votes=5, prompts=8, learning_rate=3e-4),
    "rlhf, selection": Loop(False, votes=4, prompts=4, learning_rate=3e-4, share=0.5),
}
COMPARED = tuple((ours, other) for ours in ("rlhf", "rlhf, selection") for other in LOOPS if other != ours)
RATES = (1e-4, 3e-4, 1e-3)


def measure(at: Meter, clock: Clock, points: list[Point], model: Any, step: int, votes: float) -> None:
    with clock.paused():
        wall_s = clock()
        reward, kl_nats = at(model)
        points.append(Point(step, votes, wall_s, reward, kl_nats))


def meter(steps: int, at: Meter, clock: Clock, points: list[Point], votes: Callable[[], float]) -> Any:
    """A trainer callback that measures some times."""
    from transformers import TrainerCallback

    every = max(1, steps // MEASUREMENTS)

    class Measure(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            if not points:  # else another run left what is measured already
                measure(at, clock, points, model, 0, 0)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step % every == 0 or state.global_step == steps:
                measure(at, clock, points, model, state.global_step, votes())

    return Measure()


class Panel:
    """People, in this process: the votes on each group come `LATENCY_S` after it was submitted.

    Pairs are chosen as our server chooses them.
    """

    def __init__(self, raters: Raters, loop: Loop, seed: int, clock: Clock, journal: Callable[[Any], object]) -> None:
        self._raters, self._loop, self._clock, self._journal = raters, loop, clock, journal
        self._rng = random.Random(seed)
        self._asked: deque[tuple[float, Any]] = deque()
        self.given = 0

    def submit(self, group: Any) -> None:
        self._asked.append((self._clock(), group))

    def resume(self, groups: Iterable[Any]) -> None:
        pass

    def collect(self) -> list[Any]:
        decided = []
        while self._asked and self._clock() - self._asked[0][0] >= LATENCY_S:
            since, group = self._asked.popleft()
            decided.append(self._ask(group, self._clock() - since))
        return decided

    def _ask(self, group: Any, latency_s: float) -> Any:
        import numpy as np

        from rlhf_cli.journal.events import GroupRanked
        from rlhf_cli.ranking.pairs import choose_pair
        from rlhf_cli.types import WinMatrix

        texts = [c.text for c in group.completions]
        wins_GG = np.zeros((len(texts), len(texts)))
        for _ in range(self._loop.votes):
            pair = choose_pair(WinMatrix(wins_GG), {}, (), self._rng)
            assert pair is not None
            i, j = pair
            if texts[i] == texts[j]:
                wins_GG[i, j] += 0.5
                wins_GG[j, i] += 0.5
            elif self._raters.prefers_first(texts[i], texts[j]):
                wins_GG[i, j] += 1
            else:
                wins_GG[j, i] += 1
        self.given += round(wins_GG.sum())
        rows = tuple(tuple(row) for row in wins_GG.tolist())
        ranked = GroupRanked(group_id=group.id, source="item:panel", wins=rows, latency_s=latency_s, complete=True)
        self._journal(ranked)
        return ranked.ranked(group)

    def status(self) -> dict[str, float]:
        return {"flow/in_flight": float(len(self._asked)), "flow/votes_total": float(self.given)}


def run_ours(loop: Loop, seed: int, start: Path, folder: Path) -> list[Point]:
    """`rlhf run-online` on votes; with `share`, `rlhf train-rm` on the first of them, and then hybrid feedback."""
    from rlhf_cli.policy.runtime import prepare
    from rlhf_cli.recipe.load import load_recipe
    from rlhf_cli.stages import train_rm

    prepare(threads=1)
    points: list[Point] = []
    at, clock, raters = Meter(start), Clock(), Raters(seed)
    if loop.share is None:
        recipe = recipe_of(loop, seed, start, loop.steps)
        online(loop, recipe, folder, raters, at, clock, points)
        return points
    first = replace(loop, votes=FIRST_VOTES, share=None, learning_rate=FIRST_RATE)
    recipe = recipe_of(first, seed, start, FIRST // (first.votes * first.prompts))
    learned = online(first, recipe, folder / "votes", raters, at, clock, points)
    steps = round((loop.budget - FIRST) / (loop.votes * loop.share * loop.prompts))
    recipe = recipe_of(loop, seed, learned, steps)
    recipe["run_online"] |= {"feedback": "hybrid", "selection": {"share": loop.share}, "refresh": {}}
    with_model = recipe | {"train_rm": {"votes": str(folder / "votes"), "model": str(start), **REWARD_MODEL}}
    del with_model["run_online"]
    file = folder / "model.yaml"
    file.write_text(json.dumps(with_model))
    train_rm.run(load_recipe(file), folder / "model")
    online(loop, recipe, folder / "hybrid", raters, at, clock, points, folder / "model")
    return points


def recipe_of(loop: Loop, seed: int, start: Path, steps: int) -> dict[str, Any]:
    """What it leaves out is default."""
    return {
        "name": "votes-to-reward",
        "seed": seed,
        "model": {"path": str(start)},
        "data": {"prompts": str(PROMPTS)},
        "run_online": {
            "steps": steps,
            "prompts_per_step": loop.prompts,
            "group_size": GROUP,
            "checkpoint_every": 1000,
            "sampling": {"max_new_tokens": NEW_TOKENS},
            "learner": {"algorithm": "dpo", "beta": BETA, "learning_rate": loop.learning_rate, **dict(loop.learner)},
        },
        "compute": {"precision": "fp32", "generator_precision": "fp32", "threads": 1},
    }


def online(
    loop: Loop,
    plain: dict[str, Any],
    folder: Path,
    raters: Raters,
    at: Meter,
    clock: Clock,
    points: list[Point],
    trained_rm: Path | None = None,
) -> Path:
    """Stream, feedback, learner, recorder and journal as `rlhf run-online` puts them together; returns the policy."""
    from rlhf_cli.feedback.hybrid import HybridFeedback
    from rlhf_cli.feedback.refresh import LiveModel, Refresher
    from rlhf_cli.feedback.selection import Chooser
    from rlhf_cli.journal.events import Event, RunStarted
    from rlhf_cli.journal.journal import Journal
    from rlhf_cli.journal.metrics import MetricsWriter
    from rlhf_cli.journal.replay import replay
    from rlhf_cli.journal.run_dir import RunDir
    from rlhf_cli.learner.online import online_learner
    from rlhf_cli.learner.refit import refit_heads
    from rlhf_cli.online.checkpoint import partial_dir
    from rlhf_cli.online.recorder import Recorder
    from rlhf_cli.online.stop import StopRequest
    from rlhf_cli.online.stream import Stream
    from rlhf_cli.policy.policy import Policy
    from rlhf_cli.policy.scoring import RewardModel, open_reward_model
    from rlhf_cli.recipe.schema import Recipe

    recipe, run = Recipe.model_validate(plain), RunDir(folder).create()
    section = recipe.run_online
    assert section is not None
    run.checkpoints.mkdir(parents=True)
    before = points[-1].votes if points else 0.0
    with Journal.open(run.journal) as journal:
        started = RunStarted(run_id="bench", name=recipe.name, seed=recipe.seed, version="0")
        state = replay([journal.append(started)])
        policy, refreshers = Policy(str(plain["model"]["path"]), recipe), list[Refresher]()

        def record(event: Event) -> None:
            journal.append(event)
            for refresher in refreshers:
                refresher.note(event)

        panel = Panel(raters, loop, recipe.seed, clock, record)
        feedback: Any = panel
        if trained_rm is not None:
            model = open_reward_model(str(RunDir(trained_rm).train_rm_model))
            assert isinstance(model, RewardModel)
            assert section.selection is not None
            assert section.refresh is not None
            live, refit = LiveModel(model), partial(refit_heads, seed=recipe.seed)
            refreshers.append(Refresher(live, refit, section.refresh, recipe.seed, run, journal.append))
            chooser = Chooser(section.selection, recipe.seed)

            def affords(groups: int) -> bool:
                return before + panel.given + groups * loop.votes <= loop.budget

            feedback = HybridFeedback(panel, chooser, live, journal.append, affords=affords, refresher=refreshers[0])
        stream = Stream(
            policy=policy,
            feedback=feedback,
            journal=journal,
            state=state,
            prompts=prompts(),
            recipe=recipe,
            stop=StopRequest(),
        )

        def votes() -> float:
            """Those of the groups that were trained on; where a model was refitted on them too, all that were given."""
            return before + (panel.given if trained_rm is not None else loop.votes * loop.prompts * stream.step)

        recorder = Recorder(run, journal, MetricsWriter(run.metrics, ()), stream, {})
        callbacks = [recorder, meter(section.steps, at, clock, points, votes)]
        learner = online_learner(policy, stream, recipe, partial_dir(run), callbacks, None)
        recorder.learner = learner
        learner.resume(None)
        if refreshers:
            print(folder.name, feedback.status(), file=sys.stderr)
        policy.save(str(run.online_model))
    return Path(run.online_model)


def run_trl(loop: Loop, seed: int, start: Path, folder: Path) -> list[Point]:
    """TRL's own loop: the votes on a pair, `LATENCY_S` after it was sampled; the winner of most of them is chosen."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.set_num_threads(1)
    raters, points, at = Raters(seed), list[Point](), Meter(start)
    given = 0

    def votes(completions: Sequence[Any], **_: Any) -> list[float]:
        """A share of won votes for each completion; TRL takes the higher one of a pair."""
        nonlocal given
        time.sleep(LATENCY_S)
        texts = [c[0]["content"] for c in completions]
        half = len(texts) // 2  # the first completions of all prompts, then the second ones
        won = [
            sum(raters.prefers_first(a, b) for _ in range(loop.votes))
            for a, b in zip(texts[:half], texts[half:], strict=True)
        ]
        given += loop.votes * half
        return [w / loop.votes for w in won] + [1 - w / loop.votes for w in won]

    config = OnlineDPOConfig(
        output_dir=str(folder),
        max_steps=loop.steps,
        per_device_train_batch_size=loop.prompts,
        max_new_tokens=NEW_TOKENS,
        beta=BETA,
        gradient_checkpointing=False,
        learning_rate=loop.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=True,
        bf16=False,
        temperature=1.0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    clock = Clock()
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        reward_funcs=votes,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(start, padding_side="left"),
        callbacks=[meter(loop.steps, at, clock, points, lambda: given)],
    )
    trainer.train()
    return points


# The comparison.


def in_process(name: str, loop: Loop, seed: int, start: Path) -> Run:
    """One run in a process of its own."""
    job = json.dumps({"loop": asdict(loop), "seed": seed, "start": str(start)})
    done = subprocess.run(
        [sys.executable, __file__, "--job", job], env=os.environ | QUIET, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    run = Run(name, seed, os.getloadavg()[0], [Point(**point) for point in json.loads(done.stdout.splitlines()[-1])])
    last = run.points[-1]
    ended = f"KL {last.kl_nats:.1f}, {last.votes:.0f} votes, {last.wall_s:.0f} s"
    print(f"{name:40} seed {seed}: {last.reward:.2f}, {ended}", file=sys.stderr, flush=True)
    return run


def work(job: dict[str, Any]) -> list[Point]:
    loop = Loop(**{**job["loop"], "learner": tuple(map(tuple, job["loop"]["learner"]))})
    with tempfile.TemporaryDirectory(prefix="votes-to-reward-") as folder:
        return (run_trl if loop.trl else run_ours)(loop, job["seed"], Path(job["start"]), Path(folder))


def all_at_once(
    jobs: Sequence[tuple[str, Loop, int]], at_once: int, keep: Callable[[Sequence[Run]], None] = lambda runs: None
) -> list[Run]:
    """Runs of all jobs; `keep` gets what there is whenever one has ended, so that hours are not lost with a machine."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="votes-to-reward-start-") as folder, ThreadPoolExecutor(at_once) as pool:
        os.environ.update(QUIET)
        start = start_model(Path(folder))
        for run in pool.map(lambda job: in_process(job[0], job[1], job[2], start), jobs):
            runs.append(run)
            keep(runs)
    return runs


# What comes out.


def at(run: Run, votes: float, what: str = "reward") -> float:
    """Of the policy that so many votes have made; between two measurements on a straight line."""
    import numpy as np

    return float(np.interp(votes, [p.votes for p in run.points], [getattr(p, what) for p in run.points]))


def first(run: Run, reward: float) -> Point | None:
    """The first measurement that is at least this good."""
    return next((p for p in run.points if p.reward >= reward), None)


def shown(values: Sequence[float]) -> str:
    mean, half = mean_and_half_width(values)
    return f"{mean:.2f} ± {half:.2f}"


def tables(runs: Sequence[Run]) -> str:
    """Means over the seeds with 95 % intervals, as Markdown; differences are paired by seed."""
    of = {name: [r for r in runs if r.loop == name] for name in dict.fromkeys(r.loop for r in runs)}
    spent = max(r.points[-1].votes for r in runs)
    amounts = [spent / 8, spent / 4, spent / 2, spent]
    budgets = " | ".join(f"{b:,.0f} votes" for b in amounts)
    lines = [f"| loop | {budgets} | KL at the end, nats | seconds |"]
    lines.append("| --- " * (len(amounts) + 3) + "|")
    for name, mine in of.items():
        cells = [shown([at(r, b) for r in mine]) for b in amounts]
        most = [r.points[-1].kl_nats for r in mine]
        ends = [r.points[-1].wall_s for r in mine]
        lines.append(f"| {name} | {' | '.join(cells)} | {shown(most)} | {statistics.fmean(ends):.0f} |")
    lines += [
        "",
        f"| difference | {budgets} |",
        "| --- " * (len(amounts) + 1) + "|",
    ]
    for ours, other in COMPARED:
        if ours in of and other in of:
            pairs = list(zip(of[ours], of[other], strict=True))
            cells = [shown([at(a, b) - at(c, b) for a, c in pairs]) for b in amounts]
            lines.append(f"| {ours} minus {other} | {' | '.join(cells)} |")
    for other in (name for name in of if LOOPS[name].trl):
        final = statistics.fmean(r.points[-1].reward for r in of[other])
        own = statistics.fmean(r.points[-1].wall_s for r in of[other])
        head = f"until {other} ends: {final:.2f} after {own:.0f} s"
        lines += ["", f"| {head} | got there | votes | KL, nats | seconds | of its seconds |", "| --- " * 6 + "|"]
        for name, mine in of.items():
            there = [p for p in (first(r, final) for r in mine) if p is not None]
            if there:
                votes = statistics.median(p.votes for p in there)
                kl = statistics.median(p.kl_nats for p in there)
                seconds = statistics.median(p.wall_s for p in there)
                cells = [f"{votes:.0f}", f"{kl:.1f}", f"{seconds:.0f}", f"{seconds / own:.2f}"]
            else:
                cells = [""] * 4
            lines.append(f"| {name} | {len(there)} of {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], file: Path) -> None:
    """Reward against votes and against wall time: means over the seeds with bands of 95 %."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    colours = ("#1f7a4d", "#7a5c1f", "#1f4d7a", "#b3372f", "#d98880")
    panels = zip(figure.subplots(1, 2, sharey=True), (("votes", "votes"), ("wall_s", "seconds")), strict=True)
    for axes, (what, label) in panels:
        for name, colour in zip(dict.fromkeys(r.loop for r in runs), colours, strict=False):
            mine = [r for r in runs if r.loop == name]
            grid = np.linspace(0, min(getattr(r.points[-1], what) for r in mine), 60)
            curves = [np.interp(grid, [getattr(p, what) for p in r.points], [p.reward for p in r.points]) for r in mine]
            bands = [mean_and_half_width([float(c[k]) for c in curves]) for k in range(len(grid))]
            mean, half = np.array(bands).T
            axes.plot(grid, mean, color=colour, linewidth=1.8, label=name)
            axes.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set_title("true reward", loc="left", fontsize=10)
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try learning rates on seeds that are not reported")
    parser.add_argument("--only", help="loops whose name contains this")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time; 1 for honest wall times")
    parser.add_argument("--votes", type=int, default=VOTES, help="what each run may spend")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="runs of earlier calls, not new ones")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps([asdict(point) for point in work(json.loads(args.job))]))
        return
    named = {name: loop for name, loop in LOOPS.items() if args.only is None or args.only in name}
    loops = {name: replace(loop, budget=args.votes) for name, loop in named.items()}
    if args.tune:
        jobs = [
            (f"{name}, {rate:g}", replace(loop, learning_rate=rate), seed)
            for name, loop in loops.items()
            for rate in RATES
            for seed in TUNED_ON
        ]
        for run in all_at_once(jobs, args.at_once):
            rewards = [f"{at(run, args.votes / part):.2f}" for part in (8, 4, 2, 1)]
            print(f"{run.loop:40} seed {run.seed}: {' '.join(rewards)}, KL at most {run.most_kl_nats:.1f}")
        return
    versions = {name: metadata.version(name) for name in VERSIONS}
    settings = {"latency_s": LATENCY_S, "beta": BETA, "first_votes": FIRST, "reward_model": REWARD_MODEL}
    described = {name: asdict(loop) for name, loop in loops.items()}
    about = {"versions": versions, "settings": settings, "at_once": args.at_once, "loops": described}

    def keep(runs: Sequence[Run]) -> None:
        if args.json:
            write(args.json, about | {"runs": [asdict(run) for run in runs]})

    if args.read:
        rows = [row for file in args.read for row in json.loads(file.read_text())["runs"]]
        runs = [Run(**{**row, "points": [Point(**point) for point in row["points"]]}) for row in rows]
    else:
        jobs = [(name, loop, seed) for seed in args.seeds for name, loop in loops.items()]
        runs = all_at_once(jobs, args.at_once, keep)
    if args.plot:
        plot(runs, args.plot)
    print(tables(runs))
    loads = [run.load_average for run in runs]
    print(f"\nload average {min(loads):.1f} to {max(loads):.1f}; {machine()}")


if __name__ == "__main__":
    main()
