"""What we rely on in TRL and transformers, so that an upgrade that changes it fails here and not in somebody's run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from stream_world import Disk, People, stream
from tiny_world import MakeRecipe, prompt
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf_cli.errors import Diverged
from rlhf_cli.journal.metrics import MetricsWriter
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.learner import sft as sft_module
from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.checkpoints import Checkpoints
from rlhf_cli.learner.dpo import GroupDPOTrainer
from rlhf_cli.learner.reward import train_reward_model
from rlhf_cli.learner.sft import train_sft
from rlhf_cli.online.recorder import Recorder
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.policy.policy import Policy
from rlhf_cli.policy.scoring import RewardModel, open_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.types import Completion, Group, Message, RankedGroup, WinMatrix

KINDS: dict[str, dict[str, Any]] = {"full": {}, "last_layers": {"last_layers": 1}, "lora": {"lora": {"rank": 4}}}
each_kind = pytest.mark.parametrize("kind", KINDS)
PROMPT_IDS, CHOSEN, REJECTED = (9, 40, 7), (30, 31, 1), (200, 33, 34, 35, 1)


def online(recipe: MakeRecipe, kind: str = "full", **given: Any) -> Recipe:
    learner = {"algorithm": "dpo", "beta": 0.1, "learning_rate": 1e-3}
    return recipe(model=KINDS[kind], run_online={"steps": 3, "checkpoint_every": 2, "learner": learner, **given})


def voted(policy: Policy, *completions: tuple[int, ...], wins: list[list[float]]) -> RankedGroup:
    """A group of given completions, with the log-probabilities that the reference gives them."""
    prompts = [PROMPT_IDS] * len(completions)
    ref_logps = policy.logps(policy.reference, prompts, completions)
    made = tuple(Completion("", c, r, r, True) for c, r in zip(completions, ref_logps, strict=True))
    return RankedGroup(Group("g", 0, prompt("Hi"), PROMPT_IDS, made, 0), WinMatrix(wins), "item:x", 1.0, True)


def pair(policy: Policy) -> RankedGroup:
    return voted(policy, CHOSEN, REJECTED, wins=[[0, 1], [0, 0]])


class Source:
    """Batches that say when they were asked for."""

    def __init__(self, batch: Batch, log: list[str]) -> None:
        self.batch, self.log = batch, log

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.log.append("asked")
            yield self.batch


class Witness(TrainerCallback):
    def __init__(self, log: list[str], on_step: Callable[[], None] = lambda: None) -> None:
        self.log, self.on_step = log, on_step
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.log.append("stepped")
        self.on_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(logs)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_placeholder_is_prepared_by_our_override_alone(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    asked: list[str] = []

    class Spy(GroupDPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *given: Any, **named: Any) -> Dataset:
            asked.append(str(given[-1]))
            return super()._prepare_dataset(dataset, *given, **named)

    policy = Policy(tiny, online(recipe))
    Spy(policy, [], online(recipe), tmp_path, [])
    assert asked == ["train"]
    assert callable(DPOTrainer._prepare_dataset)


@each_kind
def test_a_step_starts_as_soon_as_its_batch_is_there(recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str) -> None:
    """Nothing is drawn while constructing, nothing ahead of a step, nothing after the last."""
    plan, log = online(recipe, kind), []
    policy = Policy(tiny, plan)
    witness = Witness(log)
    trainer = GroupDPOTrainer(policy, Source(Batch([pair(policy)], 0.1), log), plan, tmp_path, [witness])
    assert log == []
    trainer.train()
    assert log == ["asked", "stepped"] * 3
    steps = [row for row in witness.logs if "loss" in row]
    assert len(steps) == 3
    for row in steps:
        assert row["learning_rate"] == pytest.approx(1e-3)
        assert row["grad_norm"] > 0


@each_kind
def test_the_reference_that_is_passed_in_is_the_one_that_stays(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    plan = online(recipe, kind)
    policy = Policy(tiny, plan)
    model, reference, before = policy.model, policy.reference, weights(policy.reference)
    started = weights(policy.model)
    trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    trainer = GroupDPOTrainer(policy, Source(Batch([pair(policy)], 0.1), []), plan, tmp_path, [])
    assert trainer.ref_model is reference
    assert trainer.model is model
    trainer.train()
    assert same(before, weights(reference))
    ended = weights(policy.model)
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == trainable
    assert {name for name in started if not torch.equal(started[name], ended[name])} <= trainable
    assert kind == "lora" or any(not torch.equal(started[n], ended[n]) for n in trainable)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_our_loss_of_one_pair_is_the_loss_of_trl(recipe: MakeRecipe, tiny: str, tmp_path: Path, loss: str) -> None:
    """Loss and gradients, against TRL's own collator and compute_loss on the same tokens."""
    plan = online(recipe, learner={"algorithm": "dpo", "loss": loss})
    policy = Policy(tiny, plan)
    with torch.no_grad():  # away from the reference, or every margin is 0
        for p in policy.model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    trainer = GroupDPOTrainer(policy, [], plan, tmp_path, [])
    row = {"prompt_ids": list(PROMPT_IDS), "chosen_ids": list(CHOSEN), "rejected_ids": list(REJECTED)}
    collated = DataCollatorForPreference(pad_token_id=policy.pad_id)([row])

    trainer.loss_types = [loss]
    theirs = DPOTrainer.compute_loss(trainer, policy.model, collated)
    theirs.backward()
    their_gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    ours = trainer.part_loss(policy.model, [pair(policy)], [pair(policy)], 0.1)
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert ours.item() != pytest.approx(math.log(2) if loss == "sigmoid" else 25.0, abs=1e-3)  # what no margin gives
    for name, p in policy.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, their_gradients[name], atol=1e-4), name


def test_the_loss_that_is_logged_is_ours(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    plan, witness = online(recipe), Witness([])
    policy = Policy(tiny, plan)
    group = voted(policy, CHOSEN, REJECTED, (8, 1), wins=[[0, 2, 1], [1, 0, 0], [0, 0, 0]])
    trainer = GroupDPOTrainer(policy, Source(Batch([group], 0.3), []), plan, tmp_path, [witness])
    trainer.train()
    assert witness.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are still the same
    assert trainer.step_metrics["train/beta"] == 0.3
    assert trainer.step_metrics["train/accuracy"] > 0.5
    assert trainer.step_metrics["train/margin"] > 0


@pytest.mark.parametrize("pairs", ["all", "best_worst"])
def test_votes_make_winners_likelier_than_losers(recipe: MakeRecipe, tiny: str, tmp_path: Path, pairs: str) -> None:
    plan = online(recipe, learner={"algorithm": "dpo", "learning_rate": 1e-3, "pairs": pairs})
    policy = Policy(tiny, plan)
    group = voted(policy, REJECTED, (8, 1), CHOSEN, wins=[[0, 0, 0], [1, 0, 0], [1, 2, 0]])
    GroupDPOTrainer(policy, Source(Batch([group], 0.1), []), plan, tmp_path, []).train()
    now = policy.logps(policy.model, [PROMPT_IDS] * 3, [c.token_ids for c in group.group.completions])
    gained = [sum(n) - sum(c.ref_logps) for n, c in zip(now, group.group.completions, strict=True)]
    assert gained[2] > gained[0]


@each_kind
def test_a_resumed_run_draws_only_what_is_left_and_ends_with_the_same_weights(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    plan = online(recipe, kind, steps=4)

    def run(folder: str, resume: Path | None = None) -> tuple[list[str], dict[str, Tensor]]:
        log: list[str] = []
        policy = Policy(tiny, plan)
        batch = Batch([pair(policy), pair(policy)], 0.1)
        trainer = GroupDPOTrainer(policy, Source(batch, log), plan, tmp_path / folder, [Witness([])])
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return log, weights(policy.model)

    torch.manual_seed(1)
    whole_log, whole = run("whole")
    torch.manual_seed(2)
    rest_log, resumed = run("resumed", tmp_path / "whole" / "checkpoint-2")
    assert (len(whole_log), len(rest_log)) == (4, 2)
    assert same(whole, resumed)


@each_kind
def test_a_checkpoint_can_be_saved_between_steps_and_loaded_without_training(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    """`save` and `load`, which a stop and a finished but unsaved run need."""
    plan = online(recipe, kind, checkpoint_every=100)
    policy = Policy(tiny, plan)

    class Enough(Exception):
        pass

    def batches() -> Iterator[Batch]:
        yield Batch([pair(policy)], 0.1)
        raise Enough

    trainer = GroupDPOTrainer(policy, batches(), plan, tmp_path, [])
    with pytest.raises(Enough):
        trainer.train()
    trainer.save()
    checkpoint = tmp_path / "checkpoint-1"
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        p.name for p in checkpoint.iterdir()
    }
    again = Policy(tiny, plan)
    GroupDPOTrainer(again, [], plan, tmp_path, []).load(checkpoint)
    assert same(weights(policy.model), weights(again.model))


def test_a_loss_that_is_not_finite_changes_no_weight(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    plan = online(recipe)
    policy = Policy(tiny, plan)
    bad = pair(policy)
    first = bad.group.completions[0]
    broken = Completion("", first.token_ids, first.logps, (math.nan,) * len(first.ref_logps), True)
    group = Group("g", 0, bad.group.prompt, PROMPT_IDS, (broken, bad.group.completions[1]), 0)
    ranked = RankedGroup(group, bad.wins, bad.source, 1.0, True)
    before = weights(policy.model)
    trainer = GroupDPOTrainer(policy, Source(Batch([ranked], 0.1), []), plan, tmp_path, [])
    with pytest.raises(Diverged, match="step 1"):
        trainer.train()
    assert same(before, weights(policy.model))


def test_a_gradient_that_is_not_finite_changes_no_weight(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    """The recorder sees it between the gradient and the optimizer."""
    plan, disk = online(recipe), Disk()
    policy = Policy(tiny, plan)
    recorder = Recorder(
        RunDir(tmp_path),
        disk,
        MetricsWriter(tmp_path / "metrics.jsonl"),
        stream(plan, disk, People(disk)),
        {},  # type: ignore[arg-type]
    )
    trainer = GroupDPOTrainer(policy, Source(Batch([pair(policy)], 0.1), []), plan, tmp_path, [recorder])
    next(p for p in policy.model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * math.nan)
    before = weights(policy.model)
    with pytest.raises(Diverged, match="gradient of step 1"):
        trainer.train()
    assert same(before, weights(policy.model))
    assert not disk.entries


GROUPS = [
    VotedGroup((Message("user", f"Question {i}?"),), ("la la la la", "xq zt", "la la"), WinMatrix(wins))
    for i, wins in enumerate([[[0, 3, 2], [0, 0, 0], [1, 2, 0]], [[0, 2, 1], [0, 0, 0], [0, 3, 0]]] * 3)
]


@pytest.mark.parametrize("kind", ["full", "last_layers", "lora"])
def test_the_reward_model_learns_from_whole_groups_and_is_saved_with_its_head(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    section = {"dataset": "votes.jsonl", "max_steps": 40, "learning_rate": 3e-3, "batch_size": 3}
    plan = recipe(model=KINDS[kind], train_rm=section)
    steps: list[tuple[int, int]] = []
    figures = train_reward_model(tiny, plan, GROUPS, GROUPS[:2], tmp_path, lambda *done: steps.append(done))
    assert steps == [(i, 40) for i in range(1, 41)]
    assert figures["accuracy"] > 0.8
    assert figures["heldout_accuracy"] > 0.8
    folder = str(tmp_path / "model")
    scorer = open_reward_model(folder)
    assert isinstance(scorer, RewardModel)
    best, worst, middle = scorer.score(GROUPS[0].prompt, GROUPS[0].completions)
    assert best > middle > worst


def fine_tuned(tiny: str, recipe: Recipe, rows: list[Any], heldout: list[Any], into: Path) -> dict[str, float]:
    checkpoints = Checkpoints(into / "checkpoints", "inputs", None, lambda: False, lambda _: None)
    target = into / "model"
    done = train_sft(tiny, recipe, rows, heldout, target, checkpoints, None, lambda *_: None, lambda *_: None)
    return done.figures


def first_labels(monkeypatch: pytest.MonkeyPatch, tiny: str, recipe: Recipe, rows: list[Any], into: Path) -> list[str]:
    """The text that the loss of the first step is on, one string per row."""
    seen: list[list[int]] = []

    class Spy(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            seen.extend([int(i) for i in row if i != -100] for row in inputs["labels"])
            return super().compute_loss(model, inputs, *given, **named)

    monkeypatch.setattr(sft_module, "SFTTrainer", Spy)
    fine_tuned(tiny, recipe, rows, [], into)
    return sorted(load_tokenizer(tiny).decode(row) for row in seen)


def sft_recipe(recipe: MakeRecipe, **given: Any) -> Recipe:
    return recipe(sft={"dataset": "sft.jsonl", "max_steps": 1, "batch_size": 2, "samples": 0, **given})


def test_fine_tuning_learns_the_answers_and_not_the_questions(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [
        (Message("user", "Say hello."), Message("assistant", "Hi!")),
        (
            Message("system", "Be kind."),
            Message("user", "One?"),
            Message("assistant", "Two."),
            Message("user", "Three?"),
            Message("assistant", "Four."),
        ),
    ]
    assert first_labels(monkeypatch, tiny, sft_recipe(recipe), chats, tmp_path) == ["Four.<|end|>", "Hi!<|end|>"]


def test_fine_tuning_on_raw_text_learns_all_of_it(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = first_labels(monkeypatch, tiny, sft_recipe(recipe), ["A river flows.", "Hello there."], tmp_path)
    assert labels == ["A river flows.<|end|>", "Hello there.<|end|>"]


@each_kind
def test_fine_tuning_lowers_the_loss_and_saves_a_plain_model(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    chats = [(Message("user", "Say hello."), Message("assistant", "Hi! Water that flows."))] * 4
    plan = recipe(model=KINDS[kind], sft={"dataset": "s.jsonl", "max_steps": 8, "batch_size": 4, "learning_rate": 3e-3})
    figures = fine_tuned(tiny, plan, chats, chats[:1], tmp_path)
    assert figures["heldout_loss"] < figures["loss"]
    assert not list((tmp_path / "model").glob("adapter*"))
    saved = Policy(str(tmp_path / "model"), recipe(), train=False)
    question = saved.encode(prompt("Say hello."))
    (row,) = saved.logps(saved.model, [question], [saved.tokenizer("Hi! Water that flows.<|end|>")["input_ids"]])
    assert -sum(row) / len(row) == pytest.approx(figures["heldout_loss"], rel=0.02)
