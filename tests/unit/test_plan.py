"""Before anything is spent: what a recipe will ask and cost, in figures worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import rlhf
from flow_world import World
from recipe_files import RECIPE, write_recipe
from test_cli import loaded_by

from rlhf_cli.ranking.intervals import detectable_win_rate, win_rate
from rlhf_cli.stages.asking import known_capabilities

RAPIDATA = (
    RECIPE.replace("embedded", "rapidata").replace("  crowd: {raters: 10}\n", "").replace("judge: crowd", "judge: flow")
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAPIDATA_CLIENT_ID", "RAPIDATA_CLIENT_SECRET", "RAPIDATA_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def plan(text: str = RECIPE, *options: str, command: str = "plan") -> dict[str, Any]:
    write_recipe(Path(), text)
    ended = rlhf(command, "recipe.yaml", "--json", *options)
    assert ended.code == 0, ended.err
    assert not Path("runs").exists()
    return ended.document


def test_votes_and_money_are_counted_before_they_are_spent() -> None:
    said = plan(RAPIDATA.replace("votes: 500", "usd: 50, usd_per_1k_votes: 5"))
    assert said["run_online"]["groups"] == 3 * 8
    # 24 groups and 1 held-out prompt with 2 answers, at 4 to 8 votes; the vendor knows no desired number
    assert said["total"]["votes"] == {"min": 26 * 4, "expected": 26 * 8, "max": 26 * 8}
    assert said["total"]["usd"] == pytest.approx({"min": 0.52, "expected": 1.04, "max": 1.04})
    assert said["flow"]["usd_per_item"] == pytest.approx({"desired": 0.04, "max": 0.04})
    assert said["data"] == {"prompts": 2, "heldout_prompts": 1, "sft": 1, "train_rm": 1}
    assert said["run_online"]["rounds_of_prompts"] == 12
    assert said["time"]["voting_s"] is None
    assert any("how fast people vote is not known" in note for note in said["notes"])


def test_a_price_that_nobody_named_is_not_zero() -> None:
    said = plan(RAPIDATA)
    assert said["total"]["usd"] == {"min": None, "expected": None, "max": None}
    assert any(note.startswith("unknown price") for note in said["notes"])
    assert "usd: unknown price" in rlhf("plan", "recipe.yaml").out


def test_simulated_raters_cost_nothing_and_their_pace_is_known() -> None:
    said = plan()
    assert said["total"]["votes"]["expected"] == 26 * 6
    assert said["total"]["usd"]["max"] == 0
    mean_s = 2 * math.exp((math.log(8 / 2) / 1.6449) ** 2 / 2)
    assert said["time"]["voting_s"] == pytest.approx(26 * 6 / (10 * 0.98 / mean_s))
    assert said["time"]["voting_longest_s"] == 60  # all 24 groups are out at once, for their time to live


def test_candidates_that_nobody_will_see_are_counted_too() -> None:
    roles = "[{name: main, count: 3}, {name: best, count: 1, best_of: 5}]"
    said = plan(RECIPE.replace("temperature: [1.0, 0.7], ", f"roles: {roles}, "))["run_online"]
    assert (said["completions"], said["sampled"]) == (24 * 4, 24 * (3 + 5))
    assert plan()["run_online"]["sampled"] == 24 * 4


def test_a_group_that_is_asked_about_again_may_cost_more() -> None:
    said = plan(RECIPE.replace("steps: 3", "steps: 3\n  incomplete: resubmit_once"))
    assert said["run_online"]["votes"] == {"min": 24 * 4, "expected": 24 * 6, "max": 24 * (3 + 8)}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("votes: 63", "less than the 64 that the groups of one step may use"),
        ("votes: 96", "ends (exit code 6) after about step 1 of 3"),
        ("votes: 150", "not for the most that run-online may use, 192"),
        ("usd: 0.4, usd_per_1k_votes: 5", None),  # simulated votes are free
    ],
)
def test_a_budget_that_will_not_do_is_said_before(budget: str, said: str | None) -> None:
    notes = [note for note in plan(RECIPE.replace("votes: 500", budget))["notes"] if note.startswith("budget")]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


HYBRID = RECIPE.replace("steps: 3", "steps: 3\n  feedback: hybrid")


def test_with_hybrid_feedback_people_see_their_share_of_the_groups() -> None:
    assert plan(HYBRID)["run_online"]["votes"]["max"] == 6 * 8  # a quarter of 24 groups where the recipe says nothing
    said = plan(
        HYBRID.replace("feedback: hybrid", "feedback: hybrid\n  selection: {share: 0.5}\n  refresh: {}\n  drift: {}")
    )
    assert said["run_online"]["votes"]["max"] == 12 * 8
    assert any("targeted rounds" in note for note in said["notes"])


@pytest.mark.parametrize(("votes", "said"), [(35, True), (36, False)])
def test_a_hybrid_run_does_not_end_with_its_budget(votes: int, said: bool) -> None:
    notes = plan(HYBRID.replace("votes: 500", f"votes: {votes}"))["notes"]
    assert any("the reward model answers alone" in note for note in notes) == said
    assert not any("exit code 6" in note for note in notes)


def test_what_becomes_of_each_number_at_the_service_is_said() -> None:
    rows = {row["key"]: row for row in plan(RAPIDATA)["flow"]["mapping"]}
    assert "not known here" in rows["responses.desired"]["note"]
    assert rows["responses.max"]["sent"] == "maxResponses 8"
    assert "mapping.responses.max: 8 -> maxResponses 8" in rlhf("plan", "recipe.yaml").out


@pytest.mark.parametrize("command", ["sft", "train-rm", "run-online", "eval", "run"])
def test_a_dry_run_of_a_stage_is_the_plan(command: str) -> None:
    assert plan(RECIPE, "--dry-run", command=command) == plan()


def test_a_plan_needs_neither_torch_nor_credentials_nor_the_network() -> None:
    write_recipe(Path(), RAPIDATA)
    assert loaded_by("plan", "recipe.yaml") <= {"numpy"}
    assert loaded_by("open-flow", "recipe.yaml", "--dry-run") <= {"numpy"}


def test_mistakes_end_a_plan_with_3() -> None:
    write_recipe(Path(), RECIPE.replace("ttl_s: 60", "ttl_s: 5"))
    ended = rlhf("plan", "recipe.yaml")
    assert (ended.code, ended.out) == (3, "")
    assert "recipe.yaml:18:3: flow.ttl_s" in ended.err


def test_stages_say_whether_there_is_something_to_do() -> None:
    assert set(plan()["stages"].values()) == {"to do"}


async def test_what_is_known_of_our_server_is_what_it_says(world: World) -> None:
    client = world.client()
    assert await client.capabilities() == known_capabilities("https://votes.example.org")
    await client.close()


@pytest.mark.parametrize(("prompts", "votes"), [(40, 1), (40, 10), (200, 4)])
def test_a_detectable_win_rate_is_found_four_times_out_of_five(prompts: int, votes: int) -> None:
    rate = detectable_win_rate(prompts, votes)
    assert rate is not None
    rng = np.random.default_rng(0)
    won = rng.binomial(votes, rate, size=(400, prompts))
    found = sum(win_rate([(float(w), float(votes - w)) for w in row]).low > 0.5 for row in won)
    assert 0.7 < found / 400 < 0.9


def test_too_few_prompts_detect_nothing() -> None:
    assert detectable_win_rate(1, 100) is None
    assert detectable_win_rate(4, 1) is None
    json.dumps(plan())  # None, never infinity
