"""Fitting a reward model to votes: TRL's RewardTrainer as the engine, with the likelihood of whole win matrices.

    loss = sum over votes of [ -log sigmoid(r_winner - r_loser) + c (r_winner + r_loser)^2 ] / number of votes

Every vote counts the same, whether it came as a pair, in a list of votes or in a matrix, so what says the same gives
the same gradient. A text goes through the model once, whatever the number of its pairs.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer

from rlhf_cli.errors import Diverged
from rlhf_cli.learner.batches import plan_batches
from rlhf_cli.learner.checkpoints import Checkpoint, Checkpoints, train
from rlhf_cli.learner.early_stop import EarlyStop
from rlhf_cli.learner.groups import Example, by_group, stack_wins
from rlhf_cli.learner.losses import vote_agreement, votes_nll, votes_offset
from rlhf_cli.learner.pairwise import comparisons, order_scores, orders_agree
from rlhf_cli.learner.settings import trainer_settings
from rlhf_cli.learner.watch import OnRow, OnStep, Watch
from rlhf_cli.policy.checks import check_head
from rlhf_cli.policy.encoding import batch_of, encode_answer, longest
from rlhf_cli.policy.heads import fresh_heads, head_name, save_heads, set_dropout
from rlhf_cli.policy.load import load_tokenizer, lora_config, own_pad, train_only_last_layers
from rlhf_cli.policy.scoring import About, load_reward_model, weights_version, write_about
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.votes import VotedGroup

LOOKED_AT = 200
"""Training examples whose accuracy is reported at the end."""

ToScores = Callable[[Tensor, Tensor], Tensor]
"""From logits_RK and is_completion_BG to scores_KBG."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the model makes of examples; the loss is in nats per vote."""

    loss: float
    accuracy: float
    orders_agree: float


class VotesTrainer(RewardTrainer):
    """Takes its batches as planned, and the likelihood of their votes as loss; K counts heads, or orders of reading."""

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Sequence[list[int]],
        to_scores: ToScores,
        centering: float,
        **kwargs: Any,
    ) -> None:
        self.examples, self.plan, self.to_scores, self.centering = examples, plan, to_scores, centering
        # TRL insists on a dataset; this row only satisfies its constructor, the data are `examples`.
        super().__init__(train_dataset=Dataset.from_list([{"chosen_ids": [0], "rejected_ids": [0]}]), **kwargs)
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.agreed_votes, self.votes = 0.0, 0.0
        """Of all batches since the last step that was logged."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=self.plan,
            collate_fn=self.collate,
        )
        return loader

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tensors of a batch, every text a row; R counts the texts of all B examples."""
        device = self.accelerator.device
        wins_BGG, is_completion_BG = stack_wins([e.wins for e in examples], device)
        rows = [row for e in examples for row in e.rows]
        return {
            **batch_of(rows, int(self.processing_class.pad_token_id), device),
            "wins_BGG": wins_BGG,
            "is_completion_BG": is_completion_BG,
            "weights_KB": torch.tensor([e.weights for e in examples], device=device).T,
        }

    def scores(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Rewards by every head, shape (K, B, G)."""
        read = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}
        return self.to_scores(model(**read).logits, inputs["is_completion_BG"])

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: Any) -> Tensor:
        """Votes of all batches that make one step, so that accumulating them is the same as one large batch."""
        return torch.stack([batch["wins_BGG"].sum() for batch in batch_samples]).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        scores_KBG, wins_BGG = self.scores(model, inputs), inputs["wins_BGG"]
        votes = wins_BGG.sum() if num_items_in_batch is None else num_items_in_batch
        nll_KB = votes_nll(scores_KBG, wins_BGG)
        if self.centering:
            nll_KB = nll_KB + self.centering * votes_offset(scores_KBG, wins_BGG)
        loss = (inputs["weights_KB"] * nll_KB).sum(1).mean() / votes
        if not torch.isfinite(loss):
            raise Diverged("the loss of the reward model is not finite; lower train_rm.learning_rate")
        with torch.no_grad():
            self.agreed_votes += float(vote_agreement(scores_KBG.mean(0), wins_BGG) * wins_BGG.sum())
            self.votes += float(wins_BGG.sum())
        return loss

    def figures(self, logs: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Share of the votes since the last call that the rewards agreed with."""
        accuracy = self.agreed_votes / self.votes
        self.agreed_votes, self.votes = 0.0, 0.0
        return {"accuracy": accuracy}

    @torch.no_grad()
    def look(self, examples: Sequence[Example]) -> Look:
        """How well the mean over the heads, or over the orders of reading, says what the votes say."""
        self.model.eval()
        size = self.args.per_device_train_batch_size
        nll, agreed, votes, consistent = 0.0, 0.0, 0.0, 0.0
        by_length = sorted(examples, key=lambda e: e.tokens)
        for start in range(0, len(by_length), size):
            inputs = self.collate(by_length[start : start + size])
            scores_KBG, wins_BGG = self.scores(self.model, inputs), inputs["wins_BGG"]
            count = float(wins_BGG.sum())
            nll += float(votes_nll(scores_KBG.mean(0), wins_BGG).sum())
            agreed += count * float(vote_agreement(scores_KBG.mean(0), wins_BGG))
            votes += count
            consistent += float(orders_agree(scores_KBG).sum()) if len(scores_KBG) == 2 else 0.0
        return Look(nll / votes, agreed / votes, consistent / len(examples))


def answers(
    tokenizer: Any, groups: Sequence[VotedGroup], max_length: int, heads: int | None, seed: int
) -> list[Example]:
    """One example per group: its completions, each after the prompt, and what its votes weigh for each head."""
    return [
        Example(
            tuple(encode_answer(tokenizer, group.prompt, c, max_length) for c in group.completions),
            group.wins,
            bootstrap_weights(group, heads, seed) if heads else (1.0,),
        )
        for group in groups
    ]


def bootstrap_weights(group: VotedGroup, heads: int, seed: int) -> tuple[float, ...]:
    """What a group weighs for each head of an ensemble: exponential, of mean 1, drawn from the group's own content.

    Source: Rubin (1981), "The Bayesian Bootstrap".
    """
    content = "\0".join([*(m.content for m in group.prompt), *group.completions, str(group.wins.wins.tolist())])
    key = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
    return tuple(np.random.default_rng([seed, key]).exponential(size=heads).tolist())


def head_scores(logits_RK: Tensor, is_completion_BG: Tensor) -> Tensor:
    """What each head gives to each completion, shape (K, B, G)."""
    return torch.stack([by_group(logits_R, is_completion_BG) for logits_R in logits_RK.unbind(1)])


def train_reward_model(
    path: str,
    recipe: Recipe,
    groups: Sequence[VotedGroup],
    heldout: Sequence[VotedGroup],
    scratch: Path,
    on_step: OnStep,
    checkpoints: Checkpoints | None = None,
    checkpoint: Checkpoint | None = None,
    on_row: OnRow = lambda *_: None,
) -> dict[str, float]:
    """Fit head and backbone to all votes; the result, adapters merged in, is left in `scratch / "model"`.

    Args:
        checkpoints: Where to keep what an interrupted training goes on from; nowhere when left out.
        checkpoint: What to go on from.

    Returns:
        `loss` in training; `accuracy` on some of the training votes; `steps`; `truncated`, the groups (of a pairwise
        model, the pairs) with a text that was cut; with held-out groups `heldout_loss`, `heldout_accuracy` and
        `heldout_truncated`; `order_consistency` of a pairwise model (on held-out pairs where there are any).
    """
    section = recipe.train_rm
    assert section is not None
    tokenizer = load_tokenizer(path)
    torch.manual_seed(recipe.seed)  # the head starts random
    model = load_reward_model(path)
    own_pad(model, tokenizer)
    if section.ensemble:
        fresh_heads(model, section.ensemble)
    set_dropout(model, section.dropout)
    if recipe.model.last_layers is not None:
        train_only_last_layers(model, recipe.model.last_layers)
    adapters = lora_config(recipe.model, "SEQ_CLS")
    if adapters is not None:
        adapters.modules_to_save = [head_name(model).split(".")[0]]  # a head that is not saved is a random head
        adapters.lora_dropout = 0.0
    length = longest(tokenizer, section.max_length)

    def examples_of(some: Sequence[VotedGroup]) -> list[Example]:
        if section.kind == "pairwise":
            return comparisons(tokenizer, some, length)
        return answers(tokenizer, some, length, section.ensemble, recipe.seed)

    examples, kept_apart = examples_of(groups), examples_of(heldout)
    by_length = sorted((row for e in examples for row in e.rows), key=lambda row: len(row.ids))
    if by_length[0].ids != by_length[-1].ids:
        check_head(model, tokenizer, [by_length[0], by_length[-1]])
    plan = plan_batches(
        [e.tokens for e in examples],
        section.batch_size,
        section.epochs,
        recipe.seed,
        section.max_steps and section.max_steps * section.accumulate,
    )
    arguments = (
        checkpoints.arguments if checkpoints else {"output_dir": str(scratch / "trainer"), "save_strategy": "no"}
    )
    trainer = VotesTrainer(
        examples,
        plan,
        order_scores if section.kind == "pairwise" else head_scores,
        0.0 if section.kind == "pairwise" else section.centering,
        model=model,
        processing_class=tokenizer,
        peft_config=adapters,
        args=RewardConfig(
            **{**trainer_settings(recipe, scratch / "trainer"), **arguments},
            num_train_epochs=1,  # the plan holds all passes
            per_device_train_batch_size=section.batch_size,
            gradient_accumulation_steps=section.accumulate,
            learning_rate=section.learning_rate,
            lr_scheduler_type="constant_with_warmup" if section.schedule == "constant" else section.schedule,
            warmup_steps=section.warmup_ratio,
            weight_decay=section.weight_decay,
            max_grad_norm=section.max_grad_norm,
            disable_dropout=False,  # set above, by the recipe
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
        ),
    )
    watch = Watch("train_rm", trainer.figures, lambda: trainer.look(kept_apart).loss, on_step, on_row)
    trainer.add_callback(watch)
    early = None
    if section.stop_early is not None:
        early = EarlyStop(section.stop_early, trainer.model, watch.look)
        trainer.add_callback(early)
        if checkpoint is not None:
            early.load(checkpoint.path)
    if checkpoints is not None:
        checkpoints.extra = early.save if early is not None else checkpoints.extra
        trainer.add_callback(checkpoints)  # the last one: a checkpoint holds what was just looked at
    train(trainer, checkpoint)
    if early is not None:
        early.keep_best()
    seen = trainer.look(examples[:: max(1, len(examples) // LOOKED_AT)])
    result = {
        "loss": statistics.fmean(log["loss"] for log in trainer.state.log_history if "loss" in log),
        "accuracy": seen.accuracy,
        "steps": trainer.state.global_step,
        "truncated": _truncated(examples),
    }
    if kept_apart:
        seen = trainer.look(kept_apart)
        truncated = _truncated(kept_apart)
        result |= {"heldout_loss": seen.loss, "heldout_accuracy": seen.accuracy, "heldout_truncated": truncated}
    if section.kind == "pairwise":
        result["order_consistency"] = seen.orders_agree
    about = About(kind=section.kind, max_length=length, ensemble=section.ensemble)
    _save(trainer, scratch / "model", about)
    shutil.rmtree(scratch / "trainer", ignore_errors=True)
    return result


def _truncated(examples: Sequence[Example]) -> int:
    return sum(any(row.cut for row in e.rows) for e in examples)


def _save(trainer: VotesTrainer, folder: Path, about: About) -> None:
    model = trainer.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if about.ensemble:
        save_heads(model, folder)
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    write_about(folder, About(about.kind, about.temperature, about.max_length, about.ensemble, weights_version(folder)))
