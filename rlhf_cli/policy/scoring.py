"""A reward model in use: a number for a completion of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.policy.load import locate
from rlhf_cli.types import Message


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: str, max_length: int
) -> list[int]:
    """Token ids of a whole conversation; one longer than `max_length` loses the start of its prompt."""
    if tokenizer.chat_template:
        turns = [{"role": m.role, "content": m.content} for m in prompt]
        turns.append({"role": "assistant", "content": completion})
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    else:
        text = "\n".join([*(m.content for m in prompt), completion])
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return list(ids)[-max_length:]


def load_reward_model(path: str) -> PreTrainedModel:
    """A scalar head on the backbone found at `path`; a fresh head where there is none yet."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        locate(path), num_labels=1, dtype=torch.float32
    )
    return model


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, shape (R, longest row); the head reads the last token that is not padding."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device),
    }


class RewardModel:
    """Scores completions with a trained reward model; higher is better, the zero point means nothing."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length

    @torch.no_grad()
    def score(self, prompt: Sequence[Message], completions: Sequence[str]) -> list[float]:
        """One reward per completion."""
        rows = [encode_answer(self.tokenizer, prompt, c, self.max_length) for c in completions]
        batch = pad_right(rows, int(self.tokenizer.pad_token_id), self.model.device)
        return [float(x) for x in self.model(**batch).logits[:, 0]]
