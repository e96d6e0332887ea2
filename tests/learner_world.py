"""Learners on the tiny model: groups whose completions are given, and a policy that has moved from its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_world import MakeRecipe, prompt
from torch import Tensor

from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.online import online_learner
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, Group, RankedGroup, WinMatrix

PROMPT_IDS = (9, 40, 7)
TEXTS = ((30, 31, 1), (200, 33, 34, 35, 1), (8, 1))
WINS = [[0, 3, 2], [0, 0, 1], [1, 0, 0]]
KINDS: dict[str, dict[str, Any]] = {"full": {}, "last_layers": {"last_layers": 1}, "lora": {"lora": {"rank": 4}}}


def learning(recipe: MakeRecipe, learner: dict[str, Any], kind: str = "full", **given: Any) -> Recipe:
    """A recipe with this learner; its steps and the rest of `run_online` in `given`."""
    online = {"steps": 3, "checkpoint_every": 2, **given}
    if learner.get("reference") == "previous":
        online["kl"] = {"hard_nats": 1000.0}
    return recipe(model=KINDS[kind], run_online={**online, "learner": {"learning_rate": 1e-3, **learner}})


def moved(policy: Policy, by: float = 0.05) -> Policy:
    """The policy a random step away from its reference; its logits still follow from the seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=generator)
    return policy


def sampled(
    policy: Policy,
    wins: object = WINS,
    texts: Sequence[tuple[int, ...]] = TEXTS,
    scores: tuple[float, ...] | None = None,
    name: str = "g",
    index: int = 0,
) -> RankedGroup:
    """A group of given completions, with the log-probabilities that policy and reference give them now."""
    prompts = [PROMPT_IDS] * len(texts)
    logps, ref_logps = (policy.logps(model, prompts, texts) for model in (policy.model, policy.reference))
    made = tuple(Completion("x" * len(t), t, p, r, True) for t, p, r in zip(texts, logps, ref_logps, strict=True))
    source = "item:x" if scores is None else "function"
    return RankedGroup(
        Group(name, index, prompt("Hi"), PROMPT_IDS, made, 0), WinMatrix(wins), source, 1.0, True, scores
    )


def without(ranked: RankedGroup, *, scores: tuple[float, ...]) -> RankedGroup:
    return replace(ranked, scores=scores)


def forever(groups: Sequence[RankedGroup], beta: float = 0.1) -> Iterator[Batch]:
    while True:
        yield Batch(groups, beta)


def learner(policy: Policy, plan: Recipe, folder: Path, batches: Any = (), callbacks: Any = ()) -> Any:
    """What the factory makes, ready for `part_loss`."""
    made = online_learner(policy, batches, plan, folder, list(callbacks), None)
    policy.model.train()
    return made


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """Of every trained weight, in float64."""
    policy.model.zero_grad()
    loss.backward()
    return {n: p.grad.double().clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
