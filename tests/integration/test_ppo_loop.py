"""PPO from the command line: a function of the user's own as reward, a critic from the run's reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from cli_world import refused, rlhf, state, succeeded

from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.run_dir import RunDir

STEPS = 24
FUNCTION = """
def score(groups):
    return [[10 * sum(c in "aeiou" for c in text) / max(1, len(text)) for text in g["completions"]] for g in groups]
"""


def lines(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(folder: Path, path: str, **of_reward_model: Any) -> Path:
    """A recipe whose reward is a function that likes vowels; a completion that was cut off scores as it is."""
    (folder / "taste.py").write_text(FUNCTION)
    votes = [{"prompt": f"what is {n}?", "completions": ["la", "zt"], "wins": [[0, 3], [n % 2, 0]]} for n in range(8)]
    trained = {"dataset": lines(folder / "votes.jsonl", list(votes)), "max_steps": 5, "learning_rate": 1e-3}
    recipe = {
        "name": "ppo",
        "seed": 5,
        "model": {"path": path},
        "data": {"prompts": lines(folder / "prompts.jsonl", [{"prompt": f"Say {n}!"} for n in range(6)])},
        "train_rm": {**trained, **of_reward_model},
        "run_online": {
            "feedback": "function",
            "function": {"file": "taste.py"},
            "steps": STEPS,
            "prompts_per_step": 4,
            "group_size": 4,
            "max_in_flight": 8,
            "sampling": {"max_new_tokens": 8},
            "learner": {
                "algorithm": "ppo",
                "learning_rate": 1e-2,
                "value_learning_rate": 1e-2,
                "beta": 0.01,
                "epochs": 2,
                "minibatches": 2,
                "accumulate": 2,
            },
            "checkpoint_every": 10,
        },
        "compute": {"threads": 1, "precision": "fp32", "generator_precision": "fp32"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_the_scores_of_a_function_rise(tmp_path: Path, tiny: str) -> None:
    file = write(tmp_path, tiny)
    folder = tmp_path / "run"
    succeeded(rlhf("train-rm", file, "--run-dir", folder, "--json"))
    result = succeeded(rlhf("run-online", file, "--run-dir", folder, "--json"))

    assert result["steps"] == STEPS
    assert result["votes"] == 0
    rows = read_metrics(RunDir(folder).metrics)
    assert set().union(*rows) - {"step", "at"} <= set(METRICS)
    trained = [row["train/score"] for row in rows]
    assert sum(trained[-4:]) / 4 > sum(trained[:4]) / 4 + 1
    known = state(folder)
    for step, event in known.steps.items():  # what was trained on is what the function said
        said = [known.groups[g].ranked for g in event.group_ids]
        scores = [score for ranked in said if ranked is not None for score in ranked.scores or ()]
        assert len(scores) == 16
        assert abs(sum(scores) / 16 - trained[step - 1]) < 1e-4


def test_a_reward_model_that_cannot_be_the_critic_is_refused_before_anything_is_sampled(
    tmp_path: Path, tiny: str, tiny_encoder: str
) -> None:
    file, folder = write(tmp_path, tiny, model=tiny_encoder), tmp_path / "run"
    succeeded(rlhf("train-rm", file, "--run-dir", folder, "--json"))
    refused(rlhf("run-online", file, "--run-dir", folder), 3, "does not know the policy's tokens", "train_rm.model")
    assert not state(folder).groups
