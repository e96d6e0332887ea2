"""Supervised fine-tuning through TRL's SFTTrainer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from rlhf_cli.errors import DataError
from rlhf_cli.learner.checkpoints import Checkpoint, Checkpoints, train
from rlhf_cli.learner.early_stop import EarlyStop
from rlhf_cli.learner.settings import trainer_settings
from rlhf_cli.learner.watch import OnRow, OnStep, Watch
from rlhf_cli.policy.generate import encode_prompt, sample
from rlhf_cli.policy.load import (
    load_model,
    load_tokenizer,
    lora_config,
    precision,
    stop_token_ids,
    train_only_last_layers,
)
from rlhf_cli.recipe.schema import Recipe, Sft
from rlhf_cli.types import Message, Prompt

SftRow = tuple[Message, ...] | str
"""A conversation that ends with the answer to learn, or a raw text."""

IGNORED = -100
SAMPLE_TOKENS = 64
TEXT_START_TOKENS = 16
"""So much of a raw text is given, the model goes on from there."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as tokens, and what happened to those that did not fit."""

    dataset: Dataset
    """`input_ids`, and `labels` with -100 where nothing is learned."""
    truncated: int
    """Rows whose end was cut off."""
    dropped: int
    """Rows of which nothing to learn was left: the prompt alone fills `max_length`."""


@dataclass(frozen=True, slots=True)
class SftResult:
    figures: dict[str, float | str | None]
    samples: list[dict[str, str]]
    """`prompt`, `answer` (of the data), `before` and `after`."""


def train_sft(
    path: str,
    recipe: Recipe,
    rows: Sequence[SftRow],
    heldout: Sequence[SftRow],
    target: Path,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    on_step: OnStep,
    on_row: OnRow,
) -> SftResult:
    """Fine-tune the model at `path` and leave the result, adapters merged in, in `target`.

    The loss is on the last assistant turn of a conversation, or on every token with `loss_on: all`.

    Args:
        checkpoint: What to go on from; None starts at the beginning.
    """
    section = recipe.sft
    assert section is not None
    tokenizer = load_tokenizer(path)
    encoded = encode_rows(tokenizer, rows, section)
    encoded_heldout = encode_rows(tokenizer, heldout, section) if heldout else None
    set_seed(recipe.seed)  # adapters start random
    model = load_model(path)
    if recipe.model.last_layers is not None:
        train_only_last_layers(model, recipe.model.last_layers)
    trainer = SFTTrainer(
        model=model,
        args=_config(recipe, section, checkpoints),
        train_dataset=encoded.dataset,
        eval_dataset=encoded_heldout.dataset if encoded_heldout else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model, "CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    watch = Watch("sft", _Figures(), lambda: heldout_loss(trainer), on_step, on_row)
    trainer.add_callback(watch)
    shown = [*heldout, *rows][: section.samples]
    with trainer.accelerator.autocast():
        before = answer(trainer.model, tokenizer, shown, section.max_length)
    first = heldout_loss(trainer) if heldout else None
    stop = EarlyStop(section.stop_early, trainer.model, watch.look) if section.stop_early else None
    if stop is not None:
        trainer.add_callback(stop)
        checkpoints.extra = stop.save
        if checkpoint is not None:
            stop.load(checkpoint.path)
    trainer.add_callback(checkpoints)
    train(trainer, checkpoint)
    if stop is not None:
        stop.keep_best()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    figures: dict[str, float | str | None] = {
        "steps": trainer.state.global_step,
        "loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        **({"heldout_loss_before": first, "heldout_loss": heldout_loss(trainer)} if heldout else {}),
        **({"best_step": stop.best_step} if stop is not None else {}),
        "truncated": encoded.truncated,
        "dropped": encoded.dropped,
    }
    with trainer.accelerator.autocast():
        after = answer(trainer.model, tokenizer, shown, section.max_length)
    save_merged(trainer.model, tokenizer, target)
    return SftResult(figures, _side_by_side(shown, before, after))


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow], section: Sft) -> Encoded:
    """Token ids and labels of every row; one longer than `max_length` loses its end.

    Raises:
        DataError: No row has room for anything to learn.
    """
    kept, truncated, dropped = [], 0, 0
    for row in rows:
        ids, start = _tokens(tokenizer, row)
        learned_from = start if section.loss_on == "completion" else 0
        truncated += len(ids) > section.max_length
        labels = [IGNORED] * learned_from + ids[learned_from:]
        # The first token of a row is never predicted, so it alone is nothing to learn.
        if all(label == IGNORED for label in labels[1 : section.max_length]):
            dropped += 1
        else:
            kept.append({"input_ids": ids[: section.max_length], "labels": labels[: section.max_length]})
    if not kept:
        raise DataError(f"no row leaves room for its answer in the {section.max_length} tokens of sft.max_length")
    return Encoded(Dataset.from_list(kept), truncated, dropped)


def _tokens(tokenizer: PreTrainedTokenizerBase, row: SftRow) -> tuple[list[int], int]:
    """Token ids of a row, and where its answer starts; a raw text is all answer."""
    if isinstance(row, str):
        return [*tokenizer(row, verbose=False)["input_ids"], tokenizer.eos_token_id], 0
    prompt = list(encode_prompt(tokenizer, Prompt("", row[:-1]), 10**9))
    if not tokenizer.chat_template:
        answer_ids = tokenizer(row[-1].content, add_special_tokens=False, verbose=False)["input_ids"]
        return [*prompt, *answer_ids, tokenizer.eos_token_id], len(prompt)
    turns = [{"role": m.role, "content": m.content} for m in row]
    ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    # A template may write a prompt otherwise once it is answered; what they share is what the policy will be given.
    return ids, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))


def _config(recipe: Recipe, section: Sft, checkpoints: Checkpoints) -> SFTConfig:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = precision(recipe.compute.precision, device) == torch.bfloat16
    return SFTConfig(
        **{**trainer_settings(recipe, checkpoints.folder), **checkpoints.arguments, "bf16": bf16},
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.accumulate,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule if section.schedule != "constant" else "constant_with_warmup",
        warmup_steps=section.warmup_ratio,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        max_length=section.max_length,
        # Without a padding mask and with positions that start anew, attention stays inside each packed text.
        packing=section.packing,
        packing_strategy="bfd",
        logging_nan_inf_filter=False,
        dataset_num_proc=None,
    )


class _Figures:
    """Of a step, from what TRL logs: it counts tokens over the whole training."""

    def __init__(self) -> None:
        self._tokens = 0.0

    def __call__(self, logs: Mapping[str, float], seconds: float) -> dict[str, float]:
        tokens, self._tokens = logs["num_tokens"] - self._tokens, logs["num_tokens"]
        return {"accuracy": logs["mean_token_accuracy"], "tokens_per_s": tokens / seconds}


@torch.no_grad()
def heldout_loss(trainer: SFTTrainer) -> float:
    """Mean negative log-likelihood of the held-out tokens that are learned from, in nats."""
    was_training = trainer.model.training
    trainer.model.eval()
    total, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        inputs = trainer._prepare_inputs(batch)
        tokens += int((inputs["labels"][..., 1:] != IGNORED).sum())
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(1))
        total += float(loss)
    trainer.model.train(was_training)
    trainer._metrics["eval"].clear()
    return total / tokens if tokens else math.nan


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow], max_length: int) -> list[str]:
    """The most likely answer to each prompt, or how a raw text goes on from its start."""
    if not rows:
        return []
    prompts = [_asked(tokenizer, row)[-max_length:] for row in rows]
    was_training = model.training
    model.eval()
    sampled = sample(
        model,
        prompts,
        [0.0] * len(prompts),
        max_new_tokens=SAMPLE_TOKENS,
        top_p=1.0,
        stop_ids=stop_token_ids(tokenizer, model),
        pad_id=int(tokenizer.pad_token_id),
        seed=0,
        batch_size=8,
    )
    model.train(was_training)
    return [str(tokenizer.decode(s.token_ids, skip_special_tokens=True)).strip() for s in sampled]


def _asked(tokenizer: PreTrainedTokenizerBase, row: SftRow) -> list[int]:
    ids, start = _tokens(tokenizer, row)
    return ids[: start or max(1, min(TEXT_START_TOKENS, len(ids) // 2))]


def _side_by_side(rows: Sequence[SftRow], before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    texts = [("", row) if isinstance(row, str) else (row[-2].content, row[-1].content) for row in rows]
    return [
        {"prompt": prompt, "answer": given, "before": old, "after": new}
        for (prompt, given), old, new in zip(texts, before, after, strict=True)
    ]


def save_merged(model: Any, tokenizer: Any, path: Path) -> None:
    """Save a model without its adapters, their effect merged into the weights, beside its tokenizer."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
