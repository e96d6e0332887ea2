"""The recipe language: what loads, and what is said, and where, when something does not."""

# ruff: noqa: E501  (tables of mistakes, one a line)

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_files import RECIPE, write_recipe

from rlhf_cli.errors import RecipeError, UsageError
from rlhf_cli.recipe.keys import all_paths, section_at
from rlhf_cli.recipe.load import LoadedRecipe, load_recipe
from rlhf_cli.recipe.reference import meanings
from rlhf_cli.recipe.resolved import resolved_yaml
from rlhf_cli.recipe.schema import Eval, Recipe, Sft, TrainRm


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str = RECIPE, *sets: str) -> LoadedRecipe:
    write_recipe(Path.cwd(), text)
    return load_recipe(Path("recipe.yaml"), sets)


def problems(text: str = RECIPE, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *sets)
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1
    return RECIPE.replace(old, new)


def test_a_recipe_loads_with_its_values_and_the_defaults_of_what_it_leaves_out() -> None:
    recipe = load().recipe

    assert recipe.sft is not None
    assert recipe.sft.learning_rate == 1e-5
    assert recipe.sft.batch_size == 8
    assert recipe.budget.deadline_s == 7200
    assert recipe.run_online is not None
    assert recipe.run_online.learner.beta == 0.2
    assert recipe.run_online.sampling.temperature == [1.0, 0.7]
    assert recipe.run_online.max_in_flight == 48


def test_five_mistakes_are_reported_at_once_each_at_its_place() -> None:
    text = (
        RECIPE.replace("learning_rate: 1e-5", "learning_rte: 1e-5")
        .replace("group_size: 4", "group_size: 17")
        .replace("prompts: prompts.jsonl", "prompts: absent.jsonl")
        .replace("beta: 0.2", "betta: 0.2")
        .replace("judge: crowd", "judge: crowds")
    )

    assert problems(text) == [
        f"recipe.yaml:7:3: data.prompts: no such file: {Path.cwd() / 'absent.jsonl'}",
        "recipe.yaml:11:3: sft.learning_rte: unknown key; did you mean 'learning_rate'?",
        "recipe.yaml:22:3: run_online.group_size: must be at most 16, got 17",
        "recipe.yaml:24:29: run_online.learner.betta: unknown key; did you mean 'beta'?",
        "recipe.yaml:28:3: eval.judge: expected crowd or reward_model or judge or flow, got 'crowds'; did you mean 'crowd'?",
    ]


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("5e-7", 5e-7),
        (".5", 0.5),
        ("0.5", 0.5),
    ],
)
def test_numbers_are_numbers(yaml: str, value: float) -> None:
    recipe = load(changed("learning_rate: 1e-5", f"learning_rate: {yaml}")).recipe
    assert recipe.sft is not None
    assert recipe.sft.learning_rate == value


@pytest.mark.parametrize(("yaml", "value"), [("010", 10), ("0o10", 8), ("0x10", 16), ("+12", 12)])
def test_a_leading_zero_means_nothing(yaml: str, value: int) -> None:
    assert load(changed("seed: 7", f"seed: {yaml}")).recipe.seed == value


@pytest.mark.parametrize("yaml", ["on", "yes", "no", "off", "y", "12:30", "2026-11-20", "1_000"])
def test_words_times_and_dates_are_text(yaml: str) -> None:
    recipe = load(changed("Which answer is kinder?", yaml)).recipe
    assert recipe.flow is not None
    assert recipe.flow.instruction == yaml


@pytest.mark.parametrize(
    ("yaml", "got"),
    [("7", "7"), ("1e5", "100000.0"), ("true", "true"), ("~", "nothing"), ("null", "nothing"), ("", "nothing")],
)
def test_what_is_no_text_is_refused_where_text_belongs(yaml: str, got: str) -> None:
    (only,) = problems(changed("instruction: Which answer is kinder?", f"instruction: {yaml}"))
    assert only.startswith(f"recipe.yaml:16:3: flow.instruction: expected text, got {got}")


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("'7'", "expected a whole number, got '7'"),
        ("7.5", "expected a whole number, got 7.5"),
        ("true", "expected a whole number, got true"),
        (".nan", "expected a whole number, got nan"),
        ("[7]", "expected a whole number, got a list"),
        ("{a: 7}", "expected a whole number, got keys and values"),
        ("-1", "must be at least 0, got -1"),
        ("9" * 5000, "cannot be read as int"),
    ],
)
def test_what_is_no_whole_number_is_refused_in_words(yaml: str, said: str) -> None:
    assert problems(changed("seed: 7", f"seed: {yaml}")) == [
        f"recipe.yaml:2:1: seed: {said}".replace("2:1: seed: cannot", "2:7: seed: cannot")
    ]


def test_infinity_is_no_number_here() -> None:
    assert problems(changed("beta: 0.2", "beta: .inf")) == [
        "recipe.yaml:24:29: run_online.learner.beta: expected a finite number, got inf"
    ]


def test_a_key_written_twice_is_refused_with_both_places() -> None:
    assert problems(changed("ttl_s: 60", "ttl_s: 60\n  ttl_s: 90")) == [
        "recipe.yaml:19:3: flow.ttl_s: written twice; first at recipe.yaml:18:3"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe.yaml:1:1: the recipe is empty"),
        ("# nothing\n", "recipe.yaml:1:1: the recipe is empty"),
        ("- a\n", "recipe.yaml:1:1: expected sections such as `model:` and `data:`"),
        ("just words", "recipe.yaml:1:1: expected sections such as `model:` and `data:`"),
        ("name: a\n\tseed: 1\n", "recipe.yaml:2:1: not valid YAML: "),
        ("name: [a\nseed: 1\n", "recipe.yaml:2:5: not valid YAML: "),
        ("name: a\n---\nname: b\n", "recipe.yaml:2:1: not valid YAML: "),
        ("name: \x07\n", "recipe.yaml:1:7: not valid YAML: "),
        ("name: *who\n", "recipe.yaml:1:7: not valid YAML: "),
        ("a: " + "[" * 5000 + "\n", "recipe.yaml"),
        ("a: &a [*a]\n", "recipe.yaml:1:4: a.0.0: nested too deeply"),
    ],
)
def test_what_is_no_recipe_at_all_is_one_clear_problem(text: str, said: str) -> None:
    (only,) = problems(text)
    assert only.startswith(said)


def test_aliases_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (only,) = problems("\n".join(lines))
    assert "its aliases expand to too much" in only


def test_an_alias_stands_for_its_anchor() -> None:
    recipe = load(changed("raters: 10}", "raters: &n 10}") + "logging: {}\n").recipe
    assert load(changed("raters: 10}", "raters: &n 12}").replace("votes: 500", "votes: *n")).recipe.budget.votes == 12
    assert recipe.logging.report_to == []


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!mine", "!!timestamp", "!!binary"])
def test_tags_mean_nothing(tag: str) -> None:
    (only,) = problems(changed("seed: 7", f"seed: {tag} 7"))
    assert only.startswith("recipe.yaml:2:7: seed: the tag ")


def test_keys_are_text_whatever_they_look_like() -> None:
    found = problems(RECIPE + "on: 1\n1: 2\n? [a]\n: 3\n<<: {seed: 1}\n")
    assert [line.split(":", 3)[3].split(":")[0].strip() for line in found] == ["on", "1", "a key has to be text", "<<"]


def test_text_that_is_not_utf8_is_named_with_its_place() -> None:
    Path("recipe.yaml").write_bytes(b"name: a\nseed: \xe9\xff\n")
    with pytest.raises(RecipeError, match=r"^recipe.yaml:2:7: is not UTF-8 text$"):
        load_recipe(Path("recipe.yaml"))


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    path = write_recipe(Path.cwd())
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(path).recipe.name == "small"


def test_a_missing_recipe_and_a_folder_are_one_clear_problem() -> None:
    with pytest.raises(RecipeError, match=r"^nope.yaml: no such file$"):
        load_recipe(Path("nope.yaml"))
    with pytest.raises(RecipeError, match=r"^\.: is a folder"):
        load_recipe(Path())


# --- extends


def test_a_recipe_builds_on_another_and_paths_start_at_the_file_that_wrote_them() -> None:
    base = write_recipe(Path("base"), name="base.yaml")
    top = Path("top.yaml")
    top.write_text("extends: base/base.yaml\nname: top\nflow: {ttl_s: 90}\neval: null\nrun_online:\n  steps: 9\n")

    loaded = load_recipe(top)

    recipe = loaded.recipe
    assert (recipe.name, recipe.eval, recipe.seed) == ("top", None, 7)
    assert recipe.flow is not None
    assert recipe.run_online is not None
    assert (recipe.flow.ttl_s, recipe.flow.responses.min, recipe.run_online.steps) == (90, 4, 9)
    assert recipe.data.prompts == base.resolve().parent / "prompts.jsonl"
    assert loaded.origins["flow.ttl_s"] == "top.yaml:3:8"
    assert loaded.origins["flow.responses.min"] == "base/base.yaml:17:15"
    assert loaded.origins["sft.batch_size"] == "default"


def test_a_mistake_in_the_base_is_reported_in_the_base() -> None:
    write_recipe(Path("base"), RECIPE.replace("seed: 7", "sed: 7"), "base.yaml")
    Path("top.yaml").write_text("extends: base/base.yaml\nnam: top\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("top.yaml"))
    assert caught.value.problems == [
        "top.yaml:2:1: nam: unknown key; did you mean 'name'?",
        "base/base.yaml:2:1: sed: unknown key; did you mean 'seed'?",
    ]


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("recipe.yaml", "recipe.yaml:1:1: extends: goes round in a circle: recipe.yaml builds on this file"),
        ("absent.yaml", "recipe.yaml:1:1: extends: no such file: absent.yaml"),
        ("[a, b]", "recipe.yaml:1:1: extends: expected the path of the recipe to build on"),
        ("${env:RLHF_TEST_ABSENT}/a", "recipe.yaml:1:1: extends: the environment variable RLHF_TEST_ABSENT is not set"),
    ],
)
def test_what_cannot_be_built_on_is_refused(extends: str, said: str) -> None:
    assert problems(f"extends: {extends}\n{RECIPE}") == [said]


def test_a_long_circle_is_found() -> None:
    for one, other in ("ab", "bc", "ca"):
        Path(f"{one}.yaml").write_text(f"extends: {other}.yaml\n")
    with pytest.raises(RecipeError, match=r"^c.yaml:1:1: extends: goes round in a circle"):
        load_recipe(Path("a.yaml"))


# --- environment


def test_the_environment_fills_in_text_and_the_key_decides_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_DATA", str(Path.cwd()))
    monkeypatch.setenv("RLHF_TEST_N", "12")
    monkeypatch.setenv("RLHF_TEST_EMPTY", "")
    text = changed("prompts: prompts.jsonl", "prompts: ${env:RLHF_TEST_DATA}/prompts.jsonl")
    text = text.replace("seed: 7", "seed: ${env:RLHF_TEST_N}")
    text = text.replace("{raters: 10}", '{raters: "${env:RLHF_TEST_N}"}')
    text = text.replace("kinder?", "kinder, ${env:RLHF_TEST_N}$${x}${env:RLHF_TEST_EMPTY:-, or}${env:RLHF_TEST_NOT:-}?")

    loaded = load(text)

    assert loaded.recipe.seed == 12
    assert loaded.recipe.flow is not None
    assert loaded.recipe.flow.crowd is not None
    assert loaded.recipe.flow.crowd.raters == 12
    assert loaded.recipe.flow.instruction == "Which answer is kinder, 12${x}, or?"
    assert loaded.origins["seed"] == "env RLHF_TEST_N"


def test_a_missing_variable_is_a_problem_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_TEST_NOT", raising=False)
    assert problems(changed("seed: 7", "seed: ${env:RLHF_TEST_NOT}")) == [
        "recipe.yaml:2:1: seed: the environment variable RLHF_TEST_NOT is not set"
    ]


def test_other_dollar_braces_are_not_passed_on_in_silence() -> None:
    (only,) = problems(changed("kinder?", "kinder, ${HOME}?"))
    assert only.startswith("recipe.yaml:16:3: flow.instruction: expected ${env:NAME}")


# --- --set


def test_set_is_typed_as_in_the_file_and_makes_sections_on_its_way() -> None:
    loaded = load(
        RECIPE,
        "run_online.learner.learning_rate=1e-4",
        "flow.responses={min: 2, max: 12}",
        "model.lora.rank=4",
        "model.last_layers=",
    )

    recipe = loaded.recipe
    assert recipe.run_online is not None
    assert recipe.flow is not None
    assert recipe.model.lora is not None
    assert recipe.run_online.learner.learning_rate == 1e-4
    assert recipe.run_online.learner.beta == 0.2
    assert (recipe.flow.responses.min, recipe.flow.responses.desired, recipe.flow.responses.max) == (2, 12, 12)
    assert (recipe.model.lora.rank, recipe.model.last_layers) == (4, None)
    assert loaded.origins["run_online.learner.learning_rate"] == "--set"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run_online.learner.betta=1", "unknown key; did you mean 'beta'?"),
        ("learner.beta=1", "unknown key; did you mean 'run_online.learner'?"),
        ("seed.x=1", "unknown key"),
        ("seed=on", "seed: expected a whole number, got 'on'"),
        ("flow.responses={mn: 2}", "flow.responses.mn: unknown key; did you mean 'min'?"),
        ("seed=[1", "not valid YAML: "),
    ],
)
def test_a_mistake_in_set_is_reported_as_typed(override: str, said: str) -> None:
    (only,) = problems(RECIPE, override)
    assert only.startswith(f"--set {override}: {said}")


def test_set_needs_a_key_and_a_value() -> None:
    with pytest.raises(UsageError, match="key=value"):
        load(RECIPE, "seed")


def test_paths_in_set_start_at_the_working_folder() -> None:
    recipe = write_recipe(Path("deep"))
    Path("mine.jsonl").write_text('{"prompt": "x"}\n')
    assert load_recipe(recipe, ["data.prompts=mine.jsonl"]).recipe.data.prompts == Path.cwd() / "mine.jsonl"


# --- bounds, rules between keys, values that are not there yet


@pytest.mark.parametrize("size", [2, 16])
def test_groups_hold_two_to_sixteen_completions(size: int) -> None:
    recipe = load(changed("group_size: 4", f"group_size: {size}")).recipe
    assert recipe.run_online is not None
    assert recipe.run_online.group_size == size


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("group_size: 4", "group_size: 1", "22:3: run_online.group_size: must be at least 2, got 1"),
        ("group_size: 4", "group_size: 17", "22:3: run_online.group_size: must be at most 16, got 17"),
        ("ttl_s: 60", "ttl_s: 9", "18:3: flow.ttl_s: must be at least 10, got 9"),
        ("ttl_s: 60", "ttl_s: 3601", "18:3: flow.ttl_s: must be at most 3600, got 3601"),
        ("min: 4", "min: 7", "17:15: flow.responses.min: min (7) is more than desired (6)"),
        ("desired: 6", "desired: 9", "17:23: flow.responses.desired: desired (9) is more than max (8)"),
        ("{raters: 10}", "{latency_s: {p50: 9}}", "19:23: flow.crowd.latency_s.p50: p50 (9.0) is more than p95 (8.0)"),
        ("group_size: 4", "max_in_flight: 7", "22:3: run_online.max_in_flight: prompts_per_step (8) is more than max_in_flight (7)"),
        ("group_size: 4", "min_ready: 49", "22:3: run_online.min_ready: min_ready (49) is more than max_in_flight (48)"),
        ("soft_nats: 8", "soft_nats: 21", "25:8: run_online.kl.soft_nats: soft_nats (21.0) is more than hard_nats (20.0)"),
        ("[1.0, 0.7]", "[]", "23:14: run_online.sampling.temperature: expected a number above 0 and at most 10"),
        ("[1.0, 0.7]", "0", "23:14: run_online.sampling.temperature: expected a number above 0 and at most 10"),
        ("[1.0, 0.7]", "hot", "23:14: run_online.sampling.temperature: expected a number or a list, got 'hot'"),
        ("[1.0, 0.7]", "[1, hot]", "23:31: run_online.sampling.temperature.1: expected a number, got 'hot'"),
        ("[1.0, 0.7]", "[1, 1, 1, 1, 1]", "23:3: run_online.sampling: sampling.temperature has 5 entries for a group_size of 4"),
        ("deadline: 2h", "deadline: soon", "26:22: budget.deadline: expected a duration such as 90s, 30m or 2h, got 'soon'"),
        ("deadline: 2h", "usd: 5", "26:22: budget.usd: usd needs usd_per_1k_votes"),
        ("judge: crowd", "judge: judge", "28:3: eval.judge: needs a `judge` section in `run_online`"),
        ("steps: 3", "steps: 3\n  judge: {url: http://127.0.0.1:1/v1, model: m}", "22:3: run_online.judge: nobody asks it"),
        ("steps: 3", "steps: 3\n  feedback: judge", "22:3: run_online.feedback: judge feedback needs the section `judge`"),
        ("steps: 3", "steps: 3\n  feedback: judge\n  judge: {url: https://a.example/v1, model: m}", "23:11: run_online.judge.url: missing key 'key_env'"),
        ("steps: 3", "steps: 3\n  feedback: judge\n  judge: {url: http://a.example/v1, model: m, key_env: K}", "23:11: run_online.judge.url: a secret would be readable"),
        ("steps: 3", "steps: 3\n  feedback: function\n  function: {url: 'http://a.example:99999'}", "23:14: run_online.function.url: is no address"),
        ("steps: 3", "steps: 3\n  feedback: judge\n  judge: {url: 'http://:80/v1', model: m}", "23:11: run_online.judge.url: is no address"),
        ("steps: 3", "steps: 3\n  feedback: function\n  function: {url: http://a.example/v1, token_env: K}", "23:14: run_online.function.url: a secret would be readable"),
        ("last_layers: 8", "lora: {}\n  last_layers: 8", "6:3: model.last_layers: last_layers and lora exclude each other"),
        ("path: smollm2-135m", "from_scratch: {hidden: 10}", "4:18: model.from_scratch.hidden: hidden (10) is not a multiple of heads (4)"),
        ("path: smollm2-135m", "path: ./absent", "4:3: model.path: no such folder: "),
        ("  path: smollm2-135m\n", "", "3:1: model: missing key 'path'"),
        ("sft:\n  dataset: sft.jsonl\n", "sft:\n", "9:1: sft.dataset: missing key"),
        ("name: small\n", "", "1:1: name: missing key"),
        ("train_rm:\n  dataset: votes.jsonl\n", "train_rm:\n", "12:1: train_rm: nothing is written below it"),
        ("service: embedded", "service: embeded", "15:3: flow.service: expected embedded, rapidata, replay or an address"),
        ("service: embedded", "service: replay", "15:3: flow.service: replay needs `recording`"),
        (
            "service: embedded",
            "service: embedded\n  recording: .",
            "16:3: flow.recording: is no run folder, it has no journal.jsonl",
        ),
        ("service: embedded", "service: https://me:pw@host", "15:3: flow.service: an address here holds no user name"),
        ("service: embedded", "service: rapidata", "19:3: flow.crowd: simulated raters vote only on the embedded service"),
        ("  crowd: {raters: 10}\n", "", "15:3: flow.service: the embedded service needs simulated raters"),
        ("  heldout_prompts: heldout.jsonl\n", "", "26:1: eval: needs data.heldout_prompts"),
        ("algorithm: dpo", "algorithm: grpo, loss: dapo, ratio: sequence", "24:42: run_online.learner.ratio: dapo weighs tokens, so a ratio of whole completions needs loss grpo"),
        ("algorithm: dpo", "algorithm: rloo, loss: ipo", "24:30: run_online.learner.loss: rloo has grpo, dr_grpo, dapo, bnpo, cispo, not ipo"),
        ("hard_nats: 20}", "hard_nats: 20, on_hard: rollback}\n  keep_checkpoints: 1", "26:3: run_online.keep_checkpoints: a roll-back needs the checkpoint before the latest"),
        ("dataset: votes.jsonl", "dataset: votes.jsonl\n  kind: pairwise\n  ensemble: 3", "15:3: train_rm.ensemble: an ensemble is of heads that score one completion"),
        ("dataset: votes.jsonl", "dataset: votes.jsonl\n  stop_early: {every: 5}", "14:3: train_rm.stop_early: stop_early needs `heldout`"),
        ("dataset: votes.jsonl", "votes: .", "13:3: train_rm.votes: is no run folder, it has no journal.jsonl"),
        ("dataset: votes.jsonl", "dataset: votes.jsonl\n  model: ./nowhere", "14:3: train_rm.model: no such folder"),
        ("{precision: fp32}", "{processes: 2}", "30:11: compute.processes: more than one process is not there yet"),
        ("{precision: fp32}", "{machines: 2}", "30:11: compute.machines: more than one machine is not there yet"),
        ("{precision: fp32}", "{strategy: fsdp2}", "30:11: compute.strategy: the `fsdp2` strategy is not there yet"),
        ("{precision: fp32}", "{generator: vllm}", "30:11: compute.generator: the `vllm` generator is not there yet"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_honoured_is_refused_at_its_place(old: str, new: str, said: str) -> None:
    (only,) = problems(changed(old, new))
    assert only.startswith(f"recipe.yaml:{said}")


def test_stopping_early_is_refused_where_the_service_shows_no_votes_while_they_come_in() -> None:
    only_people = changed("service: embedded", "service: rapidata\n  stop_when_decided: 0.9")
    only_people = only_people.replace("  crowd: {raters: 10}\n", "").replace("judge: crowd", "judge: flow")
    (only,) = problems(only_people)
    assert only.startswith("recipe.yaml:16:3: flow.stop_when_decided: needs votes while they come in, rapidata shows")


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (("flow",), ["run_online.feedback: votes come from people", "eval.judge: the crowd judges only"]),
        (("train_rm", "feedback: reward_model"), ["run_online.feedback: reward_model feedback needs a `train_rm` section"]),
        (("train_rm", "judge: reward_model"), ["eval.judge: a reward_model judge needs a `train_rm` section"]),
        (("flow", "judge: flow"), ["run_online.feedback: votes", "eval.judge: raters judge through the flow"]),
        (("run_online",), ["eval: needs a `run_online` section"]),
    ],
)  # fmt: skip
def test_sections_that_need_each_other_say_so(drop: tuple[str, ...], said: list[str]) -> None:
    section, *values = drop
    sets = [f"{'eval' if v.startswith('judge') else 'run_online'}.{v.replace(': ', '=')}" for v in values]
    found = problems(RECIPE, f"{section}=null", *sets)
    assert len(found) == len(said)
    for line, part in zip(found, said, strict=True):
        assert part in line


def test_a_mistake_elsewhere_hides_no_rule() -> None:
    text = RECIPE.replace("hard_nats: 20", "hard_nats: 3").replace("dataset: sft.jsonl", "dataset: 3")
    text = text.replace("  heldout_prompts: heldout.jsonl\n", "").replace("seed: 7", "seed: on")
    assert [re.split(r":\d+: ", line)[1].split(":")[0] for line in problems(text)] == [
        "seed",
        "sft.dataset",
        "run_online.kl.soft_nats",
        "eval",
    ]


@pytest.mark.parametrize("key", ["token_env", "token", "client_secret_env", "password"])
def test_a_secret_in_a_recipe_is_refused_and_never_shown(key: str) -> None:
    secret = "hf_AbCdEf1234567890abcdefXYZ"
    found = problems(changed("ttl_s: 60", f"ttl_s: 60\n  {key}: {secret}"))
    assert f"recipe.yaml:19:3: flow.{key}: looks like a secret; name an environment variable" in found[0]
    assert secret not in "\n".join(found)


def test_the_name_of_an_environment_variable_is_no_secret() -> None:
    recipe = load(changed("ttl_s: 60", "ttl_s: 60\n  client_secret_env: RAPIDATA_CLIENT_SECRET")).recipe
    assert recipe.flow is not None
    assert recipe.flow.client_secret_env == "RAPIDATA_CLIENT_SECRET"


# --- model paths


def test_a_model_path_is_a_folder_only_where_there_is_one() -> None:
    assert load().recipe.model.path == "smollm2-135m"
    Path("mine").mkdir()
    assert load(changed("path: smollm2-135m", "path: mine")).recipe.model.path == str(Path.cwd() / "mine")
    assert load(changed("path: smollm2-135m", "path: ./mine")).recipe.model.path == str(Path.cwd() / "mine")
    assert load(changed("path: smollm2-135m", "path: org/model")).recipe.model.path == "org/model"


# --- every key, every origin


def test_a_section_with_only_its_required_keys_is_a_setting() -> None:
    recipe = load(
        "name: a\nmodel: {path: m}\ndata: {prompts: prompts.jsonl, heldout_prompts: heldout.jsonl}\n"
        "sft: {dataset: sft.jsonl}\ntrain_rm: {dataset: votes.jsonl}\n"
        "flow: {service: embedded, instruction: Better, crowd: {}}\nrun_online: {steps: 1}\neval: {judge: flow}\n"
    ).recipe
    assert recipe.run_online is not None
    assert recipe.run_online.learner.algorithm == "dpo"
    assert recipe.eval == Eval(judge="flow")


def test_every_value_has_an_origin() -> None:
    leaves = [path for path in all_paths() if section_at(path) is None]
    origins = load(RECIPE, "model.lora=null").origins
    left_out = {"model.lora", "model.from_scratch", "train_rm.stop_early", "sft.stop_early"}
    left_out |= {f"run_online.{key}" for key in ("function", "judge", "selection", "refresh", "drift", "length")}
    left_out |= {"run_online.segments", "run_online.sampling.roles"}
    whole = {"sft.dataset", "train_rm.dataset"}  # sources here; a list of parts has one origin as well
    above = left_out | whole
    written = {
        ".".join(path) for path in leaves if not any(".".join(path[:n]) in above for n in range(1, len(path)))
    } | whole
    assert written <= set(origins)
    assert origins["model.lora"] == "--set"
    assert set(origins) - written == left_out


def test_the_resolved_recipe_loads_to_the_same_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_NAME", "null")
    nasty = 'Which? # no comment: "${env:RLHF_TEST_NAME}" $${x} \\u2028 é 😀 on'
    text = changed("instruction: Which answer is kinder?", f"instruction: '{nasty}'").replace("seed: 7", "seed: 4")
    text = text.replace("name: small", "name: '1e5'")
    loaded = load(text, "run_online.learner.learning_rate=3.3e-7")
    again = Path("elsewhere") / "resolved.yaml"
    again.parent.mkdir()
    again.write_text(resolved_yaml(loaded), encoding="utf-8")
    assert load_recipe(again).recipe == loaded.recipe


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable() or "\u2028" in text))
def test_any_text_survives_the_resolved_recipe(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    loaded = load_recipe(write_recipe(folder))
    recipe = loaded.recipe
    assert recipe.flow is not None
    changed_flow = recipe.flow.model_copy(update={"instruction": text})
    other = LoadedRecipe(recipe.model_copy(update={"flow": changed_flow}), loaded.path, "", loaded.origins, {})
    again = folder / "again.yaml"
    again.write_text(resolved_yaml(other), encoding="utf-8")
    reloaded = load_recipe(again).recipe
    assert reloaded.flow is not None
    assert reloaded.flow.instruction == text


_WRITTEN_KEYS = [
    (number, match.start() + 1, match[0])
    for number, line in enumerate(RECIPE.splitlines(), 1)
    for match in re.finditer(r"[a-z_0-9]+(?=: |:$)", line)
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(_WRITTEN_KEYS), st.data())
def test_any_misspelt_key_is_reported_where_it_stands(
    tmp_path_factory: pytest.TempPathFactory, key: tuple[int, int, str], data: st.DataObject
) -> None:
    line, column, name = key
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("qxzj"))
    wrong = name[:at] + letter + name[at:]
    lines = RECIPE.splitlines()
    lines[line - 1] = lines[line - 1][: column - 1] + wrong + lines[line - 1][column - 1 + len(name) :]
    path = write_recipe(tmp_path_factory.mktemp("misspelt"), "\n".join(lines))

    with pytest.raises(RecipeError) as caught:
        load_recipe(path)

    reported = [p for p in caught.value.problems if p.startswith(f"{path}:{line}:{column}: ") and "unknown key" in p]
    assert len(reported) == 1
    assert f"{wrong}: unknown key" in reported[0]
    assert "did you mean" in reported[0] or len(name) < 4


def test_the_schema_documents_every_key() -> None:
    for path in all_paths():
        section = section_at(path[:-1])
        assert section is not None
        assert path[-1] in meanings(section) or (len(path) == 1 and section is Recipe), path


def test_a_killed_supervised_stage_has_checkpoints_to_go_on_from_unless_they_are_refused() -> None:
    plain = {"dataset": "rows.jsonl"}
    assert Sft.model_validate(plain).checkpoint_every == TrainRm.model_validate(plain).checkpoint_every == 100
    assert Sft.model_validate({**plain, "checkpoint_every": None}).checkpoint_every is None


@pytest.mark.parametrize(
    "override",
    [
        "flow.service=https://u:hunter2@flow.example",
        "flow.service=https://u:hunter2@" + "long" * 20,
        "flow.service=https://u:hunter2" + "long" * 20 + "@flow.example",
        "flow.servise=https://u:hunter2@flow.example",
        "seed=https://u:hunter2@flow.example",
        "sft.dataset=https://u:hunter2@flow.example",
        "https://u:hunter2@flow.example",
    ],
)
def test_a_secret_in_an_address_is_never_shown(override: str) -> None:
    with pytest.raises((RecipeError, UsageError)) as caught:
        load(RECIPE, override)
    assert "hunter2" not in str(caught.value)
    assert "https://...@" in str(caught.value)


def test_a_secret_in_an_address_of_the_file_is_never_shown() -> None:
    found = problems(changed("service: embedded", "service: https://u:hunter2@flow.example"))
    assert "hunter2" not in "\n".join(found)
