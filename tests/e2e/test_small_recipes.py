"""Promises of recipes/small: the twin of each big recipe runs through the command line, and the true reward rises.

The true reward is the share of vowels, whoever stood in for it in the run: raters, a reward model, both, or a judge.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from cli_world import ROOT, state
from endpoint_world import served
from starlette.responses import JSONResponse, Response

from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.data import read_prompts
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.server.tastes import letters

pytestmark = pytest.mark.slow

SMALL = ROOT / "recipes" / "small"
TWINS = (
    "grpo-group-ranking",
    "hybrid-budget",
    "ppo-classic",
    "rapidata-online-dpo",
    "rlaif-judge",
    "rlhf-workflow",
)
ANSWERS = 16
"""Of each policy to each held-out prompt, where policies are compared."""
QUESTION = re.compile(r"Answer A: (.*)\n\nAnswer B: (.*)\n\nWhich answer", re.DOTALL)

Ran = Callable[[str], Path]


async def likes_vowels(body: Any) -> Response:
    """A stand-in for a language model, as an OpenAI-compatible endpoint answers."""
    found = QUESTION.search(body["messages"][0]["content"])
    assert found is not None
    first, second = (letters("", text) for text in found.groups())
    verdict = "tie" if first == second else "A" if first > second else "B"
    message = {"role": "assistant", "content": verdict}
    return JSONResponse({"choices": [{"message": message}], "usage": {"total_tokens": 200}})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The run folder of a twin after `rlhf run`; each is run once."""
    folders: dict[str, Path] = {}
    with served(likes_vowels) as judge:

        def run(name: str) -> Path:
            if name not in folders:
                folder = tmp_path_factory.mktemp(name) / "run"
                command = [sys.executable, "-m", "rlhf_cli", "run", str(SMALL / f"{name}-small.yaml")]
                ended = subprocess.run(
                    [*command, "--run-dir", str(folder), "--json"],
                    env={**os.environ, "JUDGE_URL": f"{judge.url}/v1"},
                    capture_output=True,
                    text=True,
                    timeout=900,
                )
                assert ended.returncode == 0, ended.stderr
                stages = json.loads(ended.stdout)["stages"]
                print(name, {stage: round(result["seconds"], 1) for stage, result in stages.items()})
                folders[name] = folder
            return folders[name]

        yield run


def true_rewards(folder: Path, who: str) -> list[float]:
    """Mean true reward of each held-out prompt's answers, `before` or `after`."""
    rows = [json.loads(line) for line in RunDir(folder).heldout_samples.read_text("utf-8").splitlines()]
    return [fmean(letters(row["prompt"], answer["text"]) for answer in row[who]) for row in rows]


def test_every_twin_is_tested() -> None:
    assert {path.stem for path in SMALL.glob("*.yaml")} == {f"{name}-small" for name in TWINS}


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs_through_and_the_true_reward_rises(ran: Ran, name: str) -> None:
    folder = ran(name)
    before, after = true_rewards(folder, "before"), true_rewards(folder, "after")
    gains = [b - a for a, b in zip(before, after, strict=True)]
    print(f"{name}: true reward {fmean(before):.2f} -> {fmean(after):.2f}")
    assert fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5
    assert RunDir(folder).report.exists()


def sampled(model: Path) -> list[list[float]]:
    """True rewards of answers of a saved model to the held-out prompts, a row a prompt."""
    from rlhf_cli.policy.policy import Policy

    recipe = load_recipe(SMALL / "rlhf-workflow-small.yaml").recipe
    assert recipe.data is not None
    assert recipe.data.heldout_prompts is not None
    assert recipe.run_online is not None
    prompts = read_prompts(recipe.data.heldout_prompts)
    groups = Policy(str(model), recipe, train=False).sample_groups(
        prompts, recipe.run_online.sampling.plain, ANSWERS, first_index=0, prefix="held", step=0, seed=11
    )
    return [[letters("", completion.text) for completion in group.completions] for group in groups]


def win_rate(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """How often an answer of `one` has the higher true reward, over all pairs of answers to the same prompt."""
    pairs = [(a, b) for mine, theirs in zip(one, other, strict=True) for a in mine for b in theirs]
    return fmean((a > b) + 0.5 * (a == b) for a, b in pairs)


def test_the_workflow_wins_more_often_against_the_supervised_model_after_each_of_three_iterations(ran: Ran) -> None:
    folder = ran("rlhf-workflow")
    steps = state(folder).steps
    assert sorted(steps) == [1, 2, 3]
    assert all(len(event.group_ids) == 64 for event in steps.values())
    run = RunDir(folder)
    start = sampled(run.sft_model)
    rates = [win_rate(sampled(run.checkpoints / f"step-{step:06d}"), start) for step in (1, 2, 3)]
    print("win rates against the supervised model:", [round(rate, 3) for rate in rates])
    assert 0.5 < rates[0] < rates[1] < rates[2]


def test_the_proxy_of_the_workflow_predicts_votes_that_it_was_not_trained_on(ran: Ran) -> None:
    report = json.loads(RunDir(ran("rlhf-workflow")).train_rm_report.read_bytes())
    assert report["accuracy"]["low"] > 0.5
