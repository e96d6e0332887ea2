"""The DPO loss with marks: against a reference written out in float64, and plain DPO where nothing is marked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_world import forever, gradients, learner, learning, moved, same, sampled, weights
from tiny_world import MakeRecipe
from torch import Tensor

from rlhf_cli.learner.segments import token_spans
from rlhf_cli.policy.policy import Policy
from rlhf_cli.types import RankedGroup, Segment

BETA, WEIGHT = 0.3, 4.0
MARKS: tuple[tuple[int, int, bool], ...] = ((0, 1, True), (1, 2, False), (1, 3, True))
"""Completion, token and whether it is good, of the group of `learner_world`."""


def with_text(policy: Policy, ranked: RankedGroup) -> RankedGroup:
    """The group with the texts that its tokens really are."""
    made = tuple(replace(c, text=policy.decode(c.token_ids)) for c in ranked.group.completions)
    return replace(ranked, group=replace(ranked.group, completions=made))


def marked(policy: Policy, ranked: RankedGroup, marks: tuple[tuple[int, int, bool], ...] = MARKS) -> RankedGroup:
    """The group with these tokens marked, by the characters that they stand for."""
    ranked = with_text(policy, ranked)

    def decode(ids: Any) -> str:
        return str(policy.tokenizer.decode(ids, skip_special_tokens=True))

    found = []
    for place, token, good in marks:
        start, end = token_spans(ranked.group.completions[place].token_ids, decode)[token]
        assert start < end
        found.append(Segment(place, start, end, good))
    return replace(ranked, segments=tuple(found))


def by_hand(policy: Policy, ranked: RankedGroup, loss: str = "sigmoid") -> Tensor:
    """Votes one by one, completions one by one, each token with a weight that is written out here."""
    won: list[Tensor] = []
    lost: list[Tensor] = []
    for place, completion in enumerate(ranked.group.completions):
        ids = torch.tensor([[*ranked.group.prompt_ids, *completion.token_ids]])
        logits = policy.model(input_ids=ids).logits[0, :-1].double()
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0][-len(completion.token_ids) :]
        ratio = logps - torch.tensor(completion.ref_logps, dtype=torch.float64)
        for side, wanted in ((won, True), (lost, False)):
            weigh = [WEIGHT if (place, t, wanted) in MARKS else 1.0 for t in range(len(ratio))]
            total = sum(w * r for w, r in zip(weigh, ratio, strict=True))
            mean = total / sum(weigh)  # as in RLHF-V
            side.append(mean if loss == "ipo" else mean * len(ratio))
    terms = []
    for i, row in enumerate(ranked.wins.wins):
        for j, votes in enumerate(row):
            margin = won[i] - lost[j]
            if loss == "ipo":
                terms.append(votes * (margin - 1 / (2 * BETA)) ** 2)
            else:
                terms.append(-votes * torch.nn.functional.logsigmoid(BETA * margin))
    return torch.stack([t for t in terms if t.requires_grad]).sum() / ranked.wins.votes


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_loss_and_gradient_are_those_of_a_reference_in_float64(
    tiny: str, recipe: MakeRecipe, tmp_path: Path, kind: str, loss: str
) -> None:
    plan = learning(recipe, {"algorithm": "dpo", "loss": loss, "beta": BETA}, kind, segments={"weight": WEIGHT})
    policy = moved(Policy(tiny, plan))
    ranked = marked(policy, sampled(policy))
    trainer = learner(policy, plan, tmp_path)
    policy.model.eval()
    ours = trainer.part_loss(policy.model, [ranked], [ranked], BETA)
    expected = by_hand(policy, ranked, loss)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = trainer.part_loss(policy.model, [replace(ranked, segments=())], [ranked], BETA)
    assert abs(ours.item() - plain.item()) > 1e-3 * abs(plain.item())
    got, wanted = gradients(policy, ours), gradients(policy, expected)
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, atol=1e-5 * scale, rtol=1e-4), name


def test_without_marks_the_loss_is_that_of_dpo_bit_by_bit(tiny: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    results = []
    for segments in (None, {"weight": WEIGHT}):
        plan = learning(recipe, {"algorithm": "dpo"}, segments=segments)
        policy = moved(Policy(tiny, plan))
        ranked = with_text(policy, sampled(policy))
        if segments is None:  # marks that the recipe did not ask for change nothing
            ranked = marked(policy, ranked)
        trainer = learner(policy, plan, tmp_path)
        policy.model.eval()
        results.append(gradients(policy, trainer.part_loss(policy.model, [ranked], [ranked], BETA)))
    assert same(*results)


def test_marking_everything_is_marking_nothing(tiny: str, recipe: MakeRecipe, tmp_path: Path) -> None:
    plan = learning(recipe, {"algorithm": "dpo"}, segments={"weight": WEIGHT})
    policy = moved(Policy(tiny, plan))
    ranked = with_text(policy, sampled(policy, texts=((30, 31), (200, 33, 34, 35), (8, 9))))
    all_of_it = tuple(
        Segment(i, 0, len(c.text), good) for i, c in enumerate(ranked.group.completions) for good in (True, False, True)
    )
    trainer = learner(policy, plan, tmp_path)
    policy.model.eval()
    losses = [
        trainer.part_loss(policy.model, [one], [one], BETA).item()
        for one in (ranked, replace(ranked, segments=all_of_it))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_good_mark_pulls_on_its_token_where_the_completion_wins_and_not_where_it_loses(
    tiny: str, recipe: MakeRecipe, tmp_path: Path
) -> None:
    plan = learning(recipe, {"algorithm": "dpo"}, segments={"weight": WEIGHT})
    policy = Policy(tiny, plan)
    wins = [[0, 4, 4], [0, 0, 0], [0, 0, 0]]
    trainer = learner(policy, plan, tmp_path)
    policy.model.eval()
    norms = {}
    for marks in ((), ((0, 1, True),), ((1, 1, True),)):
        one = marked(policy, sampled(policy, wins), marks)
        pulled = gradients(policy, trainer.part_loss(policy.model, [one], [one], BETA))
        norms[marks] = math.sqrt(sum(float(g.square().sum()) for g in pulled.values()))
    assert norms[((1, 1, True),)] == norms[()]
    assert norms[((0, 1, True),)] != norms[()]


def test_steps_with_marks_are_repeated_exactly_after_a_checkpoint(
    tiny: str, recipe: MakeRecipe, tmp_path: Path
) -> None:
    ends = []
    for stop in (None, 2):
        plan = learning(recipe, {"algorithm": "dpo"}, segments={"weight": WEIGHT}, steps=3, checkpoint_every=2)
        policy = Policy(tiny, plan)
        one = marked(policy, sampled(policy))
        trainer = learner(policy, plan, tmp_path / str(stop), forever([one]))
        trainer.resume(None)
        assert trainer.step_metrics["train/marked_frac"] == pytest.approx(2 / 3)
        if stop is not None:
            policy = Policy(tiny, plan)
            checkpoint = tmp_path / "None" / f"checkpoint-{stop}"
            learner(policy, plan, tmp_path / "again", forever([one])).resume(checkpoint)
        ends.append(weights(policy.model))
    assert same(*ends)
