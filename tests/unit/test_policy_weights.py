"""Policy, reference and generator: which weights move, which stay, and what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import MakeRecipe, prompt
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.errors import DataError, MissingStage
from rlhf_cli.policy.generate import token_logps
from rlhf_cli.policy.load import load_model, load_tokenizer
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.online import Sampling
from rlhf_cli.types import Message, Prompt

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "last_layers": {"last_layers": 1},
    "lora": {"lora": {"rank": 4}},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
QUESTION, ANSWER = [(9, 40, 7, 22)], [(30, 31, 32, 33, 1)]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(policy: Policy) -> None:
    """Change what training changes, a lot."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def logps(model: torch.nn.Module) -> tuple[float, ...]:
    return token_logps(model, QUESTION, ANSWER, 0)[0]  # type: ignore[arg-type]


@each_kind
def test_policy_and_reference_agree_before_training(recipe: MakeRecipe, tiny: str, kind: str) -> None:
    policy = Policy(tiny, recipe(model=KINDS[kind]))
    assert logps(policy.model) == logps(policy.reference)


@each_kind
def test_the_reference_stays_while_the_policy_trains(recipe: MakeRecipe, tiny: str, kind: str) -> None:
    policy = Policy(tiny, recipe(model=KINDS[kind]))
    weights_before, logps_before = weights(policy.reference), logps(policy.reference)
    train(policy)
    assert logps(policy.model) != pytest.approx(logps_before, abs=0.01)
    assert logps(policy.reference) == logps_before
    assert all(torch.equal(weights_before[name], value) for name, value in policy.reference.state_dict().items())
    assert not any(p.requires_grad for p in policy.reference.parameters())


@each_kind
def test_the_reference_shares_the_weights_that_are_not_trained(recipe: MakeRecipe, tiny: str, kind: str) -> None:
    policy = Policy(tiny, recipe(model=KINDS[kind]))
    trained = {p.data_ptr() for p in policy.model.parameters() if p.requires_grad}
    frozen = {p.data_ptr() for p in policy.model.parameters() if not p.requires_grad}
    held = {p.data_ptr() for p in policy.reference.parameters()}
    assert not held & trained
    assert frozen <= held
    assert (held == frozen) == (kind == "lora")


def test_only_the_last_layers_and_the_final_norm_are_trained(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe(model={"last_layers": 1}))
    trained = {name.rsplit(".", 2)[0] for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("model.layers.1", "model")) and "layers.0" not in name for name in trained)
    assert any("layers.1" in name for name in trained)
    assert not policy.model.get_input_embeddings().weight.requires_grad


@each_kind
def test_after_sync_the_generator_is_the_policy_in_its_precision(recipe: MakeRecipe, tiny: str, kind: str) -> None:
    policy = Policy(tiny, recipe(model=KINDS[kind], compute={"precision": "fp32", "generator_precision": "bf16"}))
    assert policy.generator is not None
    train(policy)
    policy.sync()
    expected = merged(policy, kind)
    for name, value in policy.generator.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name


def merged(policy: Policy, kind: str) -> dict[str, Tensor]:
    """The policy's weights without adapters, by peft's own merge."""
    if kind != "lora":
        return weights(policy.model)
    return weights(copy.deepcopy(policy.model).merge_and_unload())  # type: ignore[operator]


def test_without_a_copy_the_policy_samples_itself(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe())
    assert policy.generator is None
    policy.sync()


@each_kind
def test_what_is_saved_loads_anywhere_and_is_the_policy(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    policy = Policy(tiny, recipe(model=KINDS[kind]))
    train(policy)
    policy.save(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert logps(loaded) == pytest.approx(logps(policy.model), abs=2e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).decode(QUESTION[0]) == policy.tokenizer.decode(QUESTION[0])
    before = logps(policy.model)
    policy.save(str(tmp_path / "again"))
    assert logps(policy.model) == before  # saving does not merge the adapters of the policy itself


@each_kind
def test_a_group_knows_what_policy_and_reference_thought_of_it(recipe: MakeRecipe, tiny: str, kind: str) -> None:
    policy = Policy(tiny, recipe(model=KINDS[kind]))
    train(policy)
    asked = [prompt("Why is the sky blue?", "a"), prompt("Hi", "b")]
    sampling = Sampling(temperature=[1.0, 0.5], max_new_tokens=6)
    groups = policy.sample_groups(asked, sampling, 3, first_index=4, prefix="run-1", step=2, seed=7)
    assert [g.id for g in groups] == ["run-1-000004", "run-1-000005"]
    assert [(g.index, g.prompt.id, g.policy_step) for g in groups] == [(4, "a", 2), (5, "b", 2)]
    for g in groups:
        assert g.prompt_ids == policy.encode(g.prompt)
        assert len(g.completions) == 3
        for c in g.completions:
            one = ([g.prompt_ids], [c.token_ids], policy.pad_id)
            assert c.logps == pytest.approx(token_logps(policy.model, *one)[0], abs=1e-4)  # type: ignore[arg-type]
            assert c.ref_logps == pytest.approx(token_logps(policy.reference, *one)[0], abs=1e-4)
            assert c.text == policy.decode(c.token_ids)
            assert "<|end|>" not in c.text


def test_groups_follow_from_seed_and_index(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe())
    sampling = Sampling(max_new_tokens=6)

    def groups(first_index: int, seed: int) -> list[tuple[str, ...]]:
        made = policy.sample_groups(
            [prompt("Hi")] * 2, sampling, 3, first_index=first_index, prefix="g", step=0, seed=seed
        )
        return [tuple(c.text for c in g.completions) for g in made]

    assert groups(0, 7) == groups(0, 7)
    assert len({*groups(0, 7), *groups(2, 7), *groups(0, 8)}) == 6


def test_sampling_and_scoring_leave_the_training_mode_as_it_was(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe())
    policy.model.train()
    policy.sample_groups([prompt("Hi")], Sampling(max_new_tokens=2), 2, first_index=0, prefix="g", step=0, seed=1)
    assert policy.model.training
    assert not policy.reference.training


def test_the_system_prompt_of_the_recipe_is_put_before_prompts_without_one(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe(data={"prompts": "prompts.jsonl", "system_prompt": "Be kind."}))
    own = Prompt("p", (Message("system", "Be brief."), Message("user", "Hi")))
    assert policy.tokenizer.decode(policy.encode(prompt("Hi"))).startswith("<|system|>Be kind.<|end|>")
    assert policy.tokenizer.decode(policy.encode(own)).startswith("<|system|>Be brief.<|end|>")


def test_a_prompt_must_leave_room_for_its_answer(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe(data={"prompts": "prompts.jsonl", "max_prompt_tokens": 5000}))
    empty = len(policy.encode(prompt("")))
    room = 1024 - 6 - empty
    token = policy.tokenizer.decode([9])
    assert len(policy.encode(prompt(token * room))) == 1024 - 6
    with pytest.raises(DataError, match=r"everyday-7.*1019 tokens.*max_new_tokens.*1024"):
        policy.encode(prompt(token * (room + 1), "everyday-7"))


def test_a_policy_that_is_not_trained_is_compared_with_what_it_is_given(recipe: MakeRecipe, tiny: str) -> None:
    start, end = Policy(tiny, recipe(), train=False), Policy(tiny, recipe())
    train(end)
    compared = Policy(tiny, recipe(model=KINDS["lora"]), train=False, reference=end.model)
    assert compared.reference is end.model
    assert not any(p.requires_grad for p in start.model.parameters())
    assert not hasattr(compared.model, "peft_config") or not compared.model.peft_config


def test_bf16_logps_keep_the_vocabulary_projection_exact(recipe: MakeRecipe, tiny: str) -> None:
    policy = Policy(tiny, recipe(compute={"precision": "bf16", "generator_precision": "fp32"}))
    inside: list[torch.dtype] = []
    head = policy.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _m, _i, out: inside.append(out.dtype))
    policy.logps(policy.model, QUESTION, ANSWER)
    hook.remove()
    assert inside == [torch.float32]
    assert policy.logps(policy.model, QUESTION, ANSWER) == policy.logps(policy.reference, QUESTION, ANSWER)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(DataError, match="nowhere"):
            load(str(tmp_path / "nowhere"))


def test_a_packaged_model_that_was_not_pulled_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    with pytest.raises(MissingStage, match="rlhf models pull smollm2-135m"):
        load_model("smollm2-135m")


def test_a_tokenizer_without_padding_pads_with_its_end_token(tiny: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id
    assert loaded.padding_side == "left"
