"""Completions trained per second while feedback is slow: our loop beside TRL's, on one machine in one run.

    python benchmarks/overlap.py                    # ours and TRL's OnlineDPOTrainer, 2 s until an answer
    python benchmarks/overlap.py --grpo --flow      # TRL's GRPOTrainer too, and ours through the real flow server
    python benchmarks/overlap.py --latency 10 --json results.json

All load the same model from one folder and get the same prompts, new tokens and optimizer settings, in float32 on one
torch thread. Each run has a process of its own, and they take turns. The clock starts with the first sample and stops
after the last optimizer step; imports, model building and the run's last checkpoint are left out for all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from machine import machine, write

VERSIONS = ("rlhf-cli", "torch", "trl", "transformers", "accelerate")
PROMPTS = Path(__file__).parent.parent / "recipes" / "data" / "everyday_train.jsonl"
OURS, FLOW, ONLINE_DPO, GRPO = "rlhf", "rlhf, real flow", "TRL OnlineDPO", "TRL GRPO"
QUIET = {
    "OMP_NUM_THREADS": "1",  # two spinning threads on busy cores are slower than one
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What all loops have in common; `group` is for those that can choose, OnlineDPO always takes 2."""

    latency_s: float = 2.0
    steps: int = 12
    prompts: int = 4
    group: int = 8
    new_tokens: int = 32
    beta: float = 0.1
    learning_rate: float = 1e-5
    max_grad_norm: float = 1.0
    checkpoint_every: int = 5
    layers: int = 4
    hidden: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one loop, from the first sample to the last optimizer step."""

    loop: str
    completions: int
    """Trained on; what was only sampled does not count."""
    wall_s: float
    cpu_s: float
    wait_s: float
    """Nothing to do but wait for feedback."""
    generate_s: float
    step_s: float
    """Median over the steps."""
    staleness_mean_steps: float
    staleness_max_steps: float
    latency_p50_s: float
    """From asking to the answer."""
    load_average: float
    """Of the machine in the last minute, at the end."""

    @property
    def per_s(self) -> float:
        return self.completions / self.wall_s

    @property
    def wait_share(self) -> float:
        return self.wait_s / self.wall_s


def letters(text: str) -> float:
    """The rule that all feedback goes by: more letters are better."""
    return float(sum(c.isalpha() for c in text))


# The loops. Each runs in a process of its own, so they import what they need where they need it.


def stopwatch() -> Any:
    """A trainer callback that notes when training began and when each step ended, in wall and CPU seconds."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []
            self.cpu: list[float] = []

        def _note(self, *_: Any, **__: Any) -> None:
            self.at.append(time.perf_counter())
            self.cpu.append(time.process_time())

        on_train_begin = on_step_end = _note

        def times(self) -> dict[str, float]:
            steps = [after - before for before, after in zip(self.at, self.at[1:], strict=False)]
            return {
                "wall_s": self.at[-1] - self.at[0],
                "cpu_s": self.cpu[-1] - self.cpu[0],
                "step_s": statistics.median(steps),
                "load_average": os.getloadavg()[0],
            }

    return Stopwatch()


def run_ours(loop: str, s: Settings, model: Path, folder: Path) -> Measured:
    """Stream, learner, recorder, journal and checkpoints as `rlhf run-online` puts them together."""
    from rlhf_cli.journal.events import RunStarted
    from rlhf_cli.journal.journal import Journal, read
    from rlhf_cli.journal.metrics import MetricsWriter, read_metrics
    from rlhf_cli.journal.replay import replay
    from rlhf_cli.journal.run_dir import RunDir
    from rlhf_cli.learner.dpo import GroupDPOTrainer
    from rlhf_cli.online.checkpoint import partial_dir
    from rlhf_cli.online.recorder import Recorder
    from rlhf_cli.online.stop import StopRequest
    from rlhf_cli.online.stream import Stream
    from rlhf_cli.policy.policy import Policy
    from rlhf_cli.policy.runtime import prepare
    from rlhf_cli.recipe.data import read_prompts
    from rlhf_cli.recipe.schema import Recipe

    prepare(threads=1)
    recipe = Recipe.model_validate(our_recipe(s, model, with_flow=loop == FLOW))
    run = RunDir(folder).create()
    run.checkpoints.mkdir(parents=True)
    watch = stopwatch()
    with Journal.open(run.journal) as journal:
        state = replay([journal.append(RunStarted(run_id="overlap", name=recipe.name, seed=s.seed, version="0"))])
        policy = Policy(str(model), recipe)
        with votes(recipe, run, journal) if loop == FLOW else panel(s.latency_s, journal) as feedback:
            stream = Stream(
                policy=policy,
                feedback=feedback,
                journal=journal,
                state=state,
                prompts=read_prompts(PROMPTS),
                recipe=recipe,
                stop=StopRequest(),
            )
            recorder = Recorder(run, journal, MetricsWriter(run.metrics, ()), stream, {})
            trainer = GroupDPOTrainer(policy, stream, recipe, partial_dir(run), [recorder, watch])
            recorder.learner = trainer
            trainer.train()
    journalled = replay(read(run.journal))
    rows = read_metrics(run.metrics)
    trained = [g for g in journalled.groups.values() if g.step is not None and g.ranked is not None]
    assert len(rows) == s.steps
    return Measured(
        loop=loop,
        completions=sum(len(g.sampled.completions) for g in trained),
        wait_s=sum(row["time/wait_s"] for row in rows),
        generate_s=sum(row["time/generate_s"] for row in rows),
        staleness_mean_steps=statistics.fmean(row["staleness/mean_steps"] for row in rows),
        staleness_max_steps=max(row["staleness/max_steps"] for row in rows),
        latency_p50_s=statistics.median(g.ranked.latency_s for g in trained if g.ranked is not None),
        **watch.times(),
    )


def our_recipe(s: Settings, model: Path, *, with_flow: bool) -> dict[str, Any]:
    """What the recipe leaves out is the default that everybody gets."""
    flow = {
        "service": "embedded",
        "instruction": "Which answer has more letters?",
        "poll_s": 0.25,
        # Enough raters, quick and faithful enough, that a group's twelfth vote comes after about the latency asked for.
        "crowd": {
            "raters": 64,
            "taste": "letters",
            "latency_s": {"p50": s.latency_s / 3, "p95": s.latency_s / 2},
            "dropout": 0.0,
        },
    }
    return {
        "name": "overlap",
        "seed": s.seed,
        "model": {"path": str(model)},
        "data": {"prompts": str(PROMPTS)},
        "flow": flow if with_flow else None,
        "run_online": {
            "steps": s.steps,
            "prompts_per_step": s.prompts,
            "group_size": s.group,
            "checkpoint_every": s.checkpoint_every,
            "sampling": {"max_new_tokens": s.new_tokens},
            "learner": {
                "algorithm": "dpo",
                "beta": s.beta,
                "learning_rate": s.learning_rate,
                "max_grad_norm": s.max_grad_norm,
            },
        },
        "compute": {"precision": "fp32", "generator_precision": "fp32", "threads": 1},
    }


@contextmanager
def panel(latency_s: float, journal: Any) -> Iterator[Any]:
    """Feedback in this process: every group has its full set of comparisons `latency_s` after it was submitted."""
    import numpy as np

    from rlhf_cli.journal.events import GroupRanked
    from rlhf_cli.types import Group, RankedGroup, WinMatrix

    class Panel:
        def __init__(self) -> None:
            self.asked: deque[tuple[float, Group]] = deque()

        def submit(self, group: Group) -> None:
            self.asked.append((time.monotonic(), group))

        def collect(self) -> list[RankedGroup]:
            decided = []
            while self.asked and time.monotonic() - self.asked[0][0] >= latency_s:
                since, group = self.asked.popleft()
                scores_G = np.array([letters(c.text) for c in group.completions])
                wins = WinMatrix((np.sign(scores_G[:, None] - scores_G[None, :]) + 1) / 2 * (1 - np.eye(len(scores_G))))
                ranked = RankedGroup(group, wins, "panel", time.monotonic() - since, complete=True)
                rows = tuple(tuple(row) for row in wins.wins.tolist())
                journal.append(
                    GroupRanked(group_id=group.id, source="panel", wins=rows, latency_s=ranked.latency_s, complete=True)
                )
                decided.append(ranked)
            return decided

        def status(self) -> dict[str, float]:
            return {"flow/in_flight": float(len(self.asked))}

    yield Panel()


@contextmanager
def votes(recipe: Any, run: Any, journal: Any) -> Iterator[Any]:
    """Feedback as `rlhf run-online` gets it: HTTP to the embedded server, where simulated raters vote over HTTP too."""
    from rlhf_cli.feedback.votes import VotesFeedback
    from rlhf_cli.stages.open_flow import open_or_adopt
    from rlhf_cli.stages.service import flow_service, flow_spec

    spec = flow_spec(recipe)
    with flow_service(recipe, run) as connect:
        flow_id, _ = asyncio.run(open_or_adopt(connect, spec))
        feedback = VotesFeedback(connect, flow_id, spec, journal.append, run_id="overlap", poll_s=recipe.flow.poll_s)
        try:
            yield feedback
        finally:
            feedback.close()


def run_trl(loop: str, s: Settings, model: Path, folder: Path) -> Measured:
    """TRL's own loop; its feedback is a reward function that sleeps `latency_s`, once per step for the whole batch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    watch = stopwatch()
    waited: list[float] = []
    generating: list[float] = []

    def generate_timed(base: Any) -> Any:
        class Timed(base):
            def _generate(self, *args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    return super()._generate(*args, **kwargs)
                finally:
                    generating.append(time.perf_counter() - start)

        return Timed

    def scores(completions: Sequence[Any], since: float) -> list[float]:
        waited.append(time.perf_counter() - since)
        return [letters(c[0]["content"]) for c in completions]

    def judge(completions: Sequence[Any], **_: Any) -> list[float]:
        start = time.perf_counter()
        time.sleep(s.latency_s)
        return scores(completions, start)

    async def judge_async(completions: Sequence[Any], **_: Any) -> list[float]:
        start = time.perf_counter()
        await asyncio.sleep(s.latency_s)
        return scores(completions, start)

    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": s.steps,
        "gradient_checkpointing": False,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": s.max_grad_norm,
        "seed": s.seed,
        "use_cpu": True,
        "bf16": False,
        "temperature": 1.0,
        "save_steps": s.checkpoint_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    given = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "train_dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        "processing_class": AutoTokenizer.from_pretrained(model, padding_side="left"),
        "callbacks": [watch],
    }
    if loop == ONLINE_DPO:
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        group = 2
        config = OnlineDPOConfig(
            per_device_train_batch_size=s.prompts, max_new_tokens=s.new_tokens, beta=s.beta, **common
        )
        trainer = generate_timed(OnlineDPOTrainer)(reward_funcs=judge, args=config, **given)
    else:
        from trl import GRPOConfig, GRPOTrainer

        group = s.group
        config = GRPOConfig(
            per_device_train_batch_size=s.prompts * group,
            num_generations=group,
            max_completion_length=s.new_tokens,
            beta=0.0,  # its default: neither a reference model nor a KL to look at, so less work than ours
            **common,
        )
        trainer = generate_timed(GRPOTrainer)(reward_funcs=judge_async, args=config, **given)
    trainer.train()
    assert len(waited) == trainer.state.global_step == s.steps
    return Measured(
        loop=loop,
        completions=s.steps * s.prompts * group,
        wait_s=sum(waited),
        generate_s=sum(generating),
        staleness_mean_steps=0.0,
        staleness_max_steps=0.0,
        latency_p50_s=statistics.median(waited),
        **watch.times(),
    )


# The comparison.


def build_model(s: Settings, path: Path) -> None:
    from rlhf_cli.policy.runtime import prepare
    from rlhf_cli.policy.tiny import build_tiny_model
    from rlhf_cli.recipe.schema import FromScratch

    prepare(threads=1)
    texts = [row["prompt"][-1]["content"] for row in map(json.loads, PROMPTS.read_text().splitlines())]
    build_tiny_model(texts, FromScratch(layers=s.layers, hidden=s.hidden, heads=8), s.seed, path)


def in_process(loop: str, s: Settings, model: Path) -> Measured:
    """Run one loop in a process of its own."""
    job = json.dumps({"loop": loop, "model": str(model), "settings": asdict(s)})
    done = subprocess.run(
        [sys.executable, __file__, "--job", job], env=os.environ | QUIET, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{loop} failed:\n{done.stderr[-4000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def work(job: dict[str, Any]) -> Measured:
    """What happens in that process."""
    run = run_ours if job["loop"] in (OURS, FLOW) else run_trl
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        return run(job["loop"], Settings(**job["settings"]), Path(job["model"]), Path(folder))


def table(runs: Sequence[Measured]) -> str:
    """Medians over the repeats, and for completions per second their spread; the ratio is that of the medians."""
    loops = list(dict.fromkeys(m.loop for m in runs))
    of = {loop: [m for m in runs if m.loop == loop] for loop in loops}
    ours = statistics.median(m.per_s for m in of[OURS])
    head = f"{'':16} {'completions/s':>13} {'(min-max)':>13} {'waiting':>8} {'generating':>10} {'s/step':>7}"
    lines = [f"{head} {'cpu s':>6} {'answer s':>8}  {'staleness':15} ours is"]
    for loop in loops:
        per_s = sorted(m.per_s for m in of[loop])
        mid = {
            name: statistics.median(getattr(m, name) for m in of[loop])
            for name in ("per_s", "wait_share", "step_s", "cpu_s", "latency_p50_s", "staleness_mean_steps")
        }
        generating = statistics.median(m.generate_s / m.wall_s for m in of[loop])
        staleness = f"{mid['staleness_mean_steps']:.1f}, at most {max(m.staleness_max_steps for m in of[loop]):.0f}"
        lines.append(
            f"{loop:16} {mid['per_s']:13.2f} {f'{per_s[0]:.2f}-{per_s[-1]:.2f}':>13} {mid['wait_share']:8.1%} "
            f"{generating:10.1%} {mid['step_s']:7.2f} {mid['cpu_s']:6.1f} {mid['latency_p50_s']:8.2f}  {staleness:15} "
            f"{ours / mid['per_s']:.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds until feedback answers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grpo", action="store_true", help="also TRL's GRPOTrainer")
    parser.add_argument("--flow", action="store_true", help="also ours through the embedded server and its raters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write date, machine, settings and all repeats")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(asdict(work(json.loads(args.job)))))
        return

    s = Settings(latency_s=args.latency, steps=args.steps)
    loops = [OURS, ONLINE_DPO, *[GRPO] * args.grpo, *[FLOW] * args.flow]
    runs: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="overlap-model-") as folder:
        os.environ.update(QUIET)
        build_model(s, Path(folder))
        for repeat in range(args.repeats):
            for loop in loops:
                runs.append(in_process(loop, s, Path(folder)))
                print(f"{repeat + 1}/{args.repeats} {loop:16} {runs[-1].per_s:6.2f} completions/s", file=sys.stderr)
    load, versions = [m.load_average for m in runs], {name: metadata.version(name) for name in VERSIONS}
    print(
        f"{s.latency_s:g} s until an answer, {s.steps} steps of {s.prompts} prompts, {s.new_tokens} new tokens, "
        f"{args.repeats} repeats, medians; load average {min(load):.1f}-{max(load):.1f}\n"
    )
    print(table(runs))
    print("\n" + ", ".join(f"{key} {value}" for key, value in (machine() | versions).items()))
    if args.json:
        repeats = [asdict(m) | {"completions_per_s": m.per_s, "wait_share": m.wait_share} for m in runs]
        write(args.json, {"versions": versions, "settings": asdict(s), "repeats": repeats})


if __name__ == "__main__":
    main()
