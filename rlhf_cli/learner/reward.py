"""Fitting a reward model to votes: TRL's RewardTrainer as the engine, with the likelihood of whole win matrices."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer

from rlhf_cli.errors import Diverged
from rlhf_cli.learner.groups import by_group, stack_wins
from rlhf_cli.learner.losses import vote_agreement, win_matrix_nll
from rlhf_cli.learner.settings import trainer_settings
from rlhf_cli.learner.sft import OnStep, StepCallback, save_merged
from rlhf_cli.policy.load import load_tokenizer, lora_config, train_only_last_layers
from rlhf_cli.policy.scoring import encode_answer, load_reward_model, pad_right
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.votes import VotedGroup


class GroupRewardTrainer(RewardTrainer):
    """Each completion goes through the model once, whatever the number of its pairs; votes need not be pairs."""

    def __init__(self, groups: Sequence[VotedGroup], max_length: int, centering: float, **kwargs: Any) -> None:
        self.groups, self.group_max_length, self.centering = groups, max_length, centering
        # TRL insists on a dataset; this row only satisfies its constructor, the data are `groups`.
        super().__init__(train_dataset=Dataset.from_list([{"chosen_ids": [0], "rejected_ids": [0]}]), **kwargs)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.args.seed)
        loader: DataLoader[Any] = DataLoader(
            self.groups,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            shuffle=True,
            generator=generator,
            collate_fn=self.collate,
        )
        return loader

    def collate(self, groups: Sequence[VotedGroup]) -> dict[str, Tensor]:
        """Tensors of a batch of groups, every completion a row."""
        device, tokenizer = self.accelerator.device, self.processing_class
        rows = [encode_answer(tokenizer, g.prompt, c, self.group_max_length) for g in groups for c in g.completions]
        wins_BGG, is_completion_BG = stack_wins([g.wins for g in groups], device)
        return {
            **pad_right(rows, int(tokenizer.pad_token_id), device),
            "wins_BGG": wins_BGG,
            "is_completion_BG": is_completion_BG,
        }

    def scores(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Rewards, shape (B, G)."""
        logits_R1 = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return by_group(logits_R1[:, 0].float(), inputs["is_completion_BG"])

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        scores_BG = self.scores(model, inputs)
        loss = win_matrix_nll(scores_BG, inputs["wins_BGG"])
        mean_B = scores_BG.sum(1) / inputs["is_completion_BG"].sum(1)
        loss = loss + self.centering * mean_B.square().mean()
        if not torch.isfinite(loss):
            raise Diverged("the loss of the reward model is not finite; lower train_rm.learning_rate")
        return loss

    @torch.no_grad()
    def accuracy(self, groups: Sequence[VotedGroup]) -> float:
        """Share of held-out votes whose winner has the higher reward."""
        self.model.eval()
        size = self.args.per_device_train_batch_size
        agreed, votes = 0.0, 0.0
        for start in range(0, len(groups), size):
            inputs = self.collate(groups[start : start + size])
            count = float(inputs["wins_BGG"].sum())
            agreed += count * float(vote_agreement(self.scores(self.model, inputs), inputs["wins_BGG"]))
            votes += count
        return agreed / votes


def train_reward_model(
    path: str,
    recipe: Recipe,
    groups: Sequence[VotedGroup],
    heldout: Sequence[VotedGroup],
    scratch: Path,
    on_step: OnStep,
) -> dict[str, float]:
    """Fit a scalar head and backbone to all votes; the result, adapters merged in, is left in `scratch / "model"`.

    Returns:
        `loss`, `accuracy` on the training votes and `heldout_accuracy` where there are held-out groups.
    """
    section = recipe.train_rm
    assert section is not None
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = "right"
    torch.manual_seed(recipe.seed)  # the head starts random
    model = load_reward_model(path)
    model.config.pad_token_id = tokenizer.pad_token_id
    if recipe.model.last_layers is not None:
        train_only_last_layers(model, recipe.model.last_layers)
        model.score.requires_grad_(True)
    trainer = GroupRewardTrainer(
        groups,
        section.max_length,
        section.centering,
        model=model,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model, "SEQ_CLS"),
        callbacks=[StepCallback(on_step)],
        args=RewardConfig(
            **trainer_settings(recipe, scratch / "trainer"),
            num_train_epochs=section.epochs,
            max_steps=section.max_steps or -1,
            per_device_train_batch_size=section.batch_size,
            learning_rate=section.learning_rate,
            lr_scheduler_type="cosine",
            save_strategy="no",
            remove_unused_columns=False,
        ),
    )
    result = {"loss": trainer.train().training_loss, "accuracy": trainer.accuracy(groups)}
    if heldout:
        result["heldout_accuracy"] = trainer.accuracy(heldout)
    save_merged(trainer.model, tokenizer, scratch / "model")
    shutil.rmtree(scratch / "trainer", ignore_errors=True)
    return result
