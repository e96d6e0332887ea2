"""Supervised fine-tuning through TRL's SFTTrainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rlhf_cli.learner.settings import trainer_settings
from rlhf_cli.policy.load import load_model, load_tokenizer, lora_config, train_only_last_layers
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Message

OnStep = Callable[[int, int], None]
"""Called with steps done and steps in all."""


class StepCallback(TrainerCallback):
    """Reports progress of a trainer to a plain function."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_step(state.global_step, state.max_steps)


def train_sft(
    path: str,
    recipe: Recipe,
    rows: Sequence[tuple[Message, ...] | str],
    heldout: Sequence[tuple[Message, ...] | str],
    scratch: Path,
    on_step: OnStep,
) -> dict[str, float]:
    """Fine-tune the model at `path` and leave the result, adapters merged in, in `scratch / "model"`.

    The loss is on the last assistant turn of a conversation, or on all of a raw text.

    Returns:
        `loss`, and `heldout_loss` where there are held-out rows; nats per token.
    """
    section = recipe.sft
    assert section is not None
    config = SFTConfig(
        **trainer_settings(recipe, scratch / "trainer"),
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=section.warmup_ratio,
        weight_decay=section.weight_decay,
        max_length=section.max_length,
        save_strategy="no",
        dataset_num_proc=None,
    )
    model = load_model(path)
    if recipe.model.last_layers is not None:
        train_only_last_layers(model, recipe.model.last_layers)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(heldout) if heldout else None,
        processing_class=load_tokenizer(path),
        peft_config=lora_config(recipe.model, "CAUSAL_LM"),
        callbacks=[StepCallback(on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    result = {"loss": trainer.train().training_loss}
    if heldout:
        result["heldout_loss"] = trainer.evaluate()["eval_loss"]
    save_merged(trainer.model, trainer.processing_class, scratch / "model")
    shutil.rmtree(scratch / "trainer", ignore_errors=True)
    return result


def save_merged(model: Any, tokenizer: Any, path: Path) -> None:
    """Save a model without its adapters, their effect merged into the weights, beside its tokenizer."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _dataset(rows: Sequence[tuple[Message, ...] | str]) -> Dataset:
    if isinstance(rows[0], str):
        return Dataset.from_list([{"text": row} for row in rows])
    turns = [[{"role": m.role, "content": m.content} for m in row] for row in rows if not isinstance(row, str)]
    return Dataset.from_list([{"prompt": t[:-1], "completion": t[-1:]} for t in turns])
