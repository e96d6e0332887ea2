"""GRPO, RLOO and the variants of DPO from the command line: what a function likes, the policy learns to write."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from cli_world import refused, rlhf, state, succeeded
from test_ppo_loop import write

from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.run_dir import RunDir

LEARNERS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo", "beta": 0.01, "epochs": 2, "minibatches": 2, "accumulate": 2},
    "rloo": {"algorithm": "rloo", "beta": 0.01, "loss": "dapo", "clip_high": 0.3},
    "ipo": {"algorithm": "dpo", "beta": 0.05, "loss": "ipo", "labels": "posterior", "label_smoothing": 0.05},
    "previous": {"algorithm": "dpo", "beta": 0.1, "reference": "previous", "reference_every": 8},
}


def with_learner(folder: Path, tiny: str, learner: dict[str, Any], **online: Any) -> Path:
    file = write(folder, tiny)
    plan = yaml.safe_load(file.read_text())
    del plan["train_rm"]
    plan["run_online"] |= {"learner": {"learning_rate": 5e-3, **learner}, **online}
    file.write_text(yaml.safe_dump(plan))
    return file


@pytest.mark.parametrize("name", LEARNERS)
def test_the_scores_of_a_function_rise(tmp_path: Path, tiny: str, name: str) -> None:
    file, folder = with_learner(tmp_path, tiny, LEARNERS[name], kl={"hard_nats": 1000.0}), tmp_path / "run"
    succeeded(rlhf("run-online", file, "--run-dir", folder, "--json"))

    rows = read_metrics(RunDir(folder).metrics)
    assert set().union(*rows) - {"step", "at"} <= set(METRICS)
    scores = [fmean(g.ranked.scores) for g in state(folder).groups.values() if g.ranked and g.ranked.scores]
    assert fmean(scores[-16:]) > fmean(scores[:16]) + 1
    assert rows[0]["train/entropy_nats"] > 1
    if LEARNERS[name]["algorithm"] != "dpo":
        assert rows[0]["train/ratio_mean"] == pytest.approx(1, abs=0.3)
        assert max(row["train/clip_frac"] for row in rows) > 0


def test_a_reference_that_moves_needs_a_limit_that_does_not(tmp_path: Path, tiny: str) -> None:
    file = with_learner(tmp_path, tiny, LEARNERS["previous"])
    ended = rlhf("run-online", file, "--run-dir", tmp_path / "run")
    refused(ended, 3, "recipe.yaml:", "run_online.learner.reference: moves with the policy", "kl.hard_nats")
