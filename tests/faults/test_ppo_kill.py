"""kill -9 in a real `rlhf run-online` with ppo: policy, critic, their optimizer and the weight of the KL all go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_world import count, events, refused, rlhf, state, succeeded

from rlhf_cli.journal.events import StepTrained
from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.learner.ppo import CRITIC

STEPS = 7
Moment = Callable[[Path], bool]
LEARNER = {
    "algorithm": "ppo",
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "beta": 0.05,
    "kl_target_nats": 0.5,
    "epochs": 2,
    "minibatches": 2,
    "entropy": 0.01,
    "unended_reward": -1.0,
}


def lines(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> tuple[Path, Path]:
    """A recipe, and a run folder in which its reward model was trained."""
    folder = tmp_path_factory.mktemp("ppo")
    votes = [{"prompt": f"what is {n}?", "completions": ["la", "zt"], "wins": [[0, 3], [n % 2, 0]]} for n in range(8)]
    recipe = {
        "name": "ppo",
        "seed": 5,
        "model": {"path": tiny},
        "data": {"prompts": lines(folder / "prompts.jsonl", [{"prompt": f"Say {n}!"} for n in range(6)])},
        "train_rm": {"dataset": lines(folder / "votes.jsonl", list(votes)), "max_steps": 5, "learning_rate": 1e-3},
        "run_online": {
            "feedback": "reward_model",
            "steps": STEPS,
            "prompts_per_step": 2,
            "group_size": 3,
            "max_in_flight": 4,
            "sampling": {"max_new_tokens": 6},
            "learner": LEARNER,
            "checkpoint_every": 2,
        },
        "compute": {"threads": 1, "precision": "fp32", "generator_precision": "fp32"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    succeeded(rlhf("train-rm", file, "--run-dir", folder / "run", "--json"))
    return file, folder / "run"


def after_step(step: int) -> Moment:
    return lambda folder: count(StepTrained, events(folder)) >= step


def while_saving(step: int, last: str = CRITIC) -> Moment:
    """The file that is written last is on disk, the checkpoint has no name yet."""
    return lambda folder: (RunDir(folder).checkpoints / ".partial" / f"checkpoint-{step}" / last).exists()


def kill(recipe: Path, folder: Path, when: Moment, *options: str) -> None:
    command = [sys.executable, "-m", "rlhf_cli", "run-online", str(recipe), "--run-dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    end = time.monotonic() + 120
    while not when(folder):
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.0005)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RunDir(folder).online_model.iterdir()}


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([while_saving(4)], id="while a checkpoint is written"),
        pytest.param([after_step(3)], id="between two checkpoints", marks=pytest.mark.slow),
        pytest.param([after_step(1), after_step(5)], id="before the first, and again", marks=pytest.mark.slow),
    ],
)
def test_a_killed_ppo_run_ends_with_the_weights_of_one_that_was_never_stopped(
    tmp_path: Path, prepared: tuple[Path, Path], moments: list[Moment]
) -> None:
    recipe, before = prepared
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(before, whole)
    shutil.copytree(before, folder)
    succeeded(rlhf("run-online", recipe, "--run-dir", whole, "--json"))
    for n, moment in enumerate(moments):
        kill(recipe, folder, moment, *(["--resume"] if n else []))

    succeeded(rlhf("run-online", recipe, "--run-dir", folder, "--resume", "--json"))

    assert made(folder) == made(whole)
    rows = [read_metrics(RunDir(run).metrics) for run in (whole, folder)]
    learned = [[{k: v for k, v in row.items() if k.startswith("train/")} for row in run] for run in rows]
    assert learned[0] == learned[1]
    assert len({row["train/beta"] for row in learned[0]}) > 1  # it adapted, and went on from where it was
    assert {"train/value_loss", "train/value_explained", "train/kl_token_nats", "train/entropy_nats"} <= set(rows[0][0])
    assert set(rows[0][0]) - {"step", "at"} <= set(METRICS)
    trained = [g for event in state(folder).steps.values() for g in event.group_ids]
    assert len(trained) == len(set(trained)) == 2 * STEPS


def test_ppo_without_its_reward_model_is_refused_before_anything_is_sampled(
    tmp_path: Path, prepared: tuple[Path, Path]
) -> None:
    refused(rlhf("run-online", prepared[0], "--run-dir", tmp_path / "run"), 3, "run-online needs train-rm")
    assert not state(tmp_path / "run").groups
