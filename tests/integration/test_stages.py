"""The five stages through the command line: what each leaves behind, and how each refuses what cannot work."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_world import (
    QUICK,
    STAGES,
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
from flow_world import until

from rlhf_cli.journal import journal
from rlhf_cli.journal.events import (
    CheckpointSaved,
    GroupRanked,
    GroupSampled,
    GroupSubmitted,
    ItemStopped,
    StageStarted,
    StepTrained,
)
from rlhf_cli.journal.metrics import METRICS, read_metrics
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.online.checkpoint import latest
from rlhf_cli.server.crowd import CrowdSettings
from rlhf_cli.server.embedded import EmbeddedFlow
from rlhf_cli.stages.votes_export import export


def test_the_stages_one_by_one_make_a_run_that_then_has_nothing_left_to_do(smoke: Smoke, tmp_path: Path) -> None:
    assert {name: result["skipped"] for name, result in smoke.results.items()} == dict.fromkeys(STAGES, False)
    folder = copy(smoke.folder, tmp_path)
    before = RunDir(folder).journal.read_bytes()
    again = succeeded(stage("run", folder))
    assert {name: result["skipped"] for name, result in again["stages"].items()} == dict.fromkeys(STAGES, True)
    assert RunDir(folder).journal.read_bytes() == before
    assert again["win_rate"] == smoke.results["eval"]["win_rate"]
    assert Path(again["report"]).is_file()


def test_every_trained_label_is_what_people_said(smoke: Smoke) -> None:
    assert len(state(smoke.folder).steps) == 8
    assert_every_label_has_its_votes(smoke.folder)


def test_a_run_leaves_what_its_folder_promises(smoke: Smoke) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    run = RunDir(smoke.folder)
    for path in (run.sft_model, run.online_model):
        AutoModelForCausalLM.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
    AutoModelForSequenceClassification.from_pretrained(run.train_rm_model)
    assert run.recipe.read_bytes() == (Path(__file__).parents[2] / "recipes" / "smoke.yaml").read_bytes()
    assert json.loads(run.environment.read_bytes())["seed"] == 7
    found = latest(run)
    assert found is not None
    assert found.step == 8
    assert not run.lock_file.read_bytes()
    leftovers = [p.name for p in run.path.rglob("*") if p.name.startswith(("tmp", "crash-"))]
    assert leftovers == []


def test_every_step_has_its_row_of_metrics(smoke: Smoke) -> None:
    rows = read_metrics(RunDir(smoke.folder).metrics)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert set(row) - {"step", "at"} <= set(METRICS)
        assert row["flow/votes_step"] >= 4 * 3
        assert row["staleness/max_steps"] <= 8
        assert 0 < row["train/loss"] < 2
    first = rows[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-3)  # the policy still is the reference
    assert first["kl/sequence_nats"] == pytest.approx(0, abs=1e-3)
    everywhere = set.intersection(*(set(row) for row in rows))
    assert {"train/accuracy", "train/grad_norm", "flow/votes_total", "time/step_s", "time/wait_s"} <= everywhere
    assert rows[-1]["flow/votes_total"] == state(smoke.folder).votes_total


def test_the_results_name_their_figures(smoke: Smoke) -> None:
    results = json.loads(RunDir(smoke.folder).eval_results.read_bytes())
    assert results["win_rate_low"] <= results["win_rate"] <= results["win_rate_high"]
    assert results["reward_gain"] == pytest.approx(results["reward_after"] - results["reward_before"])
    assert results["prompts"] == 32
    assert results["pairs"] == 32
    samples = [json.loads(line) for line in RunDir(smoke.folder).heldout_samples.read_text().splitlines()]
    assert len(samples) == 32
    assert all(len(row["before"]) == len(row["after"]) == 1 for row in samples)
    online = smoke.results["run-online"]
    assert online["steps"] == 8
    assert online["votes"] == state(smoke.folder).votes_total
    assert online["reward_last"] is not None
    assert online["kl_sequence_nats"] > 0


@pytest.mark.parametrize(("name", "first"), [("train-rm", "sft"), ("run-online", "sft"), ("eval", "run-online")])
def test_a_stage_that_comes_too_early_names_the_command_to_run(tmp_path: Path, name: str, first: str) -> None:
    folder = tmp_path / "run"
    refused(stage(name, folder), 3, f"rlhf {first} ", "smoke.yaml")
    assert count(StageStarted, events(folder)) == 0


def test_online_training_without_a_flow_names_the_command_to_run(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    refused(stage("run-online", folder, sets=("flow.instruction=Which?",)), 3, "rlhf open-flow ")
    assert not RunDir(folder).checkpoints.exists()


def test_a_start_over_that_cannot_work_leaves_the_finished_run_as_it_is(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    refused(stage("run-online", folder, "--fresh", sets=("flow.instruction=Which?",)), 3, "rlhf open-flow ")
    assert RunDir(folder).online_model.is_dir()
    assert "run-online" in state(folder).stages


def test_a_run_folder_in_use_is_left_alone(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    with RunDir(folder).lock():
        refused(stage("run-online", folder), 8, str(folder), "--run-dir")


def test_a_damaged_journal_is_refused(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    file = RunDir(folder).journal
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(stage("run", folder), 8, "journal.jsonl:")


def test_a_damaged_checkpoint_is_refused(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    weights = RunDir(folder).checkpoints / "step-000008" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    RunDir(folder).online_model.rename(folder / "elsewhere")
    refused(stage("run-online", folder, "--resume"), 8, "step-000008", "--fresh")


def test_a_prompt_that_is_too_long_ends_the_stage_before_anything_is_asked(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    refused(stage("run-online", folder, sets=("data.max_prompt_tokens=9",)), 3, "data.max_prompt_tokens allows 9")
    assert count(GroupSampled, events(folder)) == 0


def test_a_heldout_prompt_that_is_too_long_is_found_before_training(smoke: Smoke, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"id": "endless", "prompt": "why " * 2000}))
    folder = copy(smoke.prepared, tmp_path)
    refused(stage("run-online", folder, sets=(f"data.heldout_prompts={heldout}",)), 3, "'endless'")
    assert count(GroupSampled, events(folder)) == 0


class TestAnotherServer:
    """A flow service that is not the embedded one: reached by its address, with credentials from the environment."""

    @pytest.fixture
    def server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedFlow]:
        crowd = CrowdSettings(raters=16, taste="letters", latency_p50_s=0.02, latency_p95_s=0.1)
        with EmbeddedFlow(tmp_path / "elsewhere.sqlite", crowd, seed=1) as server:
            monkeypatch.setenv("RAPIDATA_CLIENT_ID", server.client_id)
            monkeypatch.setenv("RAPIDATA_CLIENT_SECRET", server.client_secret)
            yield server

    def sets(self, url: str) -> tuple[str, ...]:
        return (
            f"flow.service={url}",
            "flow.crowd=null",
            "flow.poll_s=0.05",
            "flow.outage_s=1",
            "eval=null",
            "run_online.steps=2",
        )

    def test_a_run_works_and_keeps_the_secrets_to_itself(
        self, server: EmbeddedFlow, smoke: Smoke, tmp_path: Path
    ) -> None:
        folder = copy(smoke.prepared, tmp_path)
        done = succeeded(stage("run", folder, sets=self.sets(server.url)))
        assert done["stages"]["open-flow"]["service"] == server.url
        assert done["stages"]["run-online"]["votes"] > 0
        for file in folder.rglob("*"):
            assert not file.is_file() or server.client_secret.encode() not in file.read_bytes()

    def test_a_refused_secret_is_said_to_be_refused(
        self, server: EmbeddedFlow, smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAPIDATA_CLIENT_SECRET", "not-the-secret")
        ended = stage("open-flow", copy(smoke.prepared, tmp_path), sets=self.sets(server.url))
        refused(ended, 4, "RAPIDATA_CLIENT_SECRET")
        assert "not-the-secret" not in ended.err

    def test_a_missing_secret_is_named(
        self, server: EmbeddedFlow, smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RAPIDATA_CLIENT_SECRET")
        refused(
            stage("open-flow", copy(smoke.prepared, tmp_path), sets=self.sets(server.url)), 4, "RAPIDATA_CLIENT_SECRET"
        )

    def test_one_that_cannot_be_reached_is_an_outside_failure(
        self, server: EmbeddedFlow, smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused(
            stage("open-flow", copy(smoke.prepared, tmp_path), sets=self.sets("http://127.0.0.1:9")), 75, "127.0.0.1:9"
        )

    def test_one_that_refuses_us_in_mid_run_leaves_a_checkpoint_to_resume_from(
        self, server: EmbeddedFlow, smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sets = (*self.sets(server.url), "run_online.steps=40", "run_online.checkpoint_every=100")
        folder = copy(smoke.prepared, tmp_path)
        succeeded(stage("open-flow", folder, sets=sets))

        def revoke_after_a_step() -> None:
            until(lambda: count(StepTrained, events(folder)), 60)
            server.store.tokens.revoke(server.client_id)

        owner = threading.Thread(target=revoke_after_a_step)
        owner.start()
        ended = stage("run-online", folder, sets=sets)
        owner.join()
        refused(ended, 4, "--resume", "votes are kept")
        found = latest(RunDir(folder))
        assert found is not None
        assert found.step == max(state(folder).steps)


def test_a_gate_that_is_not_met_is_exit_5_however_often_it_is_asked(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    for _ in range(2):
        ended = stage("eval", folder, sets=("eval.gates.win_rate=1.0", *QUICK[:1]))
        assert ended.code == 5
        assert ended.document["gates"]["win_rate"]["passed"] is False  # the results are there all the same
        assert "win_rate" in ended.err
        assert "Traceback" not in ended.err
    assert count(StageStarted, events(folder)) == count(StageStarted, events(smoke.folder)) + 1
    assert stage("run", folder, sets=("eval.gates.win_rate=1.0", *QUICK[:1])).code == 5


def test_another_policy_is_another_eval_that_asks_anew(smoke: Smoke, tmp_path: Path) -> None:
    """The same recipe over again: neither the old results nor the old votes are about the new policy."""
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(4)))
    online = ("run_online.steps=1", "run_online.learner.learning_rate=0.05")
    folder, sets = copy(smoke.prepared, tmp_path), (*QUICK, *online, f"data.heldout_prompts={heldout}")

    def asked() -> set[str]:
        groups = replay(journal.read(RunDir(folder).eval_results.with_name("journal.jsonl"))).groups.values()
        return {group.item_id for group in groups if group.item_id is not None}

    seen: list[set[str]] = []
    for repeated in ("run-online", "eval"):
        succeeded(stage(repeated, folder, "--fresh", sets=sets))
        assert succeeded(stage("eval", folder, sets=sets))["skipped"] is (repeated == "eval")
        seen.append(asked())
    succeeded(stage("run-online", folder, "--fresh", sets=sets))
    assert succeeded(stage("eval", folder, sets=sets))["skipped"] is False
    seen.append(asked())
    assert len(set.union(*seen)) == sum(map(len, seen))  # no item twice


def test_a_budget_ends_the_run_with_what_was_paid_for_and_a_larger_one_goes_on(smoke: Smoke, tmp_path: Path) -> None:
    folder, sets = copy(smoke.prepared, tmp_path), (*QUICK, "run_online.steps=3")
    ended = stage("run-online", folder, sets=(*sets, "budget.votes=70"))
    refused(ended, 6, "--resume", "votes are kept", "0 groups are still out")
    stopped = state(folder)
    assert 0 < stopped.votes_total <= 70
    assert not stopped.ready_groups
    assert stopped.stopped is not None
    assert stopped.stopped.exit_code == 6
    done = succeeded(stage("run-online", folder, "--resume", sets=sets))
    assert done["steps"] == 3
    assert done["votes"] == state(folder).votes_total > stopped.votes_total
    assert_every_label_has_its_votes(folder)


def test_a_request_to_stop_finishes_the_step_and_says_how_to_go_on(smoke: Smoke, tmp_path: Path) -> None:
    folder, sets = copy(smoke.prepared, tmp_path), (*QUICK, "run_online.steps=40", "run_online.checkpoint_every=100")
    process = Process("run-online", folder, sets=sets)
    process.send(signal.SIGTERM, lambda seen: count(StepTrained, seen) >= 2)
    ended = process.ended()
    assert ended.code == 143, ended.err
    assert f"--run-dir {folder} --resume" in ended.err
    assert "Traceback" not in ended.err
    known, found = state(folder), latest(RunDir(folder))
    assert found is not None
    assert found.step == max(known.steps) >= 2
    assert known.stopped is not None
    assert known.stopped.exit_code == 143
    saved = [event.step for event in events(folder) if isinstance(event, CheckpointSaved)]
    assert saved == [found.step]
    refused(stage("run-online", folder, sets=sets), 2, "--resume", "--fresh", f"{found.step} steps trained")


def test_starting_over_ends_what_people_still_vote_on(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    slow = (*QUICK, "run_online.steps=40", "flow.crowd.latency_s.p50=30", "flow.crowd.latency_s.p95=60")
    process = Process("run-online", folder, sets=slow)
    process.send(signal.SIGTERM, lambda seen: count(GroupSubmitted, seen) >= 3)
    assert process.ended().code == 143
    paid, groups = state(folder).votes_total, state(folder).open_groups
    waiting = {group.item_id for group in groups if group.item_id is not None}
    ended = stage("run-online", folder, "--fresh", sets=(*QUICK, "run_online.steps=1"))
    assert succeeded(ended)["steps"] == 1
    assert "items that people were still voting on" in ended.err
    stopped = {event.item_id for event in events(folder) if isinstance(event, ItemStopped)}
    assert waiting <= stopped
    assert len(stopped) <= len(groups)  # an item whose creation was not answered any more is found and ended too
    assert state(folder).attempt == 2
    assert state(folder).votes_total >= paid


def test_a_reward_model_can_stand_in_for_people(smoke: Smoke, tmp_path: Path) -> None:
    sets = ("run_online.feedback=reward_model", "flow=null", "run_online.steps=3", "eval.judge=reward_model")
    folder = copy(smoke.prepared, tmp_path)
    done = succeeded(stage("run", folder, sets=sets))
    assert done["stages"]["run-online"]["steps"] == 3
    assert done["judge"] == "reward_model"
    assert done["votes"] == 0  # nobody was asked, and nobody has to be paid
    known = state(folder)
    assert known.votes_total == 0
    for group in known.groups.values():
        assert group.ranked is not None
        assert group.ranked.source == "reward_model:train_rm"
        assert group.step is not None


def test_what_raters_mark_reaches_the_loss_over_a_death_and_a_resume(smoke: Smoke, tmp_path: Path) -> None:
    sets = ("run_online.segments.weight=3", "flow.crowd.marks=0.8", "run_online.steps=4", "eval=null")
    folder = copy(smoke.prepared, tmp_path)
    assert not succeeded(stage("open-flow", folder, sets=sets))["adopted"]  # a flow that asks for marks is another one
    process = Process("run-online", folder, sets=sets)
    process.send(signal.SIGKILL, lambda seen: count(GroupRanked, seen) >= 3)
    assert process.ended().code == -signal.SIGKILL
    assert succeeded(stage("run-online", folder, "--resume", sets=sets))["steps"] == 4
    trained = [group for group in state(folder).groups.values() if group.step is not None]
    for group in trained:
        assert group.ranked is not None
        for completion, start, end, _ in group.ranked.segments:
            assert 0 <= start < end <= len(group.sampled.completions[completion].text)
    assert any(group.ranked.segments for group in trained if group.ranked)
    shares = [row["train/marked_frac"] for row in read_metrics(RunDir(folder).metrics)]
    assert max(shares) > 0
    (exported, *_) = [row for row in export(folder, "matrices") if "segments" in row]
    marks = {(m["completion"], m["good"]) for m in exported["segments"]}
    assert len(marks) > 1


def test_adapters_can_be_trained_instead_of_weights(tmp_path: Path) -> None:
    sets = (*QUICK, "model.lora.rank=4", "train_rm=null", "sft.max_steps=4", "run_online.steps=2", "eval=null")
    folder = tmp_path / "run"
    done = succeeded(stage("run", folder, sets=sets))
    assert done["steps"] == 2
    model = RunDir(folder).online_model
    assert (model / "model.safetensors").is_file()
    assert not list(model.glob("adapter*"))
    assert_every_label_has_its_votes(folder)


def test_starting_over_keeps_the_old_run_beside_the_new_one(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    sets = ("run_online.feedback=reward_model", "run_online.steps=1")
    refused(stage("run-online", folder, "--resume", sets=sets), 2, "other inputs", "8 steps trained", "--fresh")
    paid = state(folder).votes_total
    for _ in range(2):
        assert succeeded(stage("run-online", folder, "--fresh", sets=sets))["steps"] == 1
    known = state(folder)
    assert known.attempt == 3
    assert len(known.steps) == 1
    assert known.votes_total == paid  # what was paid stays paid
    assert len(list(folder.glob("online.replaced-*"))) == 2
    assert [row["step"] for row in read_metrics(RunDir(folder).metrics)] == [1]
