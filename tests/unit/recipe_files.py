"""Small recipes on disk for the tests of the recipe language and of the command line."""

from __future__ import annotations

import json
from pathlib import Path

RECIPE = """\
name: small
seed: 7
model:
  path: smollm2-135m
  last_layers: 8
data:
  prompts: prompts.jsonl
  heldout_prompts: heldout.jsonl
sft:
  dataset: sft.jsonl
  learning_rate: 1e-5
train_rm:
  dataset: votes.jsonl
flow:
  service: embedded
  instruction: Which answer is kinder?
  responses: {min: 4, desired: 6, max: 8}
  ttl_s: 60
  crowd: {raters: 10}
run_online:
  steps: 3
  group_size: 4
  sampling: {temperature: [1.0, 0.7], max_new_tokens: 16}
  learner: {algorithm: dpo, beta: 0.2}
  kl: {soft_nats: 8, hard_nats: 20}
budget: {votes: 500, deadline: 2h}
eval:
  judge: crowd
  gates: {win_rate: 0.5}
compute: {precision: fp32}
"""

ROWS = {
    "prompts.jsonl": [
        {"prompt": "What is a river?", "id": "a", "split": "train"},
        {"prompt": "And a lake?", "id": "b"},
    ],
    "heldout.jsonl": [{"prompt": [{"role": "user", "content": "What is a hill?"}]}],
    "sft.jsonl": [{"prompt": "Hello", "completion": "Good day."}],
    "votes.jsonl": [
        {"prompt": "Hello", "completions": ["Hi.", "What?", "Go."], "wins": [[0, 3, 2], [1, 0, 1], [0, 0, 0]]}
    ],
}


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, text: str = RECIPE, name: str = "recipe.yaml") -> Path:
    """Write a recipe and the data that `RECIPE` names into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, rows in ROWS.items():
        write_rows(folder / file, list(rows))
    path = folder / name
    path.write_text(text)
    return path
