"""From votes to a reward model to a policy: a run's own journal as data, and a pairwise model in place of people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_world import events, refused, rlhf, state, succeeded

from rlhf_cli.journal.events import CompletionRecord, GroupRanked, GroupSampled, RunStarted, StageStarted
from rlhf_cli.journal.journal import Journal, read
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.policy.scoring import PairwiseModel, RewardModel, open_reward_model
from rlhf_cli.types import Message

TEXTS = ("la la la", "zt", "xq a")
WINS = ((0.0, 3.0, 2.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
RANKED = 12


def recipe(folder: Path, **sections: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "loop", "seed": 3, "compute": {"threads": 1}, **sections}))
    return file


def voted_run(folder: Path) -> Path:
    """A run whose people like the first completion; the last group was ranked by a model, which thinks otherwise."""
    records = tuple(CompletionRecord(text=t, token_ids=(1,), logps="", ref_logps="", ended=True) for t in TEXTS)
    with Journal.open(RunDir(folder).create().journal) as journal:
        journal.append(RunStarted(run_id="r", name="people", seed=1, version="0"))
        journal.append(StageStarted(stage="run-online", fingerprint="f", attempt=1))
        for n in range(RANKED + 1):
            by_model = n == RANKED
            sampled = GroupSampled(
                group_id=f"g{n}",
                index=n,
                prompt_id=f"p{n}",
                messages=(("user", f"what is {n}?"),),
                prompt_ids=(1,),
                completions=records,
                policy_step=0,
            )
            journal.append(sampled)
            wins = tuple(zip(*WINS, strict=True)) if by_model else WINS
            source = "reward_model:train_rm" if by_model else f"item:{n}"
            journal.append(GroupRanked(group_id=f"g{n}", source=source, wins=wins, latency_s=1.0, complete=True))
    return folder


def test_the_votes_of_a_run_become_a_reward_model_that_likes_what_people_liked(
    tmp_path: Path, tiny_encoder: str
) -> None:
    votes = voted_run(tmp_path / "earlier")
    section = {"votes": str(votes), "heldout": 0.4, "max_steps": 30, "learning_rate": 3e-3, "max_length": 24}
    file = recipe(tmp_path, model={"path": tiny_encoder}, train_rm=section)
    result = succeeded(rlhf("train-rm", file, "--run-dir", tmp_path / "run", "--json"))

    assert result["groups"] + result["heldout_groups"] == RANKED
    assert 0 < result["heldout_groups"] < RANKED
    run = RunDir(tmp_path / "run")
    model = open_reward_model(str(run.train_rm_model))
    assert isinstance(model, RewardModel)
    asked = (Message("user", "what is 3?"),)
    rewards = model.score(asked, TEXTS)
    assert rewards[0] > rewards[2] > rewards[1]
    assert (model.probability(asked, TEXTS)[0, 1:] > 0.5).all()

    report = json.loads(run.train_rm_report.read_bytes())
    assert report["accuracy"]["value"] == 1
    assert [row["name"] for row in report["by_source"]] == ["people"]
    assert report["sizes"]["groups"] == result["heldout_groups"]
    assert report["longer_wins"]["tokens"]["pairs"] == report["longer_wins"]["characters"]["pairs"]
    assert report["sizes"]["truncated"] == 0


@pytest.mark.parametrize(("share", "said"), [(1e-9, "leaves no group to measure on"), (0.999999, "no group is left")])
def test_a_share_of_votes_that_leaves_nothing_is_refused_before_training(
    tmp_path: Path, tiny_encoder: str, share: float, said: str
) -> None:
    section = {"votes": str(voted_run(tmp_path / "earlier")), "heldout": share, "max_steps": 2}
    file = recipe(tmp_path, model={"path": tiny_encoder}, train_rm=section)
    refused(rlhf("train-rm", file, "--run-dir", tmp_path / "run"), 3, said)


def test_a_run_is_not_asked_to_learn_from_the_journal_that_it_is_writing(tmp_path: Path, tiny_encoder: str) -> None:
    votes = voted_run(tmp_path / "earlier")
    before = RunDir(votes).journal.read_bytes()
    file = recipe(tmp_path, model={"path": tiny_encoder}, train_rm={"votes": str(votes), "max_steps": 2})
    refused(rlhf("train-rm", file, "--run-dir", votes), 2, "this run itself", "--run-dir")
    assert RunDir(votes).journal.read_bytes() == before


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_pairwise_model_can_be_the_raters_and_the_judge(tmp_path: Path, tiny: str, tiny_encoder: str) -> None:
    voted = [{"prompt": f"what is {n}?", "completions": TEXTS, "wins": WINS} for n in range(8)]
    sampling = {"max_new_tokens": 6}
    file = recipe(
        tmp_path,
        model={"path": tiny},
        data={
            "prompts": write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}!"} for n in range(6)]),
            "heldout_prompts": write(tmp_path / "heldout.jsonl", [{"prompt": f"Why {n}?"} for n in range(3)]),
        },
        train_rm={
            "kind": "pairwise",
            "model": tiny_encoder,
            "dataset": write(tmp_path / "votes.jsonl", voted),
            "heldout": 0.4,
            "max_steps": 5,
            "learning_rate": 1e-3,
        },
        run_online={
            "feedback": "reward_model",
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 3,
            "sampling": sampling,
            "learner": {"algorithm": "dpo", "learning_rate": 1e-3},
        },
        eval={"judge": "reward_model"},
    )
    succeeded(rlhf("run", file, "--run-dir", tmp_path / "run", "--json"))

    run = RunDir(tmp_path / "run")
    model = open_reward_model(str(run.train_rm_model))
    assert isinstance(model, PairwiseModel)
    online = state(run.path)
    assert len(online.steps) == 2
    ranked = [g for g in online.groups.values() if g.ranked is not None]
    assert len(ranked) >= 4
    for group in ranked:
        assert group.ranked is not None
        asked = [Message(role, content) for role, content in group.sampled.messages]
        chances = model.probability(asked, [c.text for c in group.sampled.completions])
        np.fill_diagonal(chances, 0)
        assert group.ranked.matrix().wins == pytest.approx(chances, abs=1e-5)
        assert not group.ranked.by_people
    assert not events(run.path)[-1].type.startswith("run_stopped")
    results = json.loads(run.eval_results.read_bytes())
    assert results["judge"] == "reward_model"
    assert results["reward_source"] is None
    assert 0 <= results["win_rate"] <= 1
    judged = [entry.event for entry in read(run.eval_journal) if isinstance(entry.event, GroupRanked)]
    assert len(judged) + results["pairs_identical"] == results["pairs"]
