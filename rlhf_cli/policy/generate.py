"""Sampling completions, and what a model thinks of given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.errors import DataError
from rlhf_cli.types import Prompt


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion as token ids; `ended` where the model stopped by itself."""

    token_ids: tuple[int, ...]
    ended: bool


class _RowTemperature(LogitsProcessor):
    """Divides each row's logits by its own temperature, so that one batch can hold main agent and enhancer."""

    def __init__(self, temperature_B: Tensor) -> None:
        self.temperature_B1 = temperature_B[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature_B1


class _RowTopP(LogitsProcessor):
    """Leaves each row the smallest set of its likeliest tokens that has its own share of the probability.

    As `TopPLogitsWarper` of transformers, which has one share for all rows.
    """

    def __init__(self, top_p_B: Tensor) -> None:
        self.rest_B1 = 1 - top_p_B[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sorted_BV, order_BV = scores.sort()
        unlikely_BV = sorted_BV.softmax(-1).cumsum(-1) <= self.rest_B1
        unlikely_BV[:, -1] = False
        return scores.masked_fill(unlikely_BV.scatter(1, order_BV, unlikely_BV), -torch.inf)


class _Draw(LogitsProcessor):
    """Draws the next token by inverting the distribution function, and leaves only that token possible.

    One uniform number a row; `torch.multinomial` draws one for every token of the vocabulary (seen: a quarter of the
    time spent generating on CPU).
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        uniform_B1 = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
        drawn_B1 = drawn_B1.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn_B1, 0.0)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
    """Token ids that the policy sees before its answer: the chat template where the tokenizer has one.

    Raises:
        DataError: Longer than `max_tokens`; a truncated question would be answered as another question.
    """
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer("\n".join(m["content"] for m in messages) + "\n")["input_ids"]
    if len(ids) > max_tokens:
        raise DataError(
            f"prompt '{prompt.id}' has {len(ids)} tokens, data.max_prompt_tokens allows {max_tokens}; "
            "shorten it or raise the limit (the model's context must hold it too)"
        )
    return tuple(ids)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    max_new_tokens: int,
    top_p: float | Sequence[float],
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int = 64,
) -> list[Sampled]:
    """Sample one completion per row.

    Args:
        prompt_ids: One prompt per row, shape (B, ragged).
        temperatures: One per row, shape (B,); 0 takes the most likely token.
        top_p: One per row, or one for all.
        seed: The same seed, weights and rows give the same completions on the same machine.
    """
    device = model.device
    sampled: list[Sampled] = []
    shares = [top_p] * len(prompt_ids) if isinstance(top_p, float) else top_p
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(prompt_ids), batch_size):
            prompts = prompt_ids[start : start + batch_size]
            row_temperatures = temperatures[start : start + batch_size]
            ids_BT, mask_BT = pad_left(prompts, pad_id, device)
            # Temperature 0 as a very cold draw keeps greedy and sampled rows in one batch.
            temperature_B = torch.tensor(row_temperatures, device=device).clamp(min=1e-4)
            top_p_B = torch.tensor(shares[start : start + batch_size], device=device)
            top_p_only = [_RowTopP(top_p_B)] if bool((top_p_B < 1).any()) else []
            out_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                logits_processor=LogitsProcessorList([_RowTemperature(temperature_B), *top_p_only, _Draw()]),
                generation_config=GenerationConfig(
                    do_sample=False,  # the one token that is left is the most likely one
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(stop_ids),
                    pad_token_id=pad_id,
                ),
            )
            sampled += [_trim(row, stop_ids) for row in out_BT[:, ids_BT.shape[1] :].tolist()]
    return sampled


@torch.no_grad()
def token_logps(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int = 32,
) -> list[tuple[float, ...]]:
    """Natural-log probability of every completion token given its prompt, one ragged row per completion."""
    result: list[tuple[float, ...]] = []
    for start in range(0, len(prompt_ids), batch_size):
        completions = completion_ids[start : start + batch_size]
        rows = pack(prompt_ids[start : start + batch_size], completions, pad_id, model.device)
        logp_BT = completion_logps(model, **rows)
        result += [tuple(row[len(row) - len(c) :].tolist()) for row, c in zip(logp_BT.cpu(), completions, strict=True)]
    return result


def pack(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Rows of prompt and completion as the tensors that `completion_logps` takes: ids_BT, mask_BT and lengths_B."""
    rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    ids_BT, mask_BT = pad_left(rows, pad_id, device)
    lengths_B = torch.tensor([len(c) for c in completion_ids], device=device)
    return {"ids_BT": ids_BT, "mask_BT": mask_BT, "lengths_B": lengths_B}


def completion_logps(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Log-probabilities of completion tokens, right-aligned, shape (B, longest completion); 0 on padding."""
    logits_BTV, is_completion_BT = completion_logits(model, ids_BT, mask_BT, lengths_B)
    return chosen_logps(logits_BTV, ids_BT) * is_completion_BT


def completion_logits(
    model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor]:
    """What completion tokens are drawn from, right-aligned, and which places of it are completion.

    Rows are padded on the left, so that all completions end in the same column and only those columns go through the
    vocabulary projection: the prompt's logits are never computed.
    """
    longest = max(1, int(lengths_B.max()))
    logits_BTV = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions(mask_BT),
        logits_to_keep=longest + 1,
        use_cache=False,
    ).logits[:, :-1]
    return logits_BTV.float(), torch.arange(longest, device=ids_BT.device) >= longest - lengths_B[:, None]


def chosen_logps(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Log-probabilities of the last tokens of `ids_BT` under the logits that they were drawn from."""
    targets_BT = ids_BT[:, -logits_BTV.shape[1] :]
    return logits_BTV.gather(2, targets_BT[:, :, None])[:, :, 0] - logits_BTV.logsumexp(2)


def positions(mask_BT: Tensor) -> Tensor:
    """Where each token stands in its own row, padding on the left not counted."""
    return (mask_BT.cumsum(1) - 1).clamp(min=0)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, shape (B, longest row). Masks come from lengths: pad and eos may be one token."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BT, mask_BT


def _trim(row: list[int], stop_ids: Sequence[int]) -> Sampled:
    for position, token in enumerate(row):
        if token in stop_ids:
            return Sampled(tuple(row[: position + 1]), ended=True)
    return Sampled(tuple(row), ended=False)
