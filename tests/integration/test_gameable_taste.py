"""A taste that can be gamed, with guards and without, and roll-backs through kill -9 of real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
from cli_world import ROOT, count, events, rlhf, state, succeeded

from rlhf_cli.journal.events import CheckpointSaved, RolledBack, StepTrained
from rlhf_cli.journal.metrics import read_metrics
from rlhf_cli.journal.run_dir import RunDir

# The raters' word is "the longer, the better"; what they are really after is a full sentence of some sixteen words.
LONGER = """
def score(groups):
    return [[float(len(text)) for text in group["completions"]] for group in groups]
"""

RECIPE = """
name: gameable
seed: 7
model:
  from_scratch: {{layers: 2, hidden: 64, heads: 4}}
data:
  prompts: {data}/everyday_train.jsonl
sft: {{dataset: {data}/smoke_sft.jsonl, max_steps: 200, learning_rate: 3e-3, batch_size: 16}}
run_online:
  steps: 16
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

GUARDS = """
  kl: {hard_nats: 6, on_hard: rollback, rollback_beta: 4}
  length: {max_correlation: 0.8, max_growth: 1.7}
"""


def truth(text: str) -> float:
    """A tenth a word up to sixteen, less a tenth for each beyond, and 1 for an end."""
    words = len(text.split())
    return 0.1 * min(words, 16) - 0.1 * max(0, words - 16) + float(text.rstrip().endswith("."))


def true_reward(folder: Path, policy_steps: range) -> float:
    """Of everything that the policy sampled after these steps, as far as they stand."""
    return fmean(
        truth(completion.text)
        for group in state(folder).groups.values()
        if group.sampled.policy_step in policy_steps and not group.void
        for completion in group.sampled.completions
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both recipes, and the run folders `free` and `guarded` of them, trained to the end; `begun` is before that."""
    folder = tmp_path_factory.mktemp("guards")
    (folder / "longer.py").write_text(LONGER)
    recipe = RECIPE.format(data=ROOT / "recipes" / "data")
    (folder / "free.yaml").write_text(recipe)
    (folder / "guarded.yaml").write_text(recipe + GUARDS)
    succeeded(rlhf("sft", folder / "free.yaml", "--run-dir", folder / "begun", "--json"))
    for name in ("free", "guarded"):
        shutil.copytree(folder / "begun", folder / name)
        succeeded(rlhf("run-online", folder / f"{name}.yaml", "--run-dir", folder / name, "--json"))
    return folder


def test_a_taste_that_can_be_gamed_trips_the_guards_and_the_true_reward_ends_higher(runs: Path) -> None:
    free, guarded = runs / "free", runs / "guarded"
    known = state(guarded)
    assert {event.guard for event in known.tripped} == {"length_correlation", "length_growth"}
    assert known.rollbacks[0].guard == "kl"
    assert known.beta_scale == 4 ** len(known.rollbacks)
    assert sorted(known.steps) == list(range(1, 17))

    at_first, last = range(1), range(12, 16)
    start = true_reward(free, at_first)
    assert start == true_reward(guarded, at_first)
    assert true_reward(guarded, last) > start  # what was wanted was reached
    assert true_reward(free, last) < true_reward(guarded, last) - 0.3  # and without guards it was lost again

    rows = read_metrics(RunDir(guarded).metrics)
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert rows[-1]["length/reward_correlation"] == pytest.approx(1.0)
    assert rows[0]["length/mean_chars"] < rows[-1]["length/mean_chars"]
    assert rows[-1]["train/beta"] == pytest.approx(0.1 * known.beta_scale)


@pytest.mark.parametrize(
    ("after", "number"),
    [
        (RolledBack, 1),
        pytest.param(StepTrained, 7, marks=pytest.mark.slow),
        pytest.param(StepTrained, 9, marks=pytest.mark.slow),
        pytest.param(RolledBack, 2, marks=pytest.mark.slow),
        pytest.param(CheckpointSaved, 6, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_killed_around_a_roll_back_ends_with_the_weights_of_one_that_was_not(
    runs: Path, tmp_path: Path, after: type, number: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / "begun", folder)
    command = ["run-online", str(runs / "guarded.yaml"), "--run-dir", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "rlhf_cli", *command], stderr=subprocess.DEVNULL, env=os.environ)
    end = time.monotonic() + 120
    while count(after, events(folder)) < number:
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL

    succeeded(rlhf(*command, "--json", "--resume"))

    whole, known = state(runs / "guarded"), state(folder)
    assert [e.model_dump() for e in known.rollbacks] == [e.model_dump() for e in whole.rollbacks]
    assert {s: e.beta for s, e in known.steps.items()} == {s: e.beta for s, e in whole.steps.items()}
    weights = [RunDir(f).online_model / "model.safetensors" for f in (folder, runs / "guarded")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
