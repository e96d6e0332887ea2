"""kill -9 and signals in a real `rlhf sft`, and what the same command makes of what they left: the same weights."""

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
from cli_world import ROOT, Ended, events, rlhf, succeeded

from rlhf_cli.journal.events import RunStopped, StageStarted
from rlhf_cli.journal.metrics import read_metrics
from rlhf_cli.journal.run_dir import RunDir

ADAPTERS = {"lora": {"rank": 4, "dropout": 0.2}}
"""Dropout, so that random numbers have to go on where they were."""
STEPS = 18

Moment = Callable[[RunDir], bool]


def write(folder: Path, model: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A recipe whose only stage is sft: 60 rows and two epochs, and a checkpoint every four steps."""
    section = {
        "dataset": str(ROOT / "recipes" / "data" / "smoke_sft.jsonl"),
        "heldout": 0.25,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "accumulate": 2,
        "batch_size": 3,
        "samples": 2,
        "checkpoint_every": 4,
        "stop_early": {"every": 5, "patience": 9},
        **keys,
    }
    recipe = {
        "name": "killed",
        "seed": 5,
        "model": {"from_scratch": {"layers": 4, "hidden": 128, "heads": 4}, **(model or {})},
        "sft": section,
        "compute": {"threads": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlhf_cli", "sft", str(recipe), "--run-dir", str(folder), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


def strike(recipe: Path, folder: Path, number: signal.Signals, when: Moment) -> Ended:
    """Start the stage, send a signal at the moment, and wait for the end."""
    process, run, end = start(recipe, folder), RunDir(folder), time.monotonic() + 120
    while not when(run):
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.0005)
    process.send_signal(number)
    return ended(process)


def after_step(step: int) -> Moment:
    """As soon as the row of the step is there, in the middle of the next one."""
    return lambda run: run.sft_metrics.exists() and run.sft_metrics.read_bytes().count(b"\n") >= step


def while_saving(step: int, file: str) -> Moment:
    """In the middle of a checkpoint: this file of it is being written, or is the last one that was."""
    return lambda run: (run.sft_checkpoints / ".partial" / f"checkpoint-{step}" / file).exists()


def published(step: int) -> Moment:
    return lambda run: (run.sft_checkpoints / f"step-{step:06d}").exists()


def saving_the_model(run: RunDir) -> bool:
    return (run.sft_checkpoints / ".scratch" / "model" / "config.json").exists()


def weights(folder: Path) -> bytes:
    return (RunDir(folder).sft_model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model", "keys", "moments"),
    [
        pytest.param(ADAPTERS, {}, [after_step(10)], id="adapters with dropout"),
        pytest.param(
            {}, {"packing": True, "max_length": 96}, [while_saving(8, "optimizer.pt")], id="packed, while saving"
        ),
        pytest.param(
            ADAPTERS,
            {"stop_early": None},
            [after_step(2), while_saving(4, "adapter_model.safetensors"), published(8), saving_the_model],
            marks=pytest.mark.slow,
            id="four times",
        ),
        *(
            pytest.param(model, keys, [moment], marks=pytest.mark.slow, id=f"{kind} {name}")
            for kind, model, keys in [
                ("full", {}, {}),
                ("adapters", ADAPTERS, {}),
                ("last layers", {"last_layers": 2}, {"stop_early": {"every": 2, "patience": 1}}),
                ("packed adapters", ADAPTERS, {"packing": True, "max_length": 96}),
            ]
            for name, moment in [
                ("after step 3", after_step(3)),
                ("after step 6", after_step(6)),
                ("in the second epoch", after_step(13)),
                ("while the state is written", while_saving(8, "trainer_state.json")),
                ("while it is saved", while_saving(12, "")),
                ("when it is published", published(8)),
                ("after the last step", published(STEPS)),
                ("saving the model", saving_the_model),
            ]
            if not (kind == "last layers" and ("12" in name or "step" in name))
        ),
    ],
)
def test_a_killed_sft_ends_with_the_weights_of_one_that_was_never_stopped(
    tmp_path: Path, model: dict[str, Any], keys: dict[str, Any], moments: list[Moment]
) -> None:
    recipe = write(tmp_path, model, **keys)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    undisturbed = succeeded(rlhf("sft", recipe, "--run-dir", whole, "--json"))
    for moment in moments:
        assert strike(recipe, folder, signal.SIGKILL, moment).code == -signal.SIGKILL

    done = succeeded(rlhf("sft", recipe, "--run-dir", folder, "--json"))

    assert weights(folder) == weights(whole)
    assert {k: v for k, v in done.items() if k != "seconds"} == {k: v for k, v in undisturbed.items() if k != "seconds"}
    losses = [[row["sft/loss"] for row in read_metrics(RunDir(run).sft_metrics)] for run in (whole, folder)]
    assert losses[0] == losses[1]
    assert RunDir(folder).sft_samples.read_bytes() == RunDir(whole).sft_samples.read_bytes()
    assert sorted(path.name for path in RunDir(folder).sft_model.parent.iterdir()) == ["metrics.jsonl", "model"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_a_checkpoint_even_where_none_was_asked_for(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    recipe = write(tmp_path, ADAPTERS, checkpoint_every=None)
    folder = tmp_path / "stopped"
    stopped = strike(recipe, folder, number, after_step(7))

    assert stopped.code == code, stopped.err
    assert f"stopped by {number.name}" in stopped.err
    (saved,) = RunDir(folder).sft_checkpoints.glob("step-*")
    step = json.loads((saved / "rlhf.json").read_bytes())["step"]
    assert step >= 7
    last = events(folder)[-1]
    assert isinstance(last, RunStopped)
    assert last.exit_code == code
    succeeded(rlhf("sft", recipe, "--run-dir", folder, "--json", "--resume"))
    assert [e.resumed_from_step for e in events(folder) if isinstance(e, StageStarted)] == [None, step]
    succeeded(rlhf("sft", recipe, "--run-dir", tmp_path / "whole", "--json"))
    assert weights(folder) == weights(tmp_path / "whole")


def test_a_checkpoint_of_other_inputs_and_one_that_is_given_up_are_not_gone_on_from(tmp_path: Path) -> None:
    recipe, folder = write(tmp_path), tmp_path / "run"
    strike(recipe, folder, signal.SIGKILL, published(4))
    write(tmp_path, learning_rate=1e-3)
    succeeded(rlhf("sft", recipe, "--run-dir", folder, "--json"))
    succeeded(rlhf("sft", recipe, "--run-dir", folder, "--json", "--fresh"))
    assert [e.resumed_from_step for e in events(folder) if isinstance(e, StageStarted)] == [None, None, None]
