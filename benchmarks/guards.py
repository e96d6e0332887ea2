"""A taste that can be gamed, with guards and without: true reward, length and KL after every step.

    OMP_NUM_THREADS=1 python benchmarks/guards.py --json FILE --plot docs/images/guards.svg

A tiny model that has learned short sentences is trained by online DPO on a function that likes whatever is longer. What
is really wanted is a full sentence of some sixteen words, so longer is better for a while, and then it is not. The same
recipe runs without guards and with them, on every seed. Nothing is sampled for the figures: they are of the completions
that the runs themselves sampled.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import machine, write
from matplotlib.figure import Figure

from rlhf_cli.journal.events import GroupSampled, RolledBack
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import replay

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
STEPS, LAST = 20, 5
HARD_NATS, MAX_GROWTH = 6, 1.7

LONGER = """
def score(groups):
    return [[float(len(text)) for text in group["completions"]] for group in groups]
"""
RECIPE = """
name: gameable
seed: {seed}
model:
  from_scratch: {{layers: 2, hidden: 64, heads: 4}}
data:
  prompts: {data}/everyday_train.jsonl
sft: {{dataset: {data}/smoke_sft.jsonl, max_steps: 200, learning_rate: 3e-3, batch_size: 16}}
run_online:
  steps: {steps}
  prompts_per_step: 8
  group_size: 4
  max_in_flight: 8
  feedback: function
  function: {{file: longer.py}}
  sampling: {{temperature: 1.0, max_new_tokens: 48}}
  learner: {{algorithm: dpo, beta: 0.1, learning_rate: 3e-4}}
  checkpoint_every: 2
  keep_checkpoints: 4
"""
GUARDS = f"""
  kl: {{hard_nats: {HARD_NATS}, on_hard: rollback, rollback_beta: 4}}
  length: {{max_correlation: 0.8, max_growth: {MAX_GROWTH}}}
"""


def truth(text: str) -> float:
    """A tenth a word up to sixteen, less a tenth for each beyond, and 1 for an end."""
    words = len(text.split())
    return 0.1 * min(words, 16) - 0.1 * max(0, words - 16) + float(text.rstrip().endswith("."))


@dataclass(frozen=True)
class Point:
    """What the policy sampled after so many steps."""

    step: int
    true_reward: float
    kl_nats: float
    chars: float
    void: bool


@dataclass(frozen=True)
class Run:
    seed: int
    guarded: bool
    points: list[Point]
    """In the order of the run, those that a roll-back made void too."""
    rollbacks: list[tuple[str, int, int]]
    """Guard, from which step, to which."""
    notes: list[str]
    ended: int
    """Exit code."""

    @property
    def last(self) -> float:
        """True reward of the last steps that stand."""
        return statistics.fmean([p.true_reward for p in self.points if not p.void][-LAST:])

    @property
    def first(self) -> float:
        return self.points[0].true_reward


def measure(folder: Path, seed: int, guarded: bool, ended: int) -> Run:
    entries = read(folder / "journal.jsonl")
    state = replay(entries)
    batches: list[list[GroupSampled]] = []
    for event in (entry.event for entry in entries):
        if isinstance(event, RolledBack):
            batches.append([])
        elif isinstance(event, GroupSampled):
            if not batches or (batches[-1] and batches[-1][0].policy_step != event.policy_step):
                batches.append([])
            batches[-1].append(event)
    points = []
    for batch in filter(None, batches):
        completions = [c for event in batch for c in event.group().completions]
        points.append(
            Point(
                batch[0].policy_step,
                statistics.fmean(truth(c.text) for c in completions),
                statistics.fmean(sum(c.logps) - sum(c.ref_logps) for c in completions),
                statistics.fmean(len(c.text) for c in completions),
                state.groups[batch[0].group_id].void,
            )
        )
    backs = [(e.guard, e.from_step, e.to_step) for e in state.rollbacks]
    return Run(seed, guarded, points, backs, [e.guard for e in state.tripped], ended)


def runs_of(seed: int, folder: Path) -> list[Run]:
    (folder / "longer.py").write_text(LONGER)
    recipe = RECIPE.format(seed=seed, data=DATA, steps=STEPS)
    found = []
    for guarded in (False, True):
        file, run = folder / f"{guarded}.yaml", folder / f"{guarded}"
        file.write_text(recipe + GUARDS * guarded)
        for stage in ("sft", "run-online"):
            command = [sys.executable, "-m", "rlhf_cli", stage, str(file), "--run-dir", str(run), "--output", "plain"]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode not in (0, 7):
                raise SystemExit(ended.stderr)
        found.append(measure(run, seed, guarded, ended.returncode))
        print(
            f"seed {seed} {_name(guarded)} guards: true reward {found[-1].first:.2f} at first, "
            f"{found[-1].last:.2f} at last, rolled back {found[-1].rollbacks}, noted {found[-1].notes}",
            flush=True,
        )
    return found


def plot(runs: list[Run], file: Path) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    rows = [("true reward", "true_reward", None), ("characters", "chars", None), ("KL, nats", "kl_nats", HARD_NATS)]
    for axes, (label, name, limit) in zip(figure.subplots(1, 3), rows, strict=True):
        for run in runs:
            colour = "#1f7a4d" if run.guarded else "#b3372f"
            stand = [p for p in run.points if not p.void]
            axes.plot([p.step for p in stand], [getattr(p, name) for p in stand], color=colour, alpha=0.3, linewidth=1)
            void = [p for p in run.points if p.void]
            axes.plot([p.step for p in void], [getattr(p, name) for p in void], "x", color=colour, markersize=4)
        for guarded, colour in ((False, "#b3372f"), (True, "#1f7a4d")):
            steps = range(STEPS)
            values = [
                [getattr(p, name) for r in runs if r.guarded == guarded for p in r.points if p.step == s and not p.void]
                for s in steps
            ]
            axes.plot(
                [s for s, v in zip(steps, values, strict=True) if v],
                [statistics.fmean(v) for v in values if v],
                color=colour,
                linewidth=2.4,
                label=f"{_name(guarded)} guards",
            )
        if limit is not None:
            axes.axhline(limit, color="grey", linestyle=(0, (4, 3)), linewidth=1, label="hard limit")
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    runs: list[Run] = []
    for seed in range(1, given.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            runs += runs_of(seed, Path(folder))
        gains = [with_.last - without.last for without, with_ in zip(runs[::2], runs[1::2], strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        if given.json:
            write(given.json, {"steps": STEPS, "gains": gains, "error": error, "runs": [asdict(run) for run in runs]})
        if given.plot:
            plot(runs, given.plot)
    for guarded in (False, True):
        of = [run for run in runs if run.guarded == guarded]
        print(
            f"{_name(guarded)} guards: {statistics.fmean(r.first for r in of):.2f} at first, "
            f"{statistics.fmean(r.last for r in of):.2f} over the last {LAST} steps"
        )
    print(f"difference {statistics.fmean(gains):+.2f}, standard error {error}, {len(gains)} seeds")
    print(machine())


def _name(guarded: bool) -> str:
    return "with" if guarded else "without"


if __name__ == "__main__":
    main()
