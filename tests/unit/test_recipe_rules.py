"""Combinations that make no sense are refused when the recipe is read, where they were typed, with the reason."""

# ruff: noqa: E501  (tables of mistakes, one a line)

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from recipe_files import RECIPE, write_recipe

from rlhf_cli.recipe.load import check_recipe
from rlhf_cli.recipe.rules import broken_rules

ROLES = "{max_new_tokens: 16, roles: [{name: main, count: 3}, {name: enhancer, count: 1, temperature: 0.7}]}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changed(changes: list[tuple[str, str]]) -> str:
    """`RECIPE` with these texts replaced."""
    text = RECIPE
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def problems(changes: list[tuple[str, str]]) -> list[str]:
    return [str(problem) for problem in check_recipe(write_recipe(Path(), changed(changes)))[1]]


def said(problems: list[str], beginning: str) -> bool:
    return any(problem.startswith(f"recipe.yaml:{beginning}") for problem in problems)


ROLE = ("sampling: {temperature: [1.0, 0.7], max_new_tokens: 16}", "sampling: " + ROLES)
HYBRID = ("steps: 3", "steps: 3\n  feedback: hybrid")
FUNCTION = ("steps: 3", "steps: 3\n  feedback: function")
BY_MODEL = ("steps: 3", "steps: 3\n  feedback: reward_model")
PPO = ("algorithm: dpo, beta: 0.2", "algorithm: ppo")
NO_RM = ("train_rm:\n  dataset: votes.jsonl\n", "")
NO_FLOW = (
    "flow:\n  service: embedded\n  instruction: Which answer is kinder?\n  responses: {min: 4, desired: 6, max: 8}\n  ttl_s: 60\n  crowd: {raters: 10}\n",
    "",
)


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        # who compares
        ([HYBRID, NO_FLOW], "16:3: run_online.feedback: hybrid feedback asks people too: add a `flow` section"),
        ([HYBRID, NO_RM], "20:3: run_online.feedback: hybrid feedback needs a `train_rm` section"),
        ([HYBRID, ("dataset: votes.jsonl", "dataset: votes.jsonl\n  kind: pairwise")], "23:3: run_online.feedback: hybrid feedback needs rewards, which a pairwise model has none of"),
        ([HYBRID, ("service: embedded", "service: replay")], "22:3: run_online.feedback: replay gives votes to the groups they were given to"),
        ([FUNCTION, ("kl:", "incomplete: drop\n  kl:")], "26:3: run_online.incomplete: is about people who gave few votes"),
        # what people see
        ([HYBRID, ("kl:", "refresh: {every_groups: 1}\n  kl:")], "26:13: run_online.refresh.every_groups: must be at least 2"),
        ([FUNCTION, ("kl:", "selection: {by: diverse}\n  kl:")], "26:3: run_online.selection: chooses what people see, and function feedback asks none"),
        ([NO_RM, ("kl:", "selection: {}\n  kl:")], "23:3: run_online.selection.by: uncertainty is a reward model's: add a `train_rm` section"),
        ([("kl:", "selection: {by: drifting}\n  kl:")], "25:15: run_online.selection.by: drifting groups are those where model and people disagree"),
        ([("kl:", "refresh: {}\n  kl:")], "25:3: run_online.refresh: refits the model that answers for people: use hybrid feedback, not votes"),
        ([FUNCTION, ("kl:", "drift: {}\n  kl:")], "26:3: run_online.drift: compares model and people: use hybrid feedback, not function"),
        ([HYBRID, ("kl:", "drift: {}\n  kl:")], "26:3: run_online.drift: asks people so that the reward model is refitted"),
        ([HYBRID, ("kl:", "refresh: {}\n  selection: {by: drifting}\n  kl:")], "27:15: run_online.selection.by: add run_online.drift"),
        ([FUNCTION, ("kl:", "segments: {}\n  kl:")], "26:3: run_online.segments: marks are made by people who vote: use votes feedback, not function"),
        ([("algorithm: dpo, beta: 0.2", "algorithm: grpo"), ("kl:", "segments: {}\n  kl:")], "25:3: run_online.segments: marks are weights in the loss of dpo; grpo has no place for them"),
        # roles
        ([ROLE, ("count: 3", "count: 4")], "23:34: run_online.sampling.roles: 4 + 1 completions are not run_online.group_size (4)"),
        ([ROLE, ("group_size: 4", "group_size: 5")], "23:34: run_online.sampling.roles: 3 + 1 completions are not run_online.group_size (5)"),
        ([ROLE, ("name: enhancer", "name: main")], "23:67: run_online.sampling.roles.1.name: a second role named 'main'"),
        ([ROLE, ("{max_new_tokens", "{temperature: [1.0, 0.7], max_new_tokens")], "23:14: run_online.sampling.temperature: every role has its own"),
        ([ROLE, ("{max_new_tokens", "{top_p: 0.9, max_new_tokens")], "23:14: run_online.sampling.top_p: every role has its own"),
        ([ROLE, NO_RM, ("0.7}", "0.7, best_of: 4}")], "21:111: run_online.sampling.roles.1.best_of: a reward model chooses the best: add a `train_rm` section"),
        ([ROLE, ("steps: 3", "steps: 9"), ("name: main", "name: main, policy: previous"), ("name: enhancer", "name: enhancer, policy: previous")], "23:34: run_online.sampling.roles: all are `policy: previous`"),
        ([ROLE, ("0.7}", "0.7, policy: previous}")], "23:111: run_online.sampling.roles.1.policy: no checkpoint is made before the last step: checkpoint_every (5) is not below steps (3)"),
        # numbers
        ([("votes: 500", "votes: 7")], "26:10: budget.votes: one group may take 8 votes; nothing could be asked within 7"),
        ([("votes: 500", "votes: 10"), ("steps: 3", "steps: 3\n  incomplete: resubmit_once")], "27:10: budget.votes: one group may take 11 votes"),
        ([("votes: 500", "usd: 0.1, usd_per_1k_votes: 20")], "26:10: budget.usd: one group may take 8 votes, 0.16 USD; nothing could be asked within 0.1"),
        ([("beta: 0.2", "minibatches: 3")], "24:29: run_online.learner.minibatches: the 8 groups of run_online.prompts_per_step do not divide into 3 equal parts"),
        ([("beta: 0.2", "minibatches: 4, accumulate: 4")], "24:45: run_online.learner.accumulate: the 8 groups of run_online.prompts_per_step do not divide into 16"),
        ([("steps: 3", "steps: 3\n  feedback: judge\n  judge: {url: 'http://localhost:1', model: m, comparisons: 7}")], "23:48: run_online.judge.comparisons: 7 pairs of a group of 4: it takes 3 to compare all, and there are 6"),
        ([("steps: 3", "steps: 3\n  feedback: judge\n  judge: {url: 'http://localhost:1', model: m, comparisons: 2}")], "23:48: run_online.judge.comparisons: 2 pairs of a group of 4"),
        # ppo
        ([PPO], "24:13: run_online.learner.algorithm: ppo climbs scores, and votes feedback compares; use reward_model or function"),
        ([PPO, HYBRID], "25:13: run_online.learner.algorithm: ppo climbs scores, and hybrid feedback compares"),
        ([PPO, FUNCTION, NO_RM], "23:13: run_online.learner.algorithm: ppo has a critic that starts as the reward model: add a `train_rm` section"),
        ([PPO, BY_MODEL, NO_RM], "20:3: run_online.feedback: reward_model feedback needs a `train_rm` section"),
        ([PPO, BY_MODEL, ("dataset: votes.jsonl", "dataset: votes.jsonl\n  kind: pairwise")], "26:13: run_online.learner.algorithm: ppo needs rewards, which a pairwise model has none of"),
        ([("algorithm: dpo, beta: 0.2", "algorithm: ppo, kl_target_nats: 5"), BY_MODEL], "25:29: run_online.learner.kl_target_nats: adapts beta, and so does kl.soft_nats"),
        # guards
        ([("soft_nats: 8, hard_nats: 20", "soft_nats: 8, on_hard: rollback")], "25:22: run_online.kl.on_hard: rolls back at the hard limit: add kl.hard_nats"),
        ([("kl:", "length: {on_trip: stop}\n  kl:")], "25:12: run_online.length.on_trip: nothing trips that could stop: add max_correlation or max_growth"),
        ([("kl:", "length: {penalty: 0.01}\n  kl:")], "25:12: run_online.length.penalty: is taken from scores, and here votes are learned from as they are"),
        ([("steps: 3", "steps: 3\n  feedback: judge\n  judge: {url: 'http://localhost:1', model: m}"), ("kl:", "length: {penalty: 0.01}\n  kl:")], "27:12: run_online.length.penalty: is taken from scores, and here votes"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_together_is_refused_at_its_place(changes: list[tuple[str, str]], beginning: str) -> None:
    found = problems(changes)
    assert said(found, beginning), "\n".join(found)


def test_a_mistake_within_a_role_is_named_with_its_place_in_the_list() -> None:
    assert problems([ROLE, ("count: 1, temperature: 0.7", "count: 1, temprature: 0.7, top_p: 2, best_of: 0")]) == [
        "recipe.yaml:23:93: run_online.sampling.roles.1.temprature: unknown key; did you mean 'temperature'?",
        "recipe.yaml:23:110: run_online.sampling.roles.1.top_p: must be at most 1, got 2",
        "recipe.yaml:23:120: run_online.sampling.roles.1.best_of: must be at least 1, got 0",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        [ROLE, ("0.7}", "0.7, best_of: 4}")],
        [ROLE, ("steps: 3", "steps: 9"), ("0.7}", "0.7, policy: previous}")],
        [HYBRID, ("kl:", "selection: {}\n  refresh: {}\n  drift: {}\n  length: {penalty: 0.01}\n  kl:")],
        [NO_RM, ("kl:", "selection: {by: diverse}\n  segments: {}\n  kl:")],
        [PPO, BY_MODEL],
        [PPO, FUNCTION],
        [("algorithm: dpo, beta: 0.2", "algorithm: ppo, kl_target_nats: 5"), BY_MODEL, ("soft_nats: 8, ", "")],
        [("group_size: 4", "group_size: 16")],  # with 8 votes, which do not even connect them: few a group are worth most
        [("votes: 500", "votes: 8, usd: 0.16, usd_per_1k_votes: 20")],
        [("beta: 0.2", "minibatches: 4, accumulate: 2")],
        [("soft_nats: 8, hard_nats: 20", "hard_nats: 20, on_hard: rollback")],
        [("learner: {algorithm: dpo, beta: 0.2}", "segments: {}")],
        [("learner: {algorithm: dpo, beta: 0.2}", "learner: {algorithm: dpo, labels: posterior}\n  length: {penalty: 0.01}")],
    ],
)  # fmt: skip
def test_what_makes_sense_breaks_no_rule(changes: list[tuple[str, str]]) -> None:
    assert list(broken_rules(yaml.safe_load(changed(changes)))) == []


@pytest.mark.parametrize(
    "changes",
    [
        [ROLE, ("count: 3", "count: three")],
        [ROLE, ("{name: main, count: 3}", "main")],
        [ROLE, (ROLES, "{roles: 4}")],
        [("group_size: 4", "group_size: many"), ("max: 8", "max: all")],
        [("learner: {algorithm: dpo, beta: 0.2}", "learner: dpo\n  selection: 3\n  segments: yes please")],
        [("beta: 0.2", "minibatches: 0")],
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_a_mistake_of_its_own_and_stops_no_rule(changes: list[tuple[str, str]]) -> None:
    found = problems([*changes, ("hard_nats: 20", "on_hard: rollback")])
    assert any("run_online.kl.on_hard: rolls back at the hard limit" in problem for problem in found)
    assert len(found) > 1  # the one above, and the wrong type
