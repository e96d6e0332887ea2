"""The reward learner through TRL's trainer: what the votes say is what the gradient says, and what is saved is what is
loaded by anybody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_world import MakeRecipe
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from rlhf_cli.learner.groups import Example
from rlhf_cli.learner.pairwise import comparisons, order_scores
from rlhf_cli.learner.reward import VotesTrainer, answers, bootstrap_weights, head_scores, train_reward_model
from rlhf_cli.policy.encoding import Encoded, encode_answer, encode_comparison
from rlhf_cli.policy.load import load_tokenizer, own_pad, train_only_last_layers
from rlhf_cli.policy.scoring import PairwiseModel, RewardModel, load_reward_model, open_reward_model
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.stages.train_rm import judged
from rlhf_cli.types import Message, WinMatrix

TEXTS = ("la la la la", "xq zt", "la la", "zt")
WINS = [[0, 3, 1, 2], [1, 0, 0, 0], [1, 2, 0, 0.5], [0, 1, 0.5, 0]]
CENTERING = 0.05


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def group(wins: Any, texts: Sequence[str] = TEXTS, prompt: str = "what is best?") -> VotedGroup:
    return VotedGroup(asked(prompt), tuple(texts), WinMatrix(wins))


OTHER = group([[0, 2], [1, 0]], ("la zt", "xq"), "and now?")
GROUPS = [
    VotedGroup(asked(f"question {i}?"), ("la la la la", "xq zt", "la la"), WinMatrix(wins))
    for i, wins in enumerate([[[0, 3, 2], [0, 0, 0], [1, 2, 0]], [[0, 2, 1], [0, 0, 0], [0, 3, 0]]] * 3)
]


class Bench:
    """A model in float64 with a trainer round it, for gradients that can be compared to the last digits.

    An encoder, because the norm of the others goes through float32 whatever their weights are.
    """

    def __init__(self, path: str, scratch: Path, pairwise: bool = False) -> None:
        torch.manual_seed(0)
        self.tokenizer = load_tokenizer(path)
        model = load_reward_model(path)
        own_pad(model, self.tokenizer)
        self.model = model.double()
        self.pairwise = pairwise
        self.trainer = VotesTrainer(
            [],
            [],
            order_scores if pairwise else head_scores,
            0.0 if pairwise else CENTERING,
            model=self.model,
            processing_class=self.tokenizer,
            args=RewardConfig(str(scratch), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False),
        )

    def examples(self, groups: Sequence[VotedGroup]) -> list[Example]:
        if self.pairwise:
            return comparisons(self.tokenizer, groups, 60)
        return answers(self.tokenizer, groups, 60, None, 0)

    def gradient(self, groups: Sequence[VotedGroup]) -> Tensor:
        """Of the loss of all groups as one batch."""
        inputs = self.trainer.collate(self.examples(groups))
        return self._flat(self.trainer.compute_loss(self.model, inputs))

    def by_hand(self, groups: Sequence[VotedGroup]) -> Tensor:
        """The same from the definition: every vote on its own, every text through the model on its own."""
        total, votes = torch.zeros((), dtype=torch.float64), 0.0
        for g in groups:
            for i, j in zip(*np.nonzero(g.wins.wins), strict=True):
                count = float(g.wins.wins[i, j])
                if self.pairwise:
                    first, second = self.compared(g, i, j), self.compared(g, j, i)
                    nll = (F.softplus(-first) + F.softplus(second)) / 2
                else:
                    winner, loser = self.reward(g, i), self.reward(g, j)
                    nll = F.softplus(loser - winner) + CENTERING * (winner + loser) ** 2
                total, votes = total + count * nll, votes + count
        return self._flat(total / votes)

    def reward(self, g: VotedGroup, k: int) -> Tensor:
        return self._read(encode_answer(self.tokenizer, g.prompt, g.completions[k], 60))

    def compared(self, g: VotedGroup, i: int, j: int) -> Tensor:
        return self._read(encode_comparison(self.tokenizer, g.prompt, g.completions[i], g.completions[j], 60))

    def _read(self, text: Encoded) -> Tensor:
        read = self.model(input_ids=torch.tensor([text.ids]), token_type_ids=torch.tensor([text.types]))
        return read.logits[0, 0]  # type: ignore[no-any-return]

    def _flat(self, loss: Tensor) -> Tensor:
        self.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def as_pairs(g: VotedGroup) -> list[VotedGroup]:
    """The same votes, each as a pair of its own; half a vote stands for half a pair."""
    pairs = []
    for i, j in zip(*np.nonzero(g.wins.wins), strict=True):
        count = float(g.wins.wins[i, j])
        texts = (g.completions[i], g.completions[j])
        shares = [1.0] * int(count) + [count % 1] * (count % 1 > 0)
        pairs += [VotedGroup(g.prompt, texts, WinMatrix([[0, share], [0, 0]])) for share in shares]
    return pairs


def as_votes(g: VotedGroup) -> list[VotedGroup]:
    """The same votes, one matrix of the whole group for each pair of completions."""
    single = []
    for i, j in zip(*np.nonzero(g.wins.wins), strict=True):
        wins = np.zeros_like(g.wins.wins)
        wins[i, j] = g.wins.wins[i, j]
        single.append(VotedGroup(g.prompt, g.completions, WinMatrix(wins)))
    return single


def same(a: Tensor, b: Tensor) -> bool:
    assert float(a.abs().max()) > 1e-3
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pairwise", [False, True])
def test_pairs_votes_and_matrices_that_say_the_same_give_the_same_gradient(
    tiny_encoder: str, tmp_path: Path, pairwise: bool
) -> None:
    bench, whole = Bench(tiny_encoder, tmp_path, pairwise), group(WINS)
    expected = bench.by_hand([whole, OTHER])
    assert same(bench.gradient([whole, OTHER]), expected)
    assert same(bench.gradient([*as_votes(whole), OTHER]), expected)
    assert same(bench.gradient([*as_pairs(whole), *as_pairs(OTHER)]), expected)
    assert not same(bench.gradient([group(np.array(WINS).T), OTHER]), expected)


@pytest.mark.parametrize("pairwise", [False, True])
def test_a_vote_that_comes_twice_is_a_vote_of_twice_the_weight(
    tiny_encoder: str, tmp_path: Path, pairwise: bool
) -> None:
    bench = Bench(tiny_encoder, tmp_path, pairwise)
    once, doubled = group(WINS), group(2 * np.array(WINS))
    assert same(bench.gradient([once, once, OTHER]), bench.gradient([doubled, OTHER]))
    assert not same(bench.gradient([once, OTHER]), bench.gradient([doubled, OTHER]))


def learn(recipe: MakeRecipe, path: str, folder: Path, model: dict[str, Any] | None = None, **keys: Any) -> Any:
    section = {"dataset": "votes.jsonl", "max_steps": 40, "learning_rate": 3e-3, "batch_size": 3, **keys}
    return train_reward_model(path, recipe(model=model, train_rm=section), GROUPS, GROUPS[:2], folder, lambda *_: None)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_accumulating_small_batches_is_the_same_as_one_large_batch(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    for name, size, accumulate in (("large", 6, 1), ("small", 2, 3)):
        learn(recipe, tiny, tmp_path / name, batch_size=size, accumulate=accumulate, max_steps=3)
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert large.keys() == small.keys()
    assert all(torch.allclose(large[name], small[name], atol=2e-5) for name in large)


PLAIN = [
    ("tiny", {}, {}),
    ("tiny", {"lora": {"rank": 4}}, {}),
    ("tiny", {"lora": {"rank": 4}}, {"ensemble": 4}),
    ("tiny", {}, {"kind": "pairwise"}),
    ("tiny_encoder", {}, {"dropout": 0.1}),
    ("tiny_encoder", {}, {"ensemble": 4}),
    ("tiny_encoder", {"lora": {"rank": 4}}, {"ensemble": 4}),
    ("tiny_encoder", {"last_layers": 1}, {}),
    ("tiny_encoder", {"lora": {"rank": 4}}, {"kind": "pairwise"}),
]


@pytest.mark.parametrize(("backbone", "model", "keys"), PLAIN)
def test_a_trained_folder_gives_the_same_scores_to_anybody_who_loads_it(
    recipe: MakeRecipe,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    backbone: str,
    model: dict[str, Any],
    keys: dict[str, Any],
) -> None:
    figures = learn(recipe, request.getfixturevalue(backbone), tmp_path, model, **keys)
    assert figures["accuracy"] > 0.8
    assert figures["heldout_accuracy"] > 0.8
    assert figures["truncated"] == figures["heldout_truncated"] == 0
    folder = tmp_path / "model"
    ours = open_reward_model(str(folder))
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert plain.config.num_labels == 1
    assert tokenizer.padding_side == "right"
    prompt, texts = GROUPS[0].prompt, GROUPS[0].completions

    def theirs(rows: Sequence[Any]) -> list[float]:
        pad = {"input_ids": [list(row.ids) for row in rows]}
        if rows[0].types is not None:
            pad["token_type_ids"] = [list(row.types) for row in rows]
        with torch.no_grad():
            return plain(**tokenizer.pad(pad, return_tensors="pt")).logits[:, 0].tolist()  # type: ignore[no-any-return]

    if isinstance(ours, PairwiseModel):
        first, second = theirs(
            [encode_comparison(tokenizer, prompt, *pair, ours.max_length) for pair in (texts[:2], texts[1::-1])]
        )
        assert ours.logits([(prompt, texts)])[0][0, 1] == pytest.approx((first - second) / 2, abs=1e-5)
        assert 0.5 <= figures["order_consistency"] <= 1
    else:
        rows = [encode_answer(tokenizer, prompt, text, ours.max_length) for text in texts]
        assert ours.score(prompt, texts) == pytest.approx(theirs(rows), abs=1e-5)
    best, worst, middle = ours.score(prompt, texts)
    assert best > middle > worst


def test_the_conversation_in_the_folders_own_template_scores_the_same(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    learn(recipe, tiny, tmp_path)
    folder = tmp_path / "model"
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "question 0?"}, {"role": "assistant", "content": "la la"}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = float(plain(**ids).logits[0, 0])
    ours = open_reward_model(str(folder))
    assert ours.score(asked("question 0?"), ["la la"]) == pytest.approx([expected], abs=1e-5)


def test_the_heads_of_an_ensemble_differ_and_their_spread_is_said(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    learn(recipe, tiny, tmp_path, ensemble=5)
    model = open_reward_model(str(tmp_path / "model"))
    assert isinstance(model, RewardModel)
    ((_, spread),) = model.score_all([(GROUPS[0].prompt, GROUPS[0].completions)])
    assert spread is not None
    assert (spread > 1e-4).all()
    heads = load_file(tmp_path / "model" / "heads.safetensors")["weight"]
    assert heads.shape[0] == 5
    mean = weights(tmp_path)["score.weight"]
    assert torch.allclose(heads.mean(0, keepdim=True), mean, atol=1e-7)
    about = json.loads((tmp_path / "model" / "reward_model.json").read_text())
    assert about["ensemble"] == 5


def test_what_a_group_weighs_for_a_head_follows_from_its_content_alone() -> None:
    drawn = np.array([bootstrap_weights(group([[0, n], [1, 0]], ("a", "b")), 40, 7) for n in range(1, 200)])
    assert drawn[3].tolist() == list(bootstrap_weights(group([[0, 4], [1, 0]], ("a", "b")), 40, 7))
    assert drawn.mean() == pytest.approx(1, abs=0.05)  # exponential: mean and deviation are both 1
    assert drawn.std() == pytest.approx(1, abs=0.05)
    assert bootstrap_weights(OTHER, 3, 7) != bootstrap_weights(OTHER, 3, 8)


def test_a_pairwise_model_is_the_same_from_either_side(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    learn(recipe, tiny, tmp_path, kind="pairwise")
    model = open_reward_model(str(tmp_path / "model"))
    prompt, texts = GROUPS[0].prompt, GROUPS[0].completions
    chances = model.probability(prompt, texts)
    assert np.allclose(chances + chances.T, 1)
    assert np.diagonal(chances).tolist() == [0.5] * 3
    again = model.probability(prompt, texts[::-1])
    assert np.allclose(again[::-1, ::-1], chances, atol=1e-6)
    assert chances[0, 1] > 0.8


def test_texts_that_do_not_fit_are_counted(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    long = group([[0, 1], [0, 0]], ("la " * 200, "xq"))
    section = {"dataset": "votes.jsonl", "max_steps": 1, "batch_size": 2, "max_length": 60}
    plan = recipe(train_rm=section)
    figures = train_reward_model(tiny, plan, [*GROUPS, long], [long, OTHER], tmp_path, lambda *_: None)
    assert (figures["truncated"], figures["heldout_truncated"]) == (1, 1)


@pytest.mark.parametrize(("kind", "cut"), [("bradley_terry", 1), ("pairwise", 3)])
def test_the_report_counts_completions_that_did_not_fit_and_knows_lengths_in_tokens(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str, cut: int
) -> None:
    learn(recipe, tiny, tmp_path, kind=kind, max_steps=1, max_length=150)
    model = open_reward_model(str(tmp_path / "model"))
    long = group([[0, 1, 1], [0, 0, 1], [0, 0, 0]], ("la " * 200, "xq", "zt"))
    fits = group([[0, 1], [0, 0]], ("la", "xq"))
    found = judged(model, [long, fits])
    assert found.truncated == cut
    assert found.tokens is not None
    assert [len(row) for row in found.tokens] == [3, 2]
    assert found.tokens[0][0] >= 100 > max(found.tokens[0][1:])


def test_an_early_stop_keeps_the_weights_that_were_best_on_held_out_votes(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    against = [VotedGroup(g.prompt, g.completions, WinMatrix(g.wins.wins.T)) for g in GROUPS]
    section = {
        "dataset": "votes.jsonl",
        "heldout": "votes.jsonl",
        "max_steps": 60,
        "learning_rate": 3e-3,
        "batch_size": 6,
        "stop_early": {"every": 2, "patience": 2},
    }
    plan = recipe(train_rm=section)
    figures = train_reward_model(tiny, plan, GROUPS, against, tmp_path / "stopped", lambda *_: None)
    assert figures["steps"] == 6  # looked after 2, 4 and 6; nothing was better than after 2
    last = train_reward_model(
        tiny,
        recipe(train_rm={**section, "stop_early": None, "max_steps": 6}),
        GROUPS,
        against,
        tmp_path / "whole",
        lambda *_: None,
    )
    assert figures["heldout_loss"] < last["heldout_loss"]


def test_only_the_last_layers_pooler_and_head_of_an_encoder_are_trained(tiny_encoder: str) -> None:
    model = load_reward_model(tiny_encoder)
    train_only_last_layers(model, 1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"bert", "classifier"}
    assert any("pooler" in name for name in trained)
    assert all("layer.1." in name or "pooler" in name or "classifier" in name for name in trained)
