"""kill -9 and signals in a real `rlhf train-rm`; what the same command makes of what they left: the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import Ended, rlhf, succeeded

from rlhf_cli.journal.metrics import read_metrics
from rlhf_cli.journal.run_dir import RunDir

STEPS = 18

Moment = Callable[[RunDir], bool]


def write(folder: Path, path: str, model: dict[str, Any], **keys: Any) -> Path:
    """A recipe whose only stage is train-rm: random numbers in dropout, several passes, a look every five steps."""
    rows = []
    for n in range(40):
        wins = [[0, 3, 2 + n % 3], [n % 2, 0, 0], [1, 2, 0]]
        rows.append(
            {"prompt": f"what is {'very ' * (n % 5)}number {n}?", "completions": ["la la", "zt", "xq a"], "wins": wins}
        )
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "dataset": "votes.jsonl",
        "heldout": 0.25,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "accumulate": 2,
        "batch_size": 4,
        "dropout": 0.2,
        "checkpoint_every": 4,
        "stop_early": {"every": 5, "patience": 9},
        **keys,
    }
    recipe = {
        "name": "killed",
        "seed": 5,
        "model": {"path": path, **model},
        "train_rm": section,
        "compute": {"threads": 1},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def strike(recipe: Path, folder: Path, number: signal.Signals, when: Moment) -> Ended:
    """Start the stage, send a signal at the moment, and wait for the end."""
    command = [sys.executable, "-m", "rlhf_cli", "train-rm", str(recipe), "--run-dir", str(folder), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    run, end = RunDir(folder), time.monotonic() + 120
    while not when(run):
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.0005)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


def after_step(step: int) -> Moment:
    """As soon as the row of the step is there, in the middle of the next one."""
    return lambda run: run.train_rm_metrics.exists() and run.train_rm_metrics.read_bytes().count(b"\n") >= step


def while_saving(step: int, file: str) -> Moment:
    return lambda run: (run.train_rm_checkpoints / ".partial" / f"checkpoint-{step}" / file).exists()


def saving_the_model(run: RunDir) -> bool:
    return (run.train_rm_checkpoints / ".scratch" / "model" / "config.json").exists()


def judging(run: RunDir) -> bool:
    return run.train_rm_report.exists()


def made(folder: Path) -> dict[str, bytes]:
    """Every file of the model, and the report."""
    run = RunDir(folder)
    files = {path.name: path.read_bytes() for path in run.train_rm_model.iterdir()}
    return {**files, "report": run.train_rm_report.read_bytes()}


ENCODER: tuple[str, dict[str, Any], dict[str, Any]] = ("tiny_encoder", {}, {"ensemble": 3})
ADAPTERS: tuple[str, dict[str, Any], dict[str, Any]] = ("tiny", {"lora": {"rank": 4}}, {})
PAIRWISE: tuple[str, dict[str, Any], dict[str, Any]] = ("tiny_encoder", {"last_layers": 1}, {"kind": "pairwise"})


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        pytest.param(ENCODER, [after_step(10)], id="an ensemble on an encoder"),
        pytest.param(ADAPTERS, [while_saving(8, "optimizer.pt"), judging], id="adapters, twice"),
        pytest.param(PAIRWISE, [after_step(6), saving_the_model], id="pairwise, twice", marks=pytest.mark.slow),
        *(
            pytest.param(kind, [moment], id=f"{name} {when}", marks=pytest.mark.slow)
            for name, kind in [("ensemble", ENCODER), ("adapters", ADAPTERS), ("pairwise", PAIRWISE)]
            for when, moment in [
                ("after step 2", after_step(2)),
                ("after step 7", after_step(7)),
                ("after step 13", after_step(13)),
                ("while a checkpoint is written", while_saving(12, "trainer_state.json")),
                ("saving the model", saving_the_model),
            ]
        ),
    ],
)
def test_a_killed_train_rm_ends_with_the_weights_of_one_that_was_never_stopped(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: tuple[str, dict[str, Any], dict[str, Any]],
    moments: list[Moment],
) -> None:
    backbone, model, keys = kind
    recipe = write(tmp_path, request.getfixturevalue(backbone), model, **keys)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    undisturbed = succeeded(rlhf("train-rm", recipe, "--run-dir", whole, "--json"))
    for moment in moments:
        assert strike(recipe, folder, signal.SIGKILL, moment).code == -signal.SIGKILL

    done = succeeded(rlhf("train-rm", recipe, "--run-dir", folder, "--json"))

    assert made(folder) == made(whole)
    assert {k: v for k, v in done.items() if k != "seconds"} == {k: v for k, v in undisturbed.items() if k != "seconds"}
    losses = [[row["train_rm/loss"] for row in read_metrics(RunDir(run).train_rm_metrics)] for run in (whole, folder)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    assert not RunDir(folder).train_rm_checkpoints.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_names_the_way_on(tmp_path: Path, tiny: str, number: signal.Signals) -> None:
    recipe = write(tmp_path, tiny, {}, checkpoint_every=None)
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    succeeded(rlhf("train-rm", recipe, "--run-dir", whole, "--json"))
    stopped = strike(recipe, folder, number, after_step(3))
    assert stopped.code == 128 + number
    assert "steps are saved" in stopped.err
    assert f"rlhf train-rm {recipe}" in stopped.err
    succeeded(rlhf("train-rm", recipe, "--run-dir", folder, "--json"))
    assert made(folder) == made(whole)
