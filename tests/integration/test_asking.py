"""What people type around the votes: opening flows, looking ahead, and giving recorded votes again."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_world import Process, Smoke, copy, count, events, refused, rlhf, stage, state, succeeded

from rlhf_cli.journal.events import FlowOpened, StageStarted, StepTrained
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.server.store import Store


class TestOpenFlow:
    """Without a model: the stage needs none."""

    def open(self, folder: Path, *options: str, sets: tuple[str, ...] = ()) -> dict[str, object]:
        return succeeded(stage("open-flow", folder, *options, sets=sets))

    def test_twice_adopts_the_same_flow(self, tmp_path: Path) -> None:
        first, again = self.open(tmp_path), self.open(tmp_path)
        assert (first["adopted"], again["adopted"], again["skipped"]) == (False, True, True)
        assert first["flow_id"] == again["flow_id"]
        assert count(FlowOpened, events(tmp_path)) == 1
        assert (first["min_votes"], first["desired_votes"], first["max_votes"], first["ttl_s"]) == (3, 6, 8, 20)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (
                "flow.instruction=Which is longer?",
                "instruction changed from 'Which answer has more vowels?' to 'Which is",
            ),
            ("flow.responses.min=2", "responses.min changed from 3 to 2"),
            ("flow.ttl_s=30", "ttl_s changed from 20.0 to 30.0"),
            ("name=other", "name changed to 'other'"),
        ],
    )
    def test_another_question_is_another_flow_and_says_why(self, tmp_path: Path, change: str, why: str) -> None:
        first, other = self.open(tmp_path), self.open(tmp_path, sets=(change,))
        assert other["flow_id"] != first["flow_id"]
        assert why in str(other["why"])
        back = self.open(tmp_path)
        assert (back["flow_id"], back["adopted"]) == (first["flow_id"], True)

    def test_a_flow_that_is_gone_is_opened_again(self, tmp_path: Path) -> None:
        first = self.open(tmp_path)
        for file in RunDir(tmp_path).flow_store.parent.glob("server.sqlite*"):
            file.unlink()
        again = self.open(tmp_path)
        assert again["flow_id"] != first["flow_id"]
        assert again["why"] == f"flow {first['flow_id']} of this run is no longer at the service"
        assert state(tmp_path).flow.flow_id == again["flow_id"]  # type: ignore[union-attr]

    def test_a_run_keeps_its_flow_where_another_run_has_opened_a_newer_one(self, tmp_path: Path) -> None:
        first = self.open(tmp_path)
        with closing(Store(RunDir(tmp_path).flow_store)) as store:
            flow, _ = store.flow(str(first["flow_id"]))
            newer = store.create_flow(flow.name, flow.instruction, flow.responses)
        assert self.open(tmp_path, "--dry-run")["would"] == f"adopt flow {first['flow_id']}"
        assert self.open(tmp_path)["flow_id"] == first["flow_id"]
        with closing(Store(RunDir(tmp_path).flow_store)) as store:
            store.delete_flow(str(first["flow_id"]))
        again = self.open(tmp_path)
        assert (again["flow_id"], again["adopted"], again["skipped"]) == (newer, True, False)
        assert str(first["flow_id"]) in str(again["why"])

    def test_fresh_does_the_stage_again_and_new_makes_a_new_flow(self, tmp_path: Path) -> None:
        first, fresh = self.open(tmp_path), self.open(tmp_path, "--fresh")
        assert (fresh["flow_id"], fresh["skipped"], fresh["adopted"]) == (first["flow_id"], False, True)
        new = self.open(tmp_path, "--new")
        assert new["flow_id"] != first["flow_id"]
        assert "--new" in str(new["why"])
        assert self.open(tmp_path)["flow_id"] == new["flow_id"]

    def test_a_dry_run_says_what_it_would_do_and_makes_nothing(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        assert self.open(folder, "--dry-run")["would"] == "open a new flow"
        assert not folder.exists()
        first = self.open(folder)
        before = RunDir(folder).journal.read_bytes()
        assert self.open(folder, "--dry-run")["would"] == f"adopt flow {first['flow_id']}"
        assert self.open(folder, "--dry-run", "--new")["would"] == "open a new flow"
        assert "ttl_s changed" in str(self.open(folder, "--dry-run", sets=("flow.ttl_s=30",))["why"])
        assert RunDir(folder).journal.read_bytes() == before

    def test_a_dry_run_needs_no_credentials(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RAPIDATA_CLIENT_ID", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        sets = ("flow.service=https://votes.example.org", "flow.crowd=null", "eval=null")
        said = self.open(tmp_path, "--dry-run", sets=sets)
        assert "RAPIDATA_CLIENT_ID" in str(said["not_asked"])
        assert said["links"] == {
            "vote": "https://votes.example.org/vote",
            "owner": "https://votes.example.org/owner",
        }
        assert said["usd_per_item"] == {"desired": None, "max": None}


def weights(folder: Path) -> str:
    return hashlib.sha256((RunDir(folder).online_model / "model.safetensors").read_bytes()).hexdigest()


def steps(folder: Path) -> dict[int, tuple[tuple[int, ...], float | None]]:
    known = state(folder)
    index = {name: group.sampled.index for name, group in known.groups.items()}
    return {n: (tuple(index[name] for name in step.group_ids), step.beta) for n, step in known.steps.items()}


def test_a_replay_takes_the_same_steps_to_the_same_weights_and_asks_nobody(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    sets = ("flow.service=replay", f"flow.recording={smoke.folder}")
    again = succeeded(stage("run", folder, sets=sets))
    assert again["stages"]["run-online"]["votes"] == 0
    assert steps(folder) == steps(smoke.folder)
    for mine, theirs in zip(state(folder).groups.values(), state(smoke.folder).groups.values(), strict=False):
        assert mine.sampled.completions == theirs.sampled.completions
        if theirs.step is not None:
            assert mine.ranked is not None
            assert theirs.ranked is not None
            assert mine.ranked.wins == theirs.ranked.wins
            assert mine.ranked.source.endswith(theirs.ranked.source)
    assert weights(folder) == weights(smoke.folder)
    before = smoke.results["eval"]
    assert {k: again[k] for k in ("win_rate", "win_rate_low", "pairs")} == {
        k: before[k] for k in ("win_rate", "win_rate_low", "pairs")
    }
    assert not list(RunDir(folder).flow_store.parent.glob("bodies*"))


def test_a_replay_of_a_run_out_of_order_is_the_same_run(smoke: Smoke, tmp_path: Path) -> None:
    """Slow raters, small steps, groups that grow stale: steps of other sizes, on groups of different ages."""
    sets = (
        "run_online.steps=6",
        "run_online.min_ready=1",
        "run_online.max_in_flight=12",
        "run_online.staleness.max_steps=2",
        "flow.poll_s=0.05",
        "flow.crowd.raters=6",
        "flow.crowd.latency_s.p50=0.1",
        "flow.crowd.latency_s.p95=1",
    )
    recorded, folder = copy(smoke.prepared, tmp_path / "a"), copy(smoke.prepared, tmp_path / "b")
    succeeded(stage("open-flow", recorded, sets=sets))
    succeeded(stage("run-online", recorded, sets=sets))
    assert min(len(ids) for ids, _ in steps(recorded).values()) < 4
    sets = (*sets, "flow.service=replay", f"flow.recording={recorded}")
    succeeded(stage("open-flow", folder, sets=sets))
    succeeded(stage("run-online", folder, sets=sets))
    assert steps(folder) == steps(recorded)
    assert weights(folder) == weights(recorded)


def test_a_replay_goes_on_after_it_was_stopped(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    sets = ("flow.service=replay", f"flow.recording={smoke.folder}")
    succeeded(stage("open-flow", folder, sets=sets))
    process = Process("run-online", folder, sets=sets)
    process.send(signal.SIGTERM, lambda seen: count(StepTrained, seen) >= 2)
    ended = process.ended()
    assert ended.code == 143, ended.err
    typed = ended.err[ended.err.index("rlhf run-online") :].splitlines()[0]
    assert f"--set {sets[0]} --set {sets[1]}" in typed
    assert succeeded(rlhf(*shlex.split(typed)[1:], "--json"))["steps"] == 8
    assert steps(folder) == steps(smoke.folder)
    assert weights(folder) == weights(smoke.folder)


def test_another_run_gets_no_votes_from_the_recording(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    sets = ("flow.service=replay", f"flow.recording={smoke.folder}", "run_online.sampling.temperature=0.5")
    succeeded(stage("open-flow", folder, sets=sets))
    refused(stage("run-online", folder, sets=sets), 3, "step 1 of the recording", "another completion")
    known = state(folder)
    assert not known.steps
    for group in known.groups.values():
        assert group.ranked is None
        assert "not in the recording" in str(group.set_aside)


def test_a_recording_that_is_too_short_says_how_far_it_goes(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    sets = ("flow.service=replay", f"flow.recording={smoke.folder}", "run_online.steps=9")
    succeeded(stage("open-flow", folder, sets=sets))
    refused(stage("run-online", folder, sets=sets), 3, "--set run_online.steps=8")
    own = ("flow.service=replay", f"flow.recording={folder}")
    said = (folder / "journal.jsonl").read_bytes()
    for name in ("open-flow", "run-online"):
        refused(stage(name, folder, sets=own), 2, "its own recording")
    assert b"flow_opened" not in (folder / "journal.jsonl").read_bytes().removeprefix(said)


def test_raw_votes_are_those_behind_the_matrices(smoke: Smoke) -> None:
    for part in ("run-online", "eval"):
        matrices = rows("votes", "export", smoke.folder, "--stage", part)
        votes = rows("votes", "export", smoke.folder, "--as", "votes", "--stage", part)
        assert len(matrices) >= 30
        for row in matrices:
            mine = [vote for vote in votes if vote["group_id"] == row["group_id"] and vote["counts"]]
            assert len(mine) == row["votes"]
            for vote in mine:
                assert row["wins"][vote["left"]][vote["right"]] + row["wins"][vote["right"]][vote["left"]] > 0
            if row["trained_step"] is not None:
                assert row["set_aside"] is None
    trained = [row["trained_step"] for row in rows("votes", "export", smoke.folder)]
    assert [trained.count(step) for step in range(1, 9)] == [4] * 8


def test_an_embedded_store_that_is_gone_leaves_what_was_said_at_the_end(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    before = rows("votes", "export", folder, "--as", "votes")
    for file in RunDir(folder).flow_store.parent.glob("server.sqlite*"):
        file.unlink()
    after = rows("votes", "export", folder, "--as", "votes")
    assert [v for v in after if v["counts"]] == [v for v in before if v["counts"]]


def rows(*arguments: str | Path) -> list[dict[str, Any]]:
    ended = rlhf(*arguments)
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def test_a_stage_that_is_terminated_outside_the_loop_is_journalled_as_that(tmp_path: Path) -> None:
    process = Process("sft", tmp_path)
    process.send(signal.SIGTERM, lambda seen: count(StageStarted, seen) == 1)
    assert process.ended().code == 143
    stopped = state(tmp_path).stopped
    assert stopped is not None
    assert stopped.exit_code == 143
    assert stopped.reason.startswith("stopped by SIGTERM")


def test_a_finished_run_needs_no_flow_any_more(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.folder, tmp_path)
    for file in RunDir(folder).flow_store.parent.glob("server.sqlite*"):
        file.unlink()
    done = succeeded(stage("run", folder))
    assert all(result["skipped"] for result in done["stages"].values())
    assert not RunDir(folder).flow_store.exists()
