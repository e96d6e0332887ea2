"""Hybrid feedback with a real model and simulated people, from end to end and through kill -9."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest
from cli_world import QUICK, Process, Smoke, copy, count, events, stage, state, succeeded

from rlhf_cli.feedback.refresh import LiveModel
from rlhf_cli.journal.events import GroupChosen, GroupIntended, GroupRanked, RewardModelRefreshed, StepTrained
from rlhf_cli.journal.metrics import read_metrics
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.policy.heads import Heads
from rlhf_cli.policy.scoring import RewardModel, open_reward_model
from rlhf_cli.server.store import Store

SETS = (
    *QUICK,
    "run_online.feedback=hybrid",
    "run_online.selection={share: 0.5}",
    "run_online.refresh={every_groups: 3, heldout_share: 0.34}",
)


def check(folder: Path) -> None:
    """Every group has one label, by whom its choice says; each version on disk is the one that was published."""
    seen, known = events(folder), state(folder)
    chosen = {event.group_id: event for event in seen if isinstance(event, GroupChosen)}
    assert len(chosen) == count(GroupChosen, seen)
    ranked = [event for event in seen if isinstance(event, GroupRanked)]
    assert len({event.group_id for event in ranked}) == len(ranked)
    assert all(event.by_people == chosen[event.group_id].people for event in ranked)
    asked = [event.group_id for event in seen if isinstance(event, GroupIntended)]
    assert len(set(asked)) == len(asked)
    server = Store(RunDir(folder).flow_store)
    try:
        assert known.flow is not None
        _, items = server.items(known.flow.flow_id, 0, 10_000, newest_first=False)
    finally:
        server.close()
    assert {item.id for item in items} == {group.item_id for group in known.groups.values() if group.item_id}
    assert len(items) == len(asked)

    published = {1}
    sources = []
    for event in seen:
        if isinstance(event, RewardModelRefreshed) and event.published:
            assert event.version == max(published) + 1
            published.add(event.version)
            assert event.path is not None
            assert hashlib.sha256((folder / event.path).read_bytes()).hexdigest() == event.sha256
        elif isinstance(event, GroupRanked) and not event.by_people:
            sources.append(event)
            assert int(event.source.removeprefix("reward_model:v")) == max(published)
    assert sources


def test_hybrid_feedback_trains_on_both_and_the_model_keeps_up(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    done = succeeded(stage("run-online", folder, sets=SETS))
    assert done["steps"] == 8
    check(folder)
    known, run = state(folder), RunDir(folder)
    trained = [known.groups[g] for event in known.steps.values() for g in event.group_ids]
    assert {group.ranked.by_people for group in trained if group.ranked is not None} == {True, False}
    assert known.refreshed
    last = read_metrics(run.metrics)[-1]
    assert last["rm/version"] >= 1
    assert 0 < last["rm/agreement"] <= 1
    assert last["flow/votes_total"] > 0

    model = open_reward_model(str(run.train_rm_model))
    assert isinstance(model, RewardModel)
    live = LiveModel(model)
    for event in events(folder):
        if isinstance(event, RewardModelRefreshed) and event.path is not None:
            live.heads = Heads.from_bytes((folder / event.path).read_bytes())
        elif isinstance(event, GroupRanked) and not event.by_people:
            scored = live.score(known.groups[event.group_id].sampled.group())
            assert scored.scores is not None
            assert event.scores == pytest.approx(scored.scores.tolist(), abs=1e-4)

    kept = run.reward_model_versions / "model"
    assert kept.is_dir() == (known.refreshed[-1].version > 1)
    if kept.is_dir():
        whole, texts = open_reward_model(str(kept)), ["a an e", "zt", ""]
        assert isinstance(whole, RewardModel)
        group = next(iter(known.groups.values())).sampled.group()
        rewards = live.heads.rewards(model.features([(group.prompt.messages, texts)])[0]).mean(1)
        assert whole.score(group.prompt.messages, texts) == pytest.approx(rewards.tolist(), abs=1e-4)
        assert whole.about.temperature == model.about.temperature


@pytest.mark.parametrize(
    ("after", "number"),
    [
        (RewardModelRefreshed, 1),
        pytest.param(StepTrained, 5, marks=pytest.mark.slow),
        pytest.param(GroupChosen, 7, marks=pytest.mark.slow),
        pytest.param(GroupIntended, 4, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_after_a_kill_choices_and_versions_stay(smoke: Smoke, tmp_path: Path, after: type, number: int) -> None:
    folder = copy(smoke.prepared, tmp_path)
    process = Process("run-online", folder, sets=SETS)
    process.send(signal.SIGKILL, lambda seen: count(after, seen) >= number)
    assert process.ended().code == -signal.SIGKILL
    before = [event for event in events(folder) if isinstance(event, GroupChosen | RewardModelRefreshed)]
    done = succeeded(stage("run-online", folder, "--resume", sets=SETS))
    assert done["steps"] == 8
    after_resume = [event for event in events(folder) if isinstance(event, GroupChosen | RewardModelRefreshed)]
    assert after_resume[: len(before)] == before
    check(folder)
    losses = [json.loads(line) for line in RunDir(folder).metrics.read_text().splitlines()]
    assert {row["step"] for row in losses} == set(range(1, 9))
