"""Roles and degenerate groups in a whole run: what the journal, the figures and a restart make of them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
from contextlib import closing
from pathlib import Path

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

from rlhf_cli.journal.events import GroupIntended, GroupSampled, GroupSetAside, StepTrained
from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.policy.scoring import RewardModel, open_reward_model
from rlhf_cli.report.build import build_report
from rlhf_cli.server.store import Store
from rlhf_cli.stages.votes_export import export

ROLES = (
    "run_online.sampling.temperature=1.0",
    "run_online.sampling.roles=[{name: main, count: 1}, {name: best, count: 2, best_of: 4}, "
    "{name: old, count: 1, policy: previous}]",
    "run_online.steps=6",  # with a checkpoint after three
)
BY_MODEL = (*ROLES, "run_online.feedback=reward_model")


def weights(folder: Path) -> bytes:
    return (RunDir(folder).online_model / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(smoke: Smoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with roles that was never stopped; a reward model answers at once, so that nothing is left to chance."""
    folder = copy(smoke.prepared, tmp_path_factory.mktemp("roles"))
    succeeded(stage("run-online", folder, sets=BY_MODEL))
    return folder


def test_every_completion_of_a_run_has_its_role_and_the_chosen_ones_please_the_reward_model(whole: Path) -> None:
    groups = [event.group() for event in events(whole) if isinstance(event, GroupSampled)]
    assert len(groups) == 6 * 4
    assert {tuple(c.role for c in group.completions) for group in groups} == {("main", "best", "best", "old")}
    model = open_reward_model(str(RunDir(whole).train_rm_model))
    assert isinstance(model, RewardModel)
    scores = [model.score(group.prompt.messages, [c.text for c in group.completions]) for group in groups]
    main, best = [row[0] for row in scores], [n for row in scores for n in row[1:3]]
    assert statistics.fmean(best) > statistics.fmean(main) + statistics.stdev(main) / 2


def test_the_previous_policy_is_the_start_until_the_first_checkpoint_and_then_that(whole: Path) -> None:
    """Its log-probabilities are those of the weights that sampled, so at first they are those of the reference."""
    for event in events(whole):
        if isinstance(event, GroupSampled):
            old = event.group().completions[3]
            apart = max(abs(a - b) for a, b in zip(old.logps, old.ref_logps, strict=True))
            assert (apart > 1e-3) == (event.policy_step >= 3), event.policy_step


def test_every_role_has_its_figures_and_the_policy_its_own(whole: Path) -> None:
    rows = read_metrics(RunDir(whole).metrics)
    of_step: dict[int, list[GroupSampled]] = {}
    for event in events(whole):
        if isinstance(event, GroupSampled):
            of_step.setdefault(event.policy_step + 1, []).append(event)
    for row in rows:
        plain = {name for name in row if not name.startswith("role/")} - {"step", "at"}
        assert plain <= set(METRICS)
        for name, places in {"main": (0,), "best": (1, 2), "old": (3,)}.items():
            tokens = [len(e.completions[k].token_ids) for e in of_step[row["step"]] for k in places]
            assert row[f"role/{name}/length_tokens"] == pytest.approx(statistics.fmean(tokens))
            assert 0 <= row[f"role/{name}/win_frac"] <= 1
            assert f"role/{name}/reward" in row
        assert row["length/mean_tokens"] == row["role/main/length_tokens"]
        assert row["reward/mean"] == row["role/main/reward"]
        own = [e.group().completions[0] for e in of_step[row["step"]]]
        assert row["kl/sequence_nats"] == pytest.approx(statistics.fmean(c.kl_nats for c in own), abs=1e-4)
    assert statistics.fmean(row["role/best/win_frac"] for row in rows) > 0.5


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_with_roles_that_was_stopped_ends_with_the_same_weights(
    smoke: Smoke, whole: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    """Between two checkpoints, so that the previous policy is not the one that the checkpoint holds."""
    folder = tmp_path / "stopped"
    shutil.copytree(smoke.prepared, folder)
    process = Process("run-online", folder, sets=BY_MODEL)
    process.send(stop, lambda seen: count(StepTrained, seen) >= 4)
    assert process.ended().code == (-signal.SIGKILL if stop is signal.SIGKILL else 128 + signal.SIGTERM)
    left = RunDir(folder).latest.read_text()
    assert (left == "step-000003") == (stop is signal.SIGKILL)
    succeeded(stage("run-online", folder, "--resume", sets=BY_MODEL))
    assert weights(folder) == weights(whole)


def test_people_vote_on_groups_with_roles(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    succeeded(stage("run-online", folder, sets=(*QUICK, *ROLES, "run_online.steps=4")))
    rows = read_metrics(RunDir(folder).metrics)
    shares = [row[f"role/{name}/win_frac"] for row in rows for name in ("main", "best", "old")]
    assert len(shares) == 12
    assert all(0 <= share <= 1 for share in shares)

    roles = ["main", "best", "best", "old"]
    assert [row["roles"] for row in export(folder, "matrices")] == [roles] * 16
    assert {(row["i"], row["role_i"], row["j"], row["role_j"]) for row in export(folder, "pairs")} == {
        (i, roles[i], j, roles[j]) for i in range(4) for j in range(i + 1, 4)
    }
    page = build_report(folder).read_text()
    for name in ("main", "best", "old"):
        mean = statistics.fmean(row[f"role/{name}/win_frac"] for row in rows)
        assert re.search(rf"<tr><td>{name}</td>.*?<td>{mean:.3f}</td></tr>", page)
        assert f'<span class="chip">{name}</span>' in page


def test_what_is_said_twice_is_shown_once_and_its_copy_gets_no_vote(smoke: Smoke, tmp_path: Path) -> None:
    """Two cold completions of a group are one text; from sampling to the server, the journal and what trained."""
    folder = copy(smoke.prepared, tmp_path)
    roles = "run_online.sampling.roles=[{name: cold, count: 2, temperature: 1e-4}, {name: hot, count: 2}]"
    succeeded(stage("run-online", folder, sets=(*QUICK, *ROLES[:1], roles, "run_online.steps=3")))
    assert_every_label_has_its_votes(folder)
    known, copies = state(folder), 0
    with closing(Store(RunDir(folder).flow_store)) as store:
        for group in known.groups.values():
            texts = [completion.text for completion in group.sampled.completions]
            assert group.item_id is not None
            shown = [candidate.text for candidate in store.candidates(group.item_id)]
            assert sorted(shown) == sorted({text.strip() for text in texts if text.strip()})
            assert group.ranked is not None
            if texts[0] == texts[1]:
                copies += 1
                wins = group.ranked.matrix().wins
                assert not wins[1].any()
                assert not wins[:, 1].any()
                assert wins.sum() == len([v for v in store.votes(group.item_id) if v.counts and not v.late])
    assert copies > len(known.groups) / 2
    assert len(known.steps) == 3


def test_who_chooses_the_best_has_to_be_trained_first(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    shutil.rmtree(RunDir(folder).train_rm_model)
    refused(stage("run-online", folder, sets=ROLES), 3, "rlhf train-rm ")


# --- degenerate groups


CUT_OFF = ("run_online.cut_off=drop", "run_online.steps=2", "run_online.sampling.max_new_tokens=2")


def test_groups_that_are_cut_off_are_set_aside_before_anybody_is_asked(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    ended = stage("run-online", folder, sets=(*QUICK, *CUT_OFF))
    seen = events(folder)
    groups = {event.group_id: event.group() for event in seen if isinstance(event, GroupSampled)}
    aside = {event.group_id for event in seen if isinstance(event, GroupSetAside)}
    cut = {name for name, group in groups.items() if not any(c.ended for c in group.completions)}
    assert cut
    assert cut <= aside
    assert not cut & {event.group_id for event in seen if isinstance(event, GroupIntended)}
    if ended.code:
        assert ended.code == 7, ended.err
        assert "the token limit cut off all completions" in ended.err
    else:
        assert read_metrics(RunDir(folder).metrics)[-1]["sampling/degenerate_total"] == len(aside)


def test_a_group_left_open_by_a_kill_is_set_aside_by_the_next_process(smoke: Smoke, tmp_path: Path) -> None:
    """The journal ends between a group and the verdict that nobody could learn from it."""
    folder = copy(smoke.prepared, tmp_path)
    sets = (*QUICK, *CUT_OFF)
    stage("run-online", folder, sets=sets)
    journal = RunDir(folder).journal
    lines = journal.read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if json.loads(line)["event"]["type"] == "group_set_aside")
    journal.write_text("".join(lines[:first]))
    shutil.rmtree(RunDir(folder).checkpoints, ignore_errors=True)  # of steps that this journal knows nothing of
    (left,) = [group for group in state(folder).open_groups if not group.asks]

    ended = stage("run-online", folder, "--resume", sets=sets)
    assert ended.code in (0, 7), ended.err  # how far a toy that is cut off again and again gets is not the point

    known = state(folder).groups[left.sampled.group_id]
    assert known.set_aside is not None
    assert known.set_aside.startswith("degenerate: ")
    assert not known.asks
