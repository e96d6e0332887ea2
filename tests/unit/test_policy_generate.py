"""Sampling and scoring tokens on a tiny model: what a row gets depends on that row alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_world import TEXTS, prompt
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.policy.generate import Sampled, completion_logps, encode_prompt, pack, sample, token_logps
from rlhf_cli.policy.load import load_model, load_tokenizer, stop_token_ids
from rlhf_cli.types import Message, Prompt

PROMPTS = [(9, 40, 7), (100, 12, 13, 14, 200, 33, 8), (5,), (77, 78)]
COMPLETIONS = [(30, 31, 32, 1), (8,), (200, 201, 202, 203, 204, 205), (64, 1)]


@pytest.fixture(scope="module")
def model(tiny: str) -> PreTrainedModel:
    return load_model(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny)


def naive(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """All logits of one row without padding, position by position."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    logp_TV = logits_TV.log_softmax(-1)
    return [float(logp_TV[len(prompt) + i - 1, token]) for i, token in enumerate(completion)]


@pytest.mark.parametrize("pad_id", [0, 1])  # 1 is the end of a completion too, as in models that pad with eos
def test_logps_are_those_of_each_row_alone(model: PreTrainedModel, pad_id: int) -> None:
    together = token_logps(model, PROMPTS, COMPLETIONS, pad_id)
    for row, question, completion in zip(together, PROMPTS, COMPLETIONS, strict=True):
        assert row == pytest.approx(naive(model, question, completion), abs=1e-5)


def test_padding_does_not_move_tokens_where_positions_are_absolute() -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=314, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=1.0)
    model = GPT2LMHeadModel(config).eval()
    for row, question, completion in zip(
        token_logps(model, PROMPTS, COMPLETIONS, 0), PROMPTS, COMPLETIONS, strict=True
    ):
        assert row == pytest.approx(naive(model, question, completion), abs=1e-4)


def test_logps_do_not_depend_on_batch_mates(model: PreTrainedModel) -> None:
    together = token_logps(model, PROMPTS, COMPLETIONS, 0)
    for size, order in [(1, [0, 1, 2, 3]), (2, [3, 0, 2, 1]), (3, [2, 1, 0, 3])]:
        rows = token_logps(model, [PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], 0, batch_size=size)
        for i, row in zip(order, rows, strict=True):
            assert row == pytest.approx(together[i], abs=1e-5)


def test_the_sum_that_trains_is_the_sum_that_was_stored(model: PreTrainedModel) -> None:
    with torch.no_grad():
        logp_BT = completion_logps(model, **pack(PROMPTS, COMPLETIONS, 0, torch.device("cpu")))
    for row, stored in zip(logp_BT, token_logps(model, PROMPTS, COMPLETIONS, 0), strict=True):
        assert float(row.sum()) == pytest.approx(sum(stored), abs=1e-5)


def test_an_empty_completion_has_no_logps(model: PreTrainedModel) -> None:
    assert token_logps(model, PROMPTS[:2], [(), (8,)], 0)[0] == ()


def draw(
    model: PreTrainedModel, rows: int = 4, *, temperature: float | list[float] = 1.0, **given: object
) -> list[Sampled]:
    arguments = {"max_new_tokens": 8, "top_p": 1.0, "stop_ids": [1], "pad_id": 0, "seed": 5, **given}
    temperatures = temperature if isinstance(temperature, list) else [temperature] * rows
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), rows))
    return sample(model, prompts, temperatures, **arguments)  # type: ignore[arg-type]


def test_a_seed_fixes_what_is_sampled(model: PreTrainedModel) -> None:
    assert draw(model, seed=5) == draw(model, seed=5)
    assert draw(model, seed=5) != draw(model, seed=6)


def test_sampling_leaves_the_random_numbers_of_training_alone(model: PreTrainedModel) -> None:
    torch.manual_seed(11)
    undisturbed = torch.rand(3)
    torch.manual_seed(11)
    draw(model)
    assert torch.equal(torch.rand(3), undisturbed)


def greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    return tuple(ids[len(prompt) :])


def test_each_row_has_its_own_temperature(model: PreTrainedModel) -> None:
    """Cold rows take the most likely tokens whatever the seed, hot rows of the same batch do not."""
    cold_and_hot = [1e-4, 3.0, 1e-4, 3.0]
    first, second = (draw(model, temperature=cold_and_hot, seed=seed) for seed in (1, 2))
    for row in (0, 2):
        assert first[row].token_ids == second[row].token_ids == greedy(model, PROMPTS[row], 8)
    assert first[1] != second[1]


def test_tokens_come_as_often_as_the_model_says(model: PreTrainedModel) -> None:
    """Chi-square of 4000 first tokens against the softmax at temperature 0.7."""
    with torch.no_grad():
        expected_V = 4000 * (model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.7).softmax(-1)
    drawn = sample(
        model,
        [PROMPTS[0]] * 4000,
        [0.7] * 4000,
        max_new_tokens=1,
        top_p=1.0,
        stop_ids=[1],
        pad_id=0,
        seed=3,
        batch_size=4000,
    )
    observed_V = torch.bincount(torch.tensor([s.token_ids[0] for s in drawn]), minlength=len(expected_V)).double()
    often_V = expected_V >= 5
    observed = torch.cat([observed_V[often_V], observed_V[~often_V].sum()[None]])
    expected = torch.cat([expected_V[often_V], expected_V[~often_V].sum()[None].clamp(min=1e-9)])
    freedom = len(observed) - 1
    assert freedom > 5
    assert float(((observed - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def test_top_p_leaves_only_the_smallest_set_of_tokens(model: PreTrainedModel) -> None:
    with torch.no_grad():
        probability_V = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 2.0).softmax(-1)
    ordered = probability_V.sort(descending=True)
    count = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    allowed = set(ordered.indices[:count].tolist())
    drawn = sample(
        model,
        [PROMPTS[0]] * 300,
        [2.0] * 300,
        max_new_tokens=1,
        top_p=0.5,
        stop_ids=[1],
        pad_id=0,
        seed=3,
        batch_size=300,
    )
    assert {s.token_ids[0] for s in drawn} <= allowed
    assert len({s.token_ids[0] for s in drawn}) > 1


def test_a_completion_ends_with_its_stop_token_or_at_the_limit(model: PreTrainedModel) -> None:
    drawn = draw(model, 60, temperature=3.0, max_new_tokens=12, stop_ids=[1, *range(2, 60)])
    stops = set(range(1, 60))
    assert {s.ended for s in drawn} == {True, False}
    for s in drawn:
        assert not stops & set(s.token_ids[:-1])
        assert (s.token_ids[-1] in stops) == s.ended
        assert s.ended or len(s.token_ids) == 12


def test_a_models_own_sampling_settings_do_not_bend_what_is_sampled(
    tiny: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What is sampled must be what is scored: settings such as Qwen's repetition_penalty would make them differ."""
    plain = load_model(tiny).eval()
    plain.save_pretrained(tmp_path)
    GenerationConfig(
        eos_token_id=[1, 4], pad_token_id=0, do_sample=True, repetition_penalty=50.0, top_k=2, temperature=0.3
    ).save_pretrained(tmp_path)

    loaded = load_model(str(tmp_path)).eval()

    assert draw(loaded, temperature=2.0) == draw(plain, temperature=2.0)
    assert stop_token_ids(tokenizer, loaded) == [1, 4]  # which tokens end an answer is no matter of taste


def test_a_prompt_is_encoded_by_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = Prompt("p", (Message("system", "Be kind."), Message("user", TEXTS[0])))
    text = f"<|system|>Be kind.<|end|><|user|>{TEXTS[0]}<|end|><|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, chat, 100)) == text


def test_a_prompt_without_a_template_is_its_text(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, prompt("Say hello."), 100)) == "Say hello.\n"


def test_a_prompt_that_is_too_long_is_refused_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = prompt("Why is the sky blue?", "everyday-12")
    length = len(encode_prompt(tokenizer, asked, 1000))
    assert len(encode_prompt(tokenizer, asked, length)) == length
    with pytest.raises(DataError, match=rf"everyday-12.*{length} tokens.*max_prompt_tokens.*{length - 1}"):
        encode_prompt(tokenizer, asked, length - 1)
