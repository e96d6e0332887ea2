"""What people type around the votes: opening flows, looking ahead, and giving recorded votes again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cli_world import QUICK, Smoke, copy, count, events, stage, state, succeeded

from rlhf_cli.journal.events import FlowOpened
from rlhf_cli.journal.run_dir import RunDir

REPLAY = (*QUICK, "flow.service=replay", "flow.crowd.raters=24")


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
