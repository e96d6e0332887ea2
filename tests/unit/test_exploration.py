"""Roles of a group: who samples what, with which weights, what is kept of several; and groups worth nothing."""

# ruff: noqa: E501  (tables, one case a line)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import MakeRecipe, prompt
from transformers.generation.logits_process import TopPLogitsWarper

from rlhf_cli.errors import DataError
from rlhf_cli.journal.replay import RunState
from rlhf_cli.online.degenerate import degenerate
from rlhf_cli.online.guards import Guards
from rlhf_cli.online.roles import role_metrics, win_shares
from rlhf_cli.online.stream import Fresh
from rlhf_cli.policy.generate import _RowTopP, sample, token_logps
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.online import Sampling
from rlhf_cli.types import Completion, Group, Prompt, RankedGroup, WinMatrix

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "last_layers": {"last_layers": 1},
    "lora": {"lora": {"rank": 4}},
}
each_kind = pytest.mark.parametrize("kind", KINDS)

MAIN = {"name": "main", "count": 2}
COLD = {"name": "cold", "count": 1, "temperature": 1e-4}
OLD = {"name": "old", "count": 1, "policy": "previous"}


def sampling(*roles: dict[str, Any], **given: Any) -> Sampling:
    return Sampling.model_validate({"max_new_tokens": 6, "roles": list(roles), **given})


def policy_of(tiny: str, recipe: MakeRecipe, roles: Sampling, **given: Any) -> Policy:
    model = given.pop("model", {})
    plan = recipe(model=model, run_online={"sampling": roles.model_dump()}, **given.pop("sections", {}))
    return Policy(tiny, plan, **given)


def groups(policy: Policy, roles: Sampling, seed: int = 7, prompts: int = 2) -> list[Group]:
    size = sum(role.count for role in roles.roles or [])
    asked = [prompt("Why is the sky blue?", f"p{n}") for n in range(prompts)]
    return policy.sample_groups(asked, roles, size, first_index=0, prefix="g", step=0, seed=seed)


def train(policy: Policy, by: float = 0.3) -> None:
    """Change what training changes, a lot."""
    generator = torch.Generator().manual_seed(4)  # no two tokens that are as good as equal
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def greedy(policy: Policy, model: Any) -> tuple[int, ...]:
    """What a model says without any chance."""
    rows = [policy.encode(prompt("Why is the sky blue?"))]
    (one,) = sample(
        model, rows, [0.0], max_new_tokens=6, top_p=1.0, stop_ids=policy.stop_ids, pad_id=policy.pad_id, seed=0
    )
    return one.token_ids


# --- who samples what


def test_a_completion_carries_the_name_of_its_role_and_is_sampled_as_that_says(recipe: MakeRecipe, tiny: str) -> None:
    roles = sampling(MAIN, COLD)
    policy = policy_of(tiny, recipe, roles)
    first, second = groups(policy, roles, 1), groups(policy, roles, 2)
    for g in (*first, *second):
        assert [c.role for c in g.completions] == ["main", "main", "cold"]
        assert g.completions[2].token_ids == greedy(policy, policy.model)
    assert [c.text for c in first[0].completions[:2]] != [c.text for c in second[0].completions[:2]]


def test_a_list_of_temperatures_is_roles_without_names(recipe: MakeRecipe, tiny: str) -> None:
    listed = Sampling(temperature=[1.0, 0.5], top_p=0.9, max_new_tokens=6)
    named = sampling(
        {"name": "a", "count": 2, "temperature": 1.0, "top_p": 0.9},
        {"name": "b", "count": 1, "temperature": 0.5, "top_p": 0.9},
    )
    policy = policy_of(tiny, recipe, named)
    asked = [prompt("Hi")]
    as_list, as_roles = (
        policy.sample_groups(asked, how, 3, first_index=0, prefix="g", step=0, seed=3)[0] for how in (listed, named)
    )
    assert [c.token_ids for c in as_list.completions] == [c.token_ids for c in as_roles.completions]
    assert [c.role for c in as_list.completions] == ["", "", ""]


def test_each_row_keeps_its_own_share_of_the_probability() -> None:
    """Against transformers, row by row; a share of 1 keeps everything."""
    scores_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(2)) * 3
    shares = [0.1, 0.5, 0.9, 0.99, 1.0, 1e-6]
    together_BV = _RowTopP(torch.tensor(shares))(torch.zeros(6, 1), scores_BV)
    for row, share in enumerate(shares):
        alone_V = TopPLogitsWarper(share)(None, scores_BV[row : row + 1])[0]
        assert torch.equal(together_BV[row], alone_V), share
    assert torch.isfinite(together_BV[4]).all()
    assert torch.isfinite(together_BV).sum(1).tolist()[5] == 1


def test_how_a_policy_is_measured_alone() -> None:
    """Without `previous` and without a choice among several, where there is such a role."""
    assert Sampling(temperature=[1.0, 0.7]).plain.temperature == [1.0, 0.7]
    roles = sampling(OLD, {**MAIN, "best_of": 4}, {"name": "own", "count": 1, "temperature": 0.3, "top_p": 0.8})
    assert (roles.plain.roles, roles.plain.temperature, roles.plain.top_p) == (None, 0.3, 0.8)
    assert roles.plain.max_new_tokens == 6
    assert sampling(OLD, {**MAIN, "best_of": 4, "temperature": 0.6}).plain.temperature == 0.6


# --- the best of several


def longest(prompt: Prompt, texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def test_the_best_of_several_is_the_one_that_the_reward_model_likes_best(recipe: MakeRecipe, tiny: str) -> None:
    roles = sampling({"name": "best", "count": 2, "best_of": 5}, {**MAIN, "count": 1})
    seen: list[tuple[str, list[str]]] = []

    def like(prompt: Prompt, texts: Sequence[str]) -> list[float]:
        seen.append((prompt.id, list(texts)))
        return longest(prompt, texts)

    policy = policy_of(tiny, recipe, roles, score=like)
    made = groups(policy, roles)
    assert [name for name, _ in seen] == ["p0", "p0", "p1", "p1"]  # once for each completion that is chosen
    assert all(len(texts) == 5 for _, texts in seen)
    kept = [c.text for g in made for c in g.completions[:2]]
    assert [len(text) for text in kept] == [max(map(len, texts)) for _, texts in seen]
    assert all(text in texts for text, (_, texts) in zip(kept, seen, strict=True))
    for c in made[0].completions:  # what is kept is what the policy thinks of it, not of the choice
        one = ([made[0].prompt_ids], [c.token_ids], policy.pad_id)
        assert c.logps == pytest.approx(token_logps(policy.model, *one)[0], abs=1e-4)


def test_a_candidate_without_a_number_is_never_the_best(recipe: MakeRecipe, tiny: str) -> None:
    roles = sampling({"name": "best", "count": 2, "best_of": 3})
    seen: list[list[str]] = []

    def like(prompt: Prompt, texts: Sequence[str]) -> list[float]:
        seen.append(list(texts))
        return [float("nan"), -1.0, float("inf")]

    policy = policy_of(tiny, recipe, roles, score=like)
    made = groups(policy, roles)
    assert [c.text for g in made for c in g.completions] == [texts[1] for texts in seen]

    policy.score = lambda prompt, texts: [float("nan")] * len(texts)
    with pytest.raises(DataError, match="gave no number for any of 3 answers to prompt 'p0'"):
        groups(policy, roles)
    policy.score = None
    with pytest.raises(DataError, match="needs a reward model"):
        groups(policy, roles)


# --- the previous policy


@each_kind
def test_the_previous_policy_is_the_start_until_it_is_renewed_and_then_stays(
    recipe: MakeRecipe, tiny: str, kind: str
) -> None:
    roles = sampling(MAIN, {**OLD, "temperature": 1e-4})
    policy = policy_of(tiny, recipe, roles, model=KINDS[kind])
    start = greedy(policy, policy.start)
    train(policy)
    assert [g.completions[2].token_ids for g in groups(policy, roles)] == [start, start]

    policy.renew_previous()
    then = greedy(policy, policy.model)
    assert then != start
    train(policy, 0.5)
    assert greedy(policy, policy.model) != then
    assert [g.completions[2].token_ids for g in groups(policy, roles)] == [then, then]
    assert greedy(policy, policy.start) == start  # renewing one copy leaves the others as they were


@each_kind
def test_logps_are_those_of_the_weights_that_sampled(recipe: MakeRecipe, tiny: str, kind: str) -> None:
    roles = sampling(MAIN, OLD)
    policy = policy_of(tiny, recipe, roles, model=KINDS[kind])
    train(policy)
    assert policy.previous is not None
    for g in groups(policy, roles):
        for c, model in zip(g.completions, [policy.model, policy.model, policy.previous], strict=True):
            one = ([g.prompt_ids], [c.token_ids], policy.pad_id)
            assert c.logps == pytest.approx(token_logps(model, *one)[0], abs=1e-4)
            assert c.ref_logps == pytest.approx(token_logps(policy.reference, *one)[0], abs=1e-4)
    old = groups(policy, roles)[0].completions[2]
    assert old.logps == pytest.approx(old.ref_logps, abs=1e-4)  # the previous policy is still the start
    assert old.logps != pytest.approx(token_logps(policy.model, [g.prompt_ids], [old.token_ids], 0)[0], abs=0.01)


@each_kind
def test_the_previous_policy_survives_a_checkpoint(recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str) -> None:
    roles = sampling(MAIN, {**OLD, "temperature": 1e-4})
    policy = policy_of(tiny, recipe, roles, model=KINDS[kind])
    train(policy)
    policy.renew_previous()
    policy.save_copies(tmp_path)
    before = groups(policy, roles)[0].completions[2]

    again = policy_of(tiny, recipe, roles, model=KINDS[kind])
    assert groups(again, roles)[0].completions[2] != before
    again.load_copies(tmp_path)
    after = groups(again, roles)[0].completions[2]
    assert (after.token_ids, after.logps) == (before.token_ids, before.logps)


def test_who_does_not_look_back_keeps_no_copy(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    policy = policy_of(tiny, recipe, sampling(MAIN, COLD))
    assert policy.previous is None
    policy.renew_previous()
    policy.save_copies(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_role_changes_no_random_number_of_another_policy(recipe: MakeRecipe, tiny: str) -> None:
    """The previous policy draws from numbers of its own: as long as it is the same policy, it says other things."""
    roles = sampling(MAIN, {**OLD, "count": 2})
    policy = policy_of(tiny, recipe, roles)
    own, old = [c.token_ids for g in groups(policy, roles) for c in g.completions[:2]], groups(policy, roles)
    alone = policy.sample_groups(
        [prompt("Why is the sky blue?", f"p{n}") for n in range(2)],
        Sampling(max_new_tokens=6),
        2,
        first_index=0,
        prefix="g",
        step=0,
        seed=7,
    )
    assert own == [c.token_ids for g in alone for c in g.completions]
    assert own != [c.token_ids for g in old for c in g.completions[2:]]


# --- what each role adds


def said(text: str, role: str = "", ended: bool = True, tokens: int = 1) -> Completion:
    return Completion(text, (3,) * tokens, (-1.0,) * tokens, (-1.0,) * tokens, ended, role)


def of(*completions: Completion, name: str = "g", index: int = 0) -> Group:
    return Group(name, index, prompt("Why?"), (1,), completions, 0)


def test_a_role_wins_the_votes_that_it_took_from_others_and_no_others() -> None:
    """By hand: `main` has completions 0 and 1, `old` has 2."""
    group = of(said("a", "main"), said("b", "main"), said("c", "old"))
    wins = WinMatrix([[0, 5, 3], [1, 0, 0.5], [1, 0.5, 0]])  # the 6 votes within `main` say nothing about it
    ranked = RankedGroup(group, wins, "item:i", 1.0, True)
    assert win_shares([ranked]) == {"main": 3.5 / 5, "old": 1.5 / 5}
    assert win_shares([ranked, ranked]) == {"main": 3.5 / 5, "old": 1.5 / 5}
    only_within = RankedGroup(group, WinMatrix([[0, 5, 0], [1, 0, 0], [0, 0, 0]]), "item:i", 1.0, True)
    assert win_shares([only_within]) == {}  # no vote is no share, not a share of 0


def test_the_figures_of_a_role_are_means_of_what_it_sampled() -> None:
    fresh = Fresh()
    roles = sampling({**MAIN, "best_of": 2}, {**COLD, "name": "own"})
    group = of(said("ab", "main", tokens=2), said("abcd", "main", ended=False, tokens=4), said("a", "own"))
    fresh.add(group, [1.0, 4.0, 3.0], roles)
    assert role_metrics(fresh.roles, []) == {
        "role/main/length_tokens": 3,
        "role/main/reward": 2.5,
        "role/own/length_tokens": 1,
        "role/own/reward": 3,
    }
    assert (fresh.tokens, fresh.chars, fresh.rewards, fresh.ended) == ([1], [1], [3.0], [True])  # the policy's own
    unscored = Fresh()
    unscored.add(group, None, roles)
    assert role_metrics(unscored.roles, []) == {"role/main/length_tokens": 3, "role/own/length_tokens": 1}


def test_what_a_reward_model_chose_or_an_earlier_policy_said_is_not_how_far_the_policy_is(recipe: MakeRecipe) -> None:
    roles = sampling({**MAIN, "count": 1}, {"name": "best", "count": 1, "best_of": 4}, OLD)
    online = recipe(run_online={"sampling": roles.model_dump(), "prompts_per_step": 1}).run_online
    assert online is not None
    guards = Guards(online, RunState())

    def at(role: str, kl_nats: float) -> Completion:
        return Completion("text", (3,), (kl_nats - 1.0,), (-1.0,), True, role)

    for n in range(16):
        guards.sampled([of(at("main", 2.0), at("best", 50.0), at("old", -3.0), index=n)])
        assert (guards.kl_nats is None) == (n < 15)  # sixteen of its own make it enough
    assert guards.kl_nats == pytest.approx(2.0)
    assert guards.kl_latest_nats == pytest.approx(2.0)


# --- degenerate groups


@pytest.mark.parametrize(
    ("completions", "cut_off", "why"),
    [
        ((said("a"), said("b")), "drop", None),
        ((said("a"), said("a ")), "use", "degenerate: all completions say the same"),
        ((said(""), said(" \n")), "use", "degenerate: all completions are empty"),
        ((said("a"), said("")), "use", None),
        ((said("a", ended=False), said("b", ended=False)), "use", None),
        ((said("a", ended=False), said("b", ended=False)), "drop", "degenerate: the token limit cut off all completions"),
        ((said("a", ended=False), said("b")), "drop", None),
    ],
)  # fmt: skip
def test_a_group_that_nobody_could_learn_from_says_why(
    completions: tuple[Completion, ...], cut_off: Any, why: str | None
) -> None:
    assert degenerate(of(*completions), cut_off) == why
