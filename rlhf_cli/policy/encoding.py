"""Prompt and completion as the tokens that a reward model reads; what does not fit is cut by one rule and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.types import Message


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text for the model; `types` where it tells segments apart, `cut` tokens are missing at the start."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None
    cut: int


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: str, max_length: int
) -> Encoded:
    """A completion after its prompt, through the chat template; for an encoder, the two as a pair of plain texts.

    A longer one than `max_length` tokens loses the start of its prompt, then the start of its completion. Without a
    prompt it is the completion alone, as plain text.
    """
    context = "\n".join(m.content for m in prompt if m.content.strip())
    if is_encoder(tokenizer):
        return _encode_pair(tokenizer, (context, completion) if context else (completion,), max_length)
    if tokenizer.chat_template and context:
        turns = [{"role": m.role, "content": m.content} for m in prompt]
        turns.append({"role": "assistant", "content": completion})
        ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    else:
        ids = _plain(tokenizer, "\n".join(filter(None, [context, completion])))
    return Encoded(tuple(ids[-max_length:]), None, max(0, len(ids) - max_length))


def encode_comparison(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], first: str, second: str, max_length: int
) -> Encoded:
    """Two completions, in this order, after their prompt.

    A longer one than `max_length` tokens loses the start of its prompt, then the start of the longer completion.

    Raises:
        DataError: Not even empty texts fit into `max_length`.
    """
    texts, cut = [_conversation(prompt), first, second], 0
    while (over := len((encoded := _comparison(tokenizer, *texts)).ids) - max_length) > 0:
        if not any(texts):
            raise DataError(
                f"max_length {max_length} is too short to compare two completions; raise train_rm.max_length"
            )
        texts, cut = _shorten(tokenizer, texts, over), cut + over
    return Encoded(encoded.ids, encoded.types, cut)


def is_encoder(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts of this tokenizer are framed by [CLS] and [SEP] rather than written in turns."""
    return not tokenizer.chat_template and None not in (tokenizer.cls_token_id, tokenizer.sep_token_id)


def longest(tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """`wanted` tokens, or what the model has positions for."""
    return min(wanted, int(tokenizer.model_max_length))


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, shape (R, longest row); the head reads the last token that is not padding."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
    }


def batch_of(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the model is called with for these rows."""
    batch = pad_right([row.ids for row in rows], pad_id, device)
    if rows[0].types is not None:
        batch["token_type_ids"] = pad_right([row.types or () for row in rows], 0, device)["input_ids"]
    return batch


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokenizer(text, verbose=False)["input_ids"], *end]


def _encode_pair(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], max_length: int) -> Encoded:
    """The texts framed as the encoder knows them; only their own tokens are ever cut, never the frame."""
    framed = tokenizer(*texts, return_special_tokens_mask=True, verbose=False)
    ids, special = framed["input_ids"], framed["special_tokens_mask"]
    over = max(0, len(ids) - max_length)
    cut = set([place for place, is_special in enumerate(special) if not is_special][:over])
    kept = [place for place in range(len(ids)) if place not in cut]
    types = framed.get("token_type_ids")
    return Encoded(tuple(ids[k] for k in kept), types and tuple(types[k] for k in kept), len(cut))


def _conversation(prompt: Sequence[Message]) -> str:
    turns = [m for m in prompt if m.content.strip()]
    return turns[0].content if len(turns) == 1 else "\n".join(f"{m.role}: {m.content}" for m in turns)


def _comparison(tokenizer: PreTrainedTokenizerBase, context: str, first: str, second: str) -> Encoded:
    if is_encoder(tokenizer):
        before = f"{context} {tokenizer.sep_token} {first}" if context else first
        framed = tokenizer(before, second, verbose=False)
        types = framed.get("token_type_ids")
        return Encoded(tuple(framed["input_ids"]), types and tuple(types), 0)
    parts = [f"Prompt:\n{context}"] if context else []
    text = "\n\n".join([*parts, f"Answer A:\n{first}", f"Answer B:\n{second}", "Which answer is better?"])
    if not tokenizer.chat_template:
        return Encoded(tuple(_plain(tokenizer, text)), None, 0)
    turns = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    return Encoded(tuple(ids), None, 0)


def _shorten(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], over: int) -> list[str]:
    """Without about `over` tokens: the start of the first text; once that is empty, of whichever other is longer."""
    starts = [
        [start for start, _ in tokenizer(t, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
        for t in texts
    ]
    left = [len(s) for s in starts]
    for _ in range(over if not left[0] else min(over, left[0])):
        k = 0 if left[0] else 1 if left[1] >= left[2] else 2
        left[k] = max(0, left[k] - 1)
    return [t[s[len(s) - n] :] if n else "" for t, s, n in zip(texts, starts, left, strict=True)]
