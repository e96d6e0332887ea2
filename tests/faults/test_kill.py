"""kill -9 of a real run-online process, and what `--resume` makes of what it left."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_world import (
    QUICK,
    Process,
    Smoke,
    assert_every_label_has_its_votes,
    copy,
    count,
    events,
    refused,
    stage,
    state,
    succeeded,
)

from rlhf_cli.journal import journal
from rlhf_cli.journal.events import (
    CheckpointSaved,
    DatasetCreated,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSubmitted,
    RolledBack,
    StepTrained,
)
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.online.checkpoint import latest
from rlhf_cli.server.store import Store

SETS = (*QUICK, "run_online.steps=6")  # with a checkpoint after three steps
BY_MODEL = ("run_online.feedback=reward_model", "run_online.steps=6")


def killed(folder: Path, sets: tuple[str, ...], *, after: type, number: int, resume: bool = False) -> None:
    process = Process("run-online", folder, *(["--resume"] if resume else []), sets=sets)
    process.send(signal.SIGKILL, lambda seen: count(after, seen) >= number)
    assert process.ended().code == -signal.SIGKILL


def rows(folder: Path, step: int) -> list[dict[str, Any]]:
    """All metrics that were ever written of a step, by whichever process."""
    lines = RunDir(folder).metrics.read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"] == step]


def weights(folder: Path) -> bytes:
    return (RunDir(folder).online_model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("after", "number"),
    [
        (StepTrained, 5),  # two steps beyond the checkpoint
        (GroupSubmitted, 6),  # before the first step
        pytest.param(GroupSampled, 2, marks=pytest.mark.slow),
        pytest.param(GroupIntended, 3, marks=pytest.mark.slow),
        pytest.param(DatasetCreated, 9, marks=pytest.mark.slow),
        pytest.param(GroupRanked, 7, marks=pytest.mark.slow),
        pytest.param(StepTrained, 1, marks=pytest.mark.slow),
        pytest.param(CheckpointSaved, 1, marks=pytest.mark.slow),
        pytest.param(StepTrained, 6, marks=pytest.mark.slow),
        pytest.param(CheckpointSaved, 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_after_a_kill_the_run_goes_on_as_if_nothing_had_happened(
    smoke: Smoke, tmp_path: Path, after: type, number: int
) -> None:
    """The planned steps, no group trained twice, no item bought twice, no vote lost, no step taken differently."""
    folder = copy(smoke.prepared, tmp_path)
    killed(folder, SETS, after=after, number=number)
    left, checkpoint = state(folder), latest(RunDir(folder))
    assert left.stopped is None  # the journal tells a kill from an end in order
    refused(stage("run-online", folder, sets=SETS), 2, "--resume", "--fresh", f"{len(left.steps)} steps trained")

    done = succeeded(stage("run-online", folder, "--resume", sets=SETS))

    known = state(folder)
    assert done["steps"] == 6
    assert sorted(known.steps) == [1, 2, 3, 4, 5, 6]
    assert {step: event.group_ids for step, event in left.steps.items()}.items() <= {
        step: event.group_ids for step, event in known.steps.items()
    }.items()
    assert count(GroupSampled, events(folder)) == 6 * 4
    assert not known.open_groups
    assert not known.ready_groups
    assert_every_label_has_its_votes(folder)
    repeated = [step for step in sorted(left.steps) if step > (checkpoint.step if checkpoint else 0)]
    for step in repeated[:-1]:  # the last one may have died before its row was written
        first, again = rows(folder, step)
        for figure in ("train/loss", "train/grad_norm", "train/accuracy", "train/margin", "train/beta"):
            assert first[figure] == again[figure]  # to the last bit


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_never_stopped(
    smoke: Smoke, tmp_path: Path, kills: int
) -> None:
    """A reward model answers at once, so that nothing is left to chance."""
    whole, folder = copy(smoke.prepared, tmp_path), tmp_path / "killed"
    shutil.copytree(smoke.prepared, folder)
    succeeded(stage("run-online", whole, sets=BY_MODEL))
    for kill in range(kills):
        killed(folder, BY_MODEL, after=StepTrained, number=[5, 1, 2][kill], resume=kill > 0)
    succeeded(stage("run-online", folder, "--resume", sets=BY_MODEL))
    assert weights(folder) == weights(whole)
    for step in range(1, 7):
        assert rows(folder, step)[-1]["train/loss"] == rows(whole, step)[0]["train/loss"]


@pytest.mark.slow
def test_after_a_kill_in_eval_no_comparison_is_bought_twice(smoke: Smoke, tmp_path: Path) -> None:
    folder, sets = copy(smoke.folder, tmp_path), ("eval.answers_per_prompt=2",)
    compared = RunDir(folder).eval_results.with_name("journal.jsonl")
    before = {
        group.item_id for group in [*state(folder).groups.values(), *replay(journal.read(compared)).groups.values()]
    }
    compared.unlink()
    process = Process("eval", folder, sets=sets)
    process.send(signal.SIGKILL, lambda _: count(GroupRanked, [entry.event for entry in journal.read(compared)]) >= 3)
    process.ended()
    done = succeeded(stage("eval", folder, sets=sets))
    known = replay(journal.read(compared))
    assert done["pairs"] == 64
    assert done["votes"] == known.votes_total
    server = Store(RunDir(folder).flow_store)
    flow = state(folder).flow
    assert flow is not None
    _, items = server.items(flow.flow_id, 0, 10_000, newest_first=False)
    server.close()
    paid = {group.item_id for group in known.groups.values()}
    assert {item.id for item in items} - before == paid - {None}


def test_a_roll_back_that_a_kill_cut_short_is_finished_and_ends_what_people_still_vote_on(
    smoke: Smoke, tmp_path: Path
) -> None:
    """The event was on disk, and nothing else had been done about it."""
    folder, sets = copy(smoke.prepared, tmp_path), (*SETS, "run_online.max_in_flight=4")
    killed(folder, sets, after=GroupSubmitted, number=20)  # those that the policy after step 4 sampled
    with journal.Journal.open(RunDir(folder).journal) as book:
        path = "online/checkpoints/step-000003"
        book.append(RolledBack(guard="kl", value=9, limit=8, from_step=4, to_step=3, checkpoint=path, beta_scale=2))
    before = state(folder)
    void = [group for group in before.groups.values() if group.void]
    assert {group.sampled.policy_step for group in void} == {4}
    assert sorted(before.steps) == [1, 2, 3]

    succeeded(stage("run-online", folder, "--resume", sets=sets))

    known = state(folder)
    assert sorted(known.steps) == [1, 2, 3, 4, 5, 6]
    assert [known.steps[step].beta for step in (3, 4, 6)] == [0.1, 0.2, 0.2]
    server = Store(RunDir(folder).flow_store)
    try:
        assert known.flow is not None
        _, items = server.items(known.flow.flow_id, 0, 10_000, newest_first=False)
        assert all(item.ended_at is not None for item in items)
    finally:
        server.close()
    for group in void:
        again = known.groups[group.sampled.group_id]
        assert again.void
        assert again.step is None
        assert again.ranked or again.stopped or not again.item_id or again.ended
    assert_every_label_has_its_votes(folder)
