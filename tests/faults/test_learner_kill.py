"""kill -9 in a real `rlhf run-online` with the other learners: adapters, updates and a renewed reference all go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import rlhf, state, succeeded
from test_ppo_kill import STEPS, Moment, after_step, kill, lines, made, while_saving

from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.policy.policy import REFERENCE

LEARNERS: dict[str, tuple[dict[str, Any], Moment]] = {
    "grpo": ({"algorithm": "grpo", "beta": 0.05, "epochs": 2, "minibatches": 2}, after_step(1)),
    "previous": (
        {"algorithm": "dpo", "labels": "posterior", "reference": "previous", "reference_every": 3},
        while_saving(4, REFERENCE),
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_never_stopped(tmp_path: Path, tiny: str, name: str) -> None:
    """Of adapters, which start random: also when the process died before the first checkpoint."""
    learner, moment = LEARNERS[name]
    votes = [{"prompt": f"what is {n}?", "completions": ["la", "zt"], "wins": [[0, 3], [n % 2, 0]]} for n in range(8)]
    recipe = tmp_path / "recipe.yaml"
    plan = {
        "name": name,
        "seed": 5,
        "model": {"path": tiny, "lora": {"rank": 4}},
        "data": {"prompts": lines(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}!"} for n in range(6)])},
        "train_rm": {"dataset": lines(tmp_path / "votes.jsonl", list(votes)), "max_steps": 2, "learning_rate": 1e-3},
        "run_online": {
            "feedback": "reward_model",
            "steps": STEPS,
            "prompts_per_step": 2,
            "group_size": 3,
            "max_in_flight": 4,
            "sampling": {"max_new_tokens": 6},
            "learner": {"learning_rate": 3e-3, **learner},
            "kl": {"hard_nats": 1000.0},
            "checkpoint_every": 2,
        },
        "compute": {"threads": 1, "precision": "fp32", "generator_precision": "fp32"},
    }
    recipe.write_text(yaml.safe_dump(plan))
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    succeeded(rlhf("train-rm", recipe, "--run-dir", whole, "--json"))
    shutil.copytree(whole, folder)
    succeeded(rlhf("run-online", recipe, "--run-dir", whole, "--json"))
    kill(recipe, folder, moment)

    succeeded(rlhf("run-online", recipe, "--run-dir", folder, "--resume", "--json"))

    assert made(folder) == made(whole)
    rows = [read_metrics(RunDir(run).metrics) for run in (whole, folder)]
    learned = [[{k: v for k, v in row.items() if k.startswith("train/")} for row in run] for run in rows]
    assert learned[0] == learned[1]
    assert set(rows[0][0]) - {"step", "at"} <= set(METRICS)
    assert {"train/entropy_nats", "train/beta"} <= set(rows[0][0])
    if name == "grpo":
        assert {"train/clip_frac", "train/ratio_mean", "train/kl_token_nats"} <= set(rows[0][0])
    trained = [g for event in state(folder).steps.values() for g in event.group_ids]
    assert len(trained) == len(set(trained)) == 2 * STEPS
