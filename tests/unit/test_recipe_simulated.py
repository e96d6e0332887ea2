"""`--simulate`: the recipe that is rehearsed, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from cli_world import rlhf
from recipe_files import RECIPE, write_recipe

from rlhf_cli.cli.options import TASTES
from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.fingerprint import stage_fingerprint
from rlhf_cli.recipe.load import LoadedRecipe, load_recipe
from rlhf_cli.recipe.resolved import resolved_yaml
from rlhf_cli.recipe.schema import Crowd

PEOPLE = RECIPE.replace("embedded", "rapidata\n  token_env: FLOW_TOKEN").replace("  crowd: {raters: 10}\n", "")
JUDGE = "judge: {url: 'https://judge.example/v1', model: m, key_env: JUDGE_KEY, usd_per_1m_tokens: 1}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rehearsed(text: str, simulate: str = "own", *sets: str) -> LoadedRecipe:
    return load_recipe(write_recipe(Path(), text), sets, simulate)


def online(feedback: str, text: str = RECIPE) -> str:
    return text.replace("steps: 3", f"steps: 3\n  feedback: {feedback}")


def test_people_of_a_service_give_way_to_simulated_raters_and_everything_else_stays() -> None:
    real, played = load_recipe(write_recipe(Path(), PEOPLE.replace("crowd", "flow"))), rehearsed(PEOPLE)
    flow = played.recipe.flow
    assert flow is not None
    assert real.recipe.flow is not None
    assert (flow.service, flow.crowd, flow.token_env) == ("embedded", Crowd(), None)
    assert (flow.instruction, flow.responses, flow.ttl_s) == ("Which answer is kinder?", real.recipe.flow.responses, 60)
    assert played.recipe.run_online == real.recipe.run_online
    assert played.recipe.sft == real.recipe.sft
    assert played.recipe.eval is not None
    assert played.recipe.eval.judge == "crowd"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (online("reward_model"), "reward_model"),
        (online("function\n  function: {url: 'http://127.0.0.1:1/'}"), "function"),
        (online(f"judge\n  {JUDGE}"), "judge"),
    ],
    ids=["reward model", "function", "judge"],
)
def test_whoever_else_compares_gives_way_too(text: str, kind: str) -> None:
    for written in (text, text.replace("judge: crowd", "judge: reward_model")):
        recipe = rehearsed(written).recipe
        assert recipe.run_online is not None
        assert recipe.run_online.feedback == "votes"
        assert recipe.run_online.function is recipe.run_online.judge is None
        assert recipe.eval is not None
        assert recipe.eval.judge == "crowd"


def test_a_recipe_without_a_flow_gets_one() -> None:
    text = online("reward_model").replace(RECIPE[RECIPE.index("flow:") : RECIPE.index("run_online:")], "")
    recipe = rehearsed(text.replace("judge: crowd", "judge: reward_model"), "letters").recipe
    assert recipe.flow is not None
    assert recipe.flow.crowd == Crowd(taste="letters")


def test_the_taste_is_that_of_the_crowd_unless_another_is_named() -> None:
    text = RECIPE.replace("{raters: 10}", "{raters: 10, taste: brief}")
    for simulate, taste in (("own", "brief"), ("letters", "letters")):
        flow = rehearsed(text, simulate).recipe.flow
        assert flow is not None
        assert flow.crowd == Crowd(raters=10, taste=taste)  # type: ignore[arg-type]


def test_a_rehearsal_has_no_money_in_it() -> None:
    budget = rehearsed(RECIPE.replace("votes: 500", "votes: 500, usd: 5, usd_per_1k_votes: 4")).recipe.budget
    assert (budget.votes, budget.usd, budget.usd_per_1k_votes, budget.deadline) == (500, None, 0, 7200)


def test_a_penalty_on_scores_is_left_out_where_votes_take_their_place() -> None:
    recipe = rehearsed(online("reward_model\n  length: {penalty: 0.01, max_growth: 3}")).recipe
    assert recipe.run_online is not None
    assert recipe.run_online.length is not None
    assert (recipe.run_online.length.penalty, recipe.run_online.length.max_growth) == (0, 3)


def test_ppo_keeps_the_model_whose_scores_it_climbs() -> None:
    text = online("function\n  function: {url: 'http://127.0.0.1:1/'}").replace("dpo, beta: 0.2", "ppo, beta: 0.2")
    recipe = rehearsed(text).recipe
    assert recipe.run_online is not None
    assert (recipe.run_online.feedback, recipe.run_online.function) == ("reward_model", None)


def test_with_hybrid_feedback_it_is_the_people_who_are_simulated() -> None:
    recipe = rehearsed(online("hybrid", PEOPLE)).recipe
    assert recipe.run_online is not None
    assert recipe.run_online.feedback == "hybrid"
    assert recipe.flow is not None
    assert recipe.flow.service == "embedded"


BUNDLED = [p for p in sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")) if "run_online:" in p.read_text()]


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_every_bundled_recipe_of_the_loop_can_be_rehearsed(path: Path) -> None:
    recipe = load_recipe(path, (), "own").recipe
    assert recipe.run_online is not None
    assert recipe.flow is not None
    assert (recipe.flow.service, recipe.budget.usd) == ("embedded", None)
    assert recipe.run_online.feedback in ("votes", "hybrid") or recipe.run_online.learner.algorithm == "ppo"
    assert recipe.eval is None or recipe.eval.judge == "crowd"


def test_the_resolved_recipe_says_what_was_simulated_and_is_a_recipe_itself() -> None:
    played = rehearsed(online(f"judge\n  {JUDGE}"), "brief")
    text = resolved_yaml(played)
    for key in ("service: embedded", "taste: brief", "feedback: votes"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(key)]
        assert line.endswith("# --simulate")
    assert load_recipe(write_recipe(Path(), text, "again.yaml")).recipe == played.recipe
    assert played.text == (Path("recipe.yaml")).read_text()


def test_a_rehearsal_is_never_taken_for_the_real_run() -> None:
    assert rehearsed(PEOPLE).simulate == "own"
    real = load_recipe(write_recipe(Path(), PEOPLE.replace("crowd", "flow")))
    for stage in ("open-flow", "run-online", "eval"):
        assert stage_fingerprint(real, stage) != stage_fingerprint(rehearsed(PEOPLE), stage)  # type: ignore[arg-type]


def test_what_has_to_be_typed_again_says_so_too() -> None:
    assert rehearsed(RECIPE).command("run-online", "--resume") == "rlhf run-online recipe.yaml --simulate --resume"
    assert rehearsed(RECIPE, "brief").command("eval") == "rlhf eval recipe.yaml --simulate=brief"


def test_other_mistakes_are_found_all_the_same() -> None:
    with pytest.raises(RecipeError) as caught:
        rehearsed(PEOPLE.replace("beta: 0.2", "betta: 0.2").replace("ttl_s: 60", "ttl_s: 5"))
    short, unknown = caught.value.problems
    assert short.startswith("recipe.yaml:19:3: flow.ttl_s: must be at least 10")
    assert unknown.startswith("recipe.yaml:24:29: run_online.learner.betta: unknown key")


@pytest.mark.parametrize(
    ("words", "taste"),
    [
        (["--simulate"], "kind"),
        (["--simulate", "--json"], "kind"),
        (["--simulate", "brief"], "brief"),
        (["--simulate=letters"], "letters"),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["before the recipe", "after"])
def test_the_taste_may_be_left_out(words: list[str], taste: str, before: bool) -> None:
    write_recipe(Path(), PEOPLE)
    words = [*words, "recipe.yaml"] if before else ["recipe.yaml", *words]
    ended = rlhf("plan", *words, *([] if "--json" in words else ["--json"]))
    assert ended.code == 0, ended.err
    assert ended.document["run_dir"] == "runs/small-simulated"
    assert ended.document["flow"]["service"] == "embedded"
    speed = rlhf("plan", "recipe.yaml", "--simulate", taste, "--json").document
    assert speed == ended.document


def test_an_unknown_taste_is_refused() -> None:
    write_recipe(Path(), PEOPLE)
    ended = rlhf("plan", "recipe.yaml", "--simulate=sweet")
    assert ended.code == 2
    assert "sweet" in ended.err


def test_the_tastes_of_the_option_are_those_of_the_recipe() -> None:
    assert get_args(Crowd.model_fields["taste"].annotation) == TASTES
