"""`rlhf score`: rewards for a file, the same ones that the model gives, and no row scored twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_world import refused, rlhf, succeeded

from rlhf_cli.policy.scoring import PairwiseModel, RewardModel, open_reward_model
from rlhf_cli.types import Message

WINS = [[0, 3, 2], [0, 0, 0], [1, 2, 0]]
ANSWERS = ["la la", "zt", "xq a"]


@pytest.fixture(scope="module", params=["bradley_terry", "ensemble", "pairwise"])
def run(request: pytest.FixtureRequest, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after train-rm."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = [{"prompt": f"what is {n}?", "completions": ANSWERS, "wins": WINS} for n in range(8)]
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = {"ensemble": {"ensemble": 3}, "pairwise": {"kind": "pairwise"}}.get(request.param, {})
    section = {"dataset": "votes.jsonl", "max_steps": 10, "learning_rate": 3e-3, "heldout": 0.4, **kind}
    recipe = {"name": "rm", "model": {"path": tiny_encoder}, "train_rm": section, "compute": {"threads": 1}}
    (folder / "rm.yaml").write_text(yaml.safe_dump(recipe))
    succeeded(rlhf("train-rm", folder / "rm.yaml", "--run-dir", folder / "run", "--json"))
    return folder / "run"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


GROUPS = [{"prompt": f"why {'so ' * (n % 7)}?", "completions": ANSWERS[: 2 + n % 2], "id": n} for n in range(20)]


def test_every_row_gets_what_the_model_says_of_it(run: Path, tmp_path: Path) -> None:
    said = succeeded(rlhf("score", run, write(tmp_path / "in.jsonl", GROUPS), "-o", tmp_path / "out.jsonl", "--json"))
    assert (said["rows"], said["kept"], said["scored"]) == (20, 0, 20)
    model = open_reward_model(str(run / "train_rm" / "model"))
    for row, found in zip(GROUPS, read(tmp_path / "out.jsonl"), strict=True):
        prompt = (Message("user", str(row["prompt"])),)
        assert {key: found[key] for key in row} == row
        assert found["model"] == model.about.version
        assert found["rewards"] == pytest.approx(model.score(prompt, row["completions"]), abs=1e-5)
        if len(row["completions"]) == 2:
            chance = float(model.probability(prompt, row["completions"])[0, 1])
            assert found["probability"] == pytest.approx(chance, abs=1e-5)
            margin = found["rewards"][0] - found["rewards"][1]
            scale = 2 if isinstance(model, PairwiseModel) else 1  # there, each reward is the log-odds against the other
            assert chance == pytest.approx(1 / (1 + math.exp(-margin / scale / model.about.temperature)), abs=1e-4)
        else:
            assert "probability" not in found
        assert ("spreads" in found) == (model.about.ensemble is not None)


def test_single_completions_and_texts_without_a_prompt(run: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", [{"prompt": "why?", "completion": "la"}, {"completion": "zt"}])
    ended = rlhf("score", run, file, "-o", tmp_path / "out.jsonl")
    model = open_reward_model(str(run / "train_rm" / "model"))
    if not isinstance(model, RewardModel):
        refused(ended, 3, "a pairwise model compares completions")
        return
    assert ended.code == 0
    first, second = read(tmp_path / "out.jsonl")
    assert first["reward"] == pytest.approx(model.score((Message("user", "why?"),), ["la"])[0], abs=1e-5)
    assert second["reward"] == pytest.approx(model.score((), ["zt"])[0], abs=1e-5)


def test_what_is_there_is_kept_and_only_the_rest_is_scored(run: Path, tmp_path: Path) -> None:
    file, output = write(tmp_path / "in.jsonl", GROUPS), tmp_path / "out.jsonl"
    succeeded(rlhf("score", run, file, "-o", output, "--json"))
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    marked = [line.replace(b'"id": ', b'"id":  ') for line in lines]  # the same content, but not our own spelling
    output.write_bytes(b"".join(marked[:7]) + marked[7][:25])  # as if killed in the middle of a line
    said = succeeded(rlhf("score", run, file, "-o", output, "--json"))
    assert (said["kept"], said["scored"]) == (7, 13)
    assert output.read_bytes().startswith(b"".join(marked[:7]))
    for again, line in zip(read(output), lines, strict=True):
        before = json.loads(line)  # the last digits depend on what shared a batch
        assert again.pop("rewards") == pytest.approx(before.pop("rewards"), abs=1e-5)
        assert again.keys() == before.keys()

    changed = [{**row, "prompt": "else?"} if row["id"] == 3 else row for row in GROUPS]
    said = succeeded(rlhf("score", run, write(file, changed), "-o", output, "--json"))
    assert (said["kept"], said["scored"]) == (19, 1)
    assert [row["id"] for row in read(output)] == list(range(20))
    assert read(output)[3]["prompt"] == "else?"


def test_rewards_of_other_weights_are_not_kept(run: Path, tmp_path: Path) -> None:
    file, output = write(tmp_path / "in.jsonl", GROUPS), tmp_path / "out.jsonl"
    succeeded(rlhf("score", run, file, "-o", output, "--json"))
    write(output, [{**row, "model": "other"} for row in read(output)])
    assert succeeded(rlhf("score", run, file, "-o", output, "--json"))["kept"] == 0


def test_a_killed_scoring_goes_on_and_ends_with_the_same_file(run: Path, tmp_path: Path) -> None:
    rows = [{**row, "id": n} for n, row in enumerate(GROUPS * 100)]
    file, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "rlhf_cli", "score", str(run), str(file), "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ))
    end = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole, _, _ = output.read_bytes().rpartition(b"\n")  # a kill in the middle of a write may tear the last line
    left = whole + b"\n"
    said = succeeded(rlhf("score", run, file, "-o", output, "--json"))
    assert said["kept"] == left.count(b"\n")
    assert output.read_bytes().startswith(left)
    assert [row["id"] for row in read(output)] == list(range(2000))


def test_without_an_output_the_rows_go_to_stdout(run: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", GROUPS[:3])
    command = [sys.executable, "-m", "rlhf_cli", "score", str(run), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [0, 1, 2]


def test_mistakes_name_the_line_or_the_way_out(tmp_path: Path, tiny: str) -> None:
    file = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"completions": []}])
    refused(rlhf("score", tiny, file), 3, "in.jsonl:2: 'completion' is missing", "in.jsonl:3: 'completions' has to be")
    good = write(tmp_path / "good.jsonl", [{"prompt": "a", "completion": "b"}])
    refused(rlhf("score", tiny, good), 2, "is no reward model")
    refused(rlhf("score", "minilm", good), 2, "is a backbone, no reward model")
    refused(rlhf("score", "./nowhere", good), 2, "no such folder")
    refused(rlhf("score", tiny, good, "-o", good), 2, "would be overwritten")
    refused(rlhf("score", tiny, good, "--json"), 2, "--output FILE")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text("")
    refused(rlhf("score", tmp_path / "run", good), 2, "a run without a reward model")
