"""A stage is done again exactly when something that its result follows from has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from recipe_files import write_recipe, write_rows

from rlhf_cli.recipe.fingerprint import Stage, stage_fingerprint
from rlhf_cli.recipe.load import load_recipe

STAGES: tuple[Stage, ...] = ("sft", "train-rm", "open-flow", "run-online", "eval")


def fingerprints(recipe: Path, *sets: str) -> dict[Stage, str]:
    loaded = load_recipe(recipe, sets)
    return {stage: stage_fingerprint(loaded, stage) for stage in STAGES}


def changed(before: dict[Stage, str], after: dict[Stage, str]) -> set[str]:
    return {stage for stage in STAGES if before[stage] != after[stage]}


SFT = {"sft", "train-rm", "run-online", "eval"}
ONLINE = {"run-online", "eval"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("name=other", set()),
        ("run_online.checkpoint_every=1", set()),
        ("budget.votes=9000", set()),
        ("logging.report_to=[tensorboard]", set()),
        ("compute.threads=1", set()),
        ("flow.poll_s=5", set()),
        ("flow.token_env=MY_TOKEN", set()),
        ("sft.batch_size=8", set()),  # its default, written out
        ("seed=8", SFT),
        ("model.last_layers=4", SFT),
        ("model.path=other-model", SFT),
        ("compute.precision=bf16", SFT),
        ("sft.epochs=2", SFT),
        ("train_rm.epochs=2", {"train-rm", "eval"}),
        ("flow.instruction=Shorter?", {"open-flow", *ONLINE}),
        ("flow.responses.max=9", {"open-flow", *ONLINE}),
        ("flow.crowd.agreement=0.9", ONLINE),
        ("run_online.segments={}", {"open-flow", *ONLINE}),
        ("data.max_prompt_tokens=64", ONLINE),
        ("run_online.steps=4", ONLINE),
        ("run_online.learner.beta=0.3", ONLINE),
        ("compute.generator_precision=bf16", ONLINE),
        ("eval.answers_per_prompt=3", {"eval"}),
        ("eval.gates.win_rate=0.6", {"eval"}),
    ],
)
def test_a_key_changes_the_stages_that_follow_from_it_and_no_other(
    tmp_path: Path, override: str, stages: set[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert changed(fingerprints(recipe), fingerprints(recipe, override)) == stages


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("sft.jsonl", SFT),
        ("votes.jsonl", {"train-rm", "eval"}),
        ("prompts.jsonl", ONLINE),
        ("heldout.jsonl", {"eval"}),
    ],
)
def test_a_file_counts_by_its_content(tmp_path: Path, file: str, stages: set[str]) -> None:
    recipe = write_recipe(tmp_path)
    before = fingerprints(recipe)
    path = tmp_path / file

    os.utime(path, (1, 1))
    assert changed(before, fingerprints(recipe)) == set()

    path.write_bytes(path.read_bytes() + b"\n")
    assert changed(before, fingerprints(recipe)) == stages


def test_the_same_recipe_elsewhere_has_the_same_fingerprints(tmp_path: Path) -> None:
    here, there = write_recipe(tmp_path / "here"), write_recipe(tmp_path / "there", name="named-otherwise.yaml")
    assert fingerprints(here) == fingerprints(there)


def test_a_model_folder_counts_by_its_content(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    before = fingerprints(recipe, f"model.path={tmp_path}/one")
    assert before == fingerprints(recipe, f"model.path={tmp_path}/two")

    (tmp_path / "two" / "config.json").write_text('{"layers": 2}')
    assert changed(before, fingerprints(recipe, f"model.path={tmp_path}/two")) == SFT


def test_with_reward_model_feedback_the_loop_follows_from_the_reward_model(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    by_model = "run_online.feedback=reward_model"
    before = fingerprints(recipe, by_model)
    write_rows(tmp_path / "votes.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    assert changed(before, fingerprints(recipe, by_model)) == {"train-rm", *ONLINE}
    assert "run-online" not in changed(before, fingerprints(recipe, by_model, "flow.ttl_s=90")) - {"train-rm", *ONLINE}


def test_with_hybrid_feedback_the_loop_follows_from_the_reward_model_and_from_people(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    hybrid = "run_online.feedback=hybrid"
    before = fingerprints(recipe, hybrid)
    assert changed(before, fingerprints(recipe, hybrid, "train_rm.epochs=3")) == {"train-rm", *ONLINE}
    assert changed(before, fingerprints(recipe, hybrid, "flow.ttl_s=90")) == {"open-flow", *ONLINE}
    assert changed(before, fingerprints(recipe, hybrid, "run_online.refresh={every_groups: 4}")) == ONLINE


JUDGE = "run_online.judge={url: 'http://127.0.0.1:1/v1', model: %s}"


@pytest.mark.parametrize(
    ("overrides", "other", "stages"),
    [
        (("run_online.feedback=judge", JUDGE % "a"), JUDGE % "b", ONLINE),
        (("run_online.feedback=judge", JUDGE % "a"), "run_online.judge.at_once=2", set()),
        (("run_online.feedback=judge", JUDGE % "a"), "run_online.judge.timeout_s=9", set()),
        (("run_online.feedback=judge", JUDGE % "a"), "flow.crowd.agreement=0.9", {"eval"}),
        (("eval.judge=judge", JUDGE % "a"), JUDGE % "b", {"eval"}),
        (("run_online.selection={by: uncertainty}",), "train_rm.epochs=3", {"train-rm", *ONLINE}),
        (("run_online.selection={by: diverse}",), "train_rm.epochs=3", {"train-rm", "eval"}),
    ],
)
def test_whoever_compares_counts_for_the_stages_that_ask_and_how_they_are_called_for_none(
    tmp_path: Path, overrides: tuple[str, ...], other: str, stages: set[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert changed(fingerprints(recipe, *overrides), fingerprints(recipe, *overrides, other)) == stages


def test_a_function_counts_by_its_content(tmp_path: Path) -> None:
    recipe, function = write_recipe(tmp_path), tmp_path / "taste.py"
    function.write_text("def score(groups): ...\n")
    section = ("run_online.feedback=function", f"run_online.function={{file: {function}}}")
    before = fingerprints(recipe, *section)
    assert changed(before, fingerprints(recipe, *section, "run_online.function.batch=2")) == set()
    assert changed(before, fingerprints(recipe, *section, "flow.ttl_s=90")) == {"open-flow", "eval"}
    function.write_text("def score(groups): return []\n")
    assert changed(before, fingerprints(recipe, *section)) == ONLINE
