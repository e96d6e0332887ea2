"""Every loss against one written by hand in float64, and the updates of a step against the same ones made by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_world import (
    KINDS,
    PROMPT_IDS,
    TEXTS,
    WINS,
    forever,
    gradients,
    learner,
    learning,
    moved,
    same,
    sampled,
    weights,
)
from tiny_world import MakeRecipe, prompt
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from rlhf_cli.errors import Diverged
from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.policy_gradient import GroupGradientTrainer
from rlhf_cli.learner.scores import posterior_wins
from rlhf_cli.learner.stream_trainer import plan_updates
from rlhf_cli.learner.watch import check_gradients
from rlhf_cli.policy.load import load_model, load_tokenizer
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import RankedGroup, WinMatrix

BETA = 0.2
OTHERS = ((12, 13, 14, 1), (60, 1))
each_kind = pytest.mark.parametrize("kind", KINDS)


def two_groups(policy: Policy) -> list[RankedGroup]:
    """One of three completions with votes, one of two with scores."""
    return [
        sampled(policy, name="a"),
        sampled(policy, [[0, 1], [0, 0]], OTHERS, scores=(0.7, -0.9), name="b", index=1),
    ]


def token_logps64(model: torch.nn.Module, completion: Sequence[int]) -> Tensor:
    """Of one completion alone: no padding, no other rows, float64."""
    ids = torch.tensor([[*PROMPT_IDS, *completion]])
    logp_TV = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return logp_TV[len(PROMPT_IDS) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


def check(
    policy: Policy, trainer: Any, groups: list[RankedGroup], by_hand: Callable[[torch.nn.Module], Tensor]
) -> None:
    exact = (
        load_model(policy.model.name_or_path).double().eval()
    )  # a copy would go through the forward that TRL patched
    exact.load_state_dict(policy.model.state_dict())
    expected = by_hand(exact)
    expected.backward()
    ours = trainer.part_loss(policy.model, groups, groups, BETA)
    found = gradients(policy, ours)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    wanted = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-3
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=2e-4 * largest, rtol=0), name


DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss": "ipo"},
    "smoothing": {"label_smoothing": 0.2},
    "best_worst": {"pairs": "best_worst"},
    "posterior": {"labels": "posterior"},
    "ipo on soft labels of best and worst": {"loss": "ipo", "labels": "posterior", "pairs": "best_worst"},
}


@pytest.mark.parametrize("variant", DPO)
def test_the_gradient_of_dpo_is_that_of_the_formula(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, variant: str
) -> None:
    given = DPO[variant]
    plan = learning(recipe, {"algorithm": "dpo", **given})
    policy = Policy(tiny, plan)
    groups = two_groups(policy)
    moved(policy)

    def labels(g: RankedGroup) -> list[list[float]]:
        wins = (posterior_wins(g) if given.get("labels") == "posterior" else g.wins.wins).tolist()
        if given.get("pairs") == "best_worst":  # by share of votes won: the first beats the second, in both groups
            wins = [[w if {i, j} == {0, 1} else 0 for j, w in enumerate(row)] for i, row in enumerate(wins)]
            if given.get("labels") != "posterior":
                wins[0][1], wins[1][0] = 1, 0
        share = given.get("label_smoothing", 0)
        size = range(len(wins))
        return [[(1 - share) * wins[i][j] + share * wins[j][i] for j in size] for i in size]

    def by_hand(exact: torch.nn.Module) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for g in groups:
            w, loss = labels(g), torch.zeros((), dtype=torch.float64)
            ratios = [token_logps64(exact, c.token_ids).sum() - math.fsum(c.ref_logps) for c in g.group.completions]
            lengths = [len(c.token_ids) for c in g.group.completions]
            for i, j in itertools.permutations(range(len(ratios)), 2):
                if given.get("loss") == "ipo":
                    margin = ratios[i] / lengths[i] - ratios[j] / lengths[j]
                    loss = loss + w[i][j] * (margin - 1 / (2 * BETA)) ** 2
                else:
                    loss = loss + w[i][j] * torch.log(1 + torch.exp(-BETA * (ratios[i] - ratios[j])))
            total = total + loss / sum(map(sum, w))
        return total / len(groups)

    check(policy, learner(policy, plan, tmp_path), groups, by_hand)


GRADIENTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"loss": "dr_grpo"},
    "dapo": {"loss": "dapo"},
    "bnpo": {"loss": "bnpo"},
    "cispo": {"loss": "cispo"},
    "sequence": {"ratio": "sequence"},
    "wide above": {"clip": 0.05, "clip_high": 0.4},
    "cispo, wide above": {"loss": "cispo", "clip_high": 0.1},
    "by deviation": {"scale": "group"},
    "rloo": {"algorithm": "rloo"},
    "rloo, dapo": {"algorithm": "rloo", "loss": "dapo"},
}


@pytest.mark.parametrize("variant", GRADIENTS)
def test_the_gradient_of_grpo_and_rloo_is_that_of_the_formula(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, variant: str
) -> None:
    """With a policy that has moved from the one that sampled, and that one from its reference."""
    given = GRADIENTS[variant]
    plan = learning(recipe, {"algorithm": "grpo", **given})
    policy = Policy(tiny, plan)
    moved(policy)
    groups = [sampled(policy, scores=(1.0, -0.6, 0.2)), two_groups(policy)[1]]
    moved(policy, 0.01)
    low, high = given.get("clip", 0.2), given.get("clip_high", given.get("clip", 0.2))

    def advantages(scores: Sequence[float]) -> list[float]:
        if given.get("algorithm") == "rloo":
            return [s - (sum(scores) - s) / (len(scores) - 1) for s in scores]
        mean = sum(scores) / len(scores)
        variance = sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)
        return [(s - mean) / (math.sqrt(variance) if given.get("scale") == "group" else 1) for s in scores]

    ratios: list[float] = []

    def by_hand(exact: torch.nn.Module) -> Tensor:
        rows = []
        for g in groups:
            assert g.scores is not None
            for c, a in zip(g.group.completions, advantages(g.scores), strict=True):
                logp = token_logps64(exact, c.token_ids)
                old, ref = (torch.tensor(x, dtype=torch.float64) for x in (c.logps, c.ref_logps))
                ratio = torch.exp(logp - old)
                if given.get("ratio") == "sequence":
                    ratio = torch.exp((logp - old).mean()).expand(len(logp))
                ratios.extend(ratio.tolist())
                kl = torch.exp(ref - logp) - (ref - logp) - 1
                if given.get("ratio") != "sequence":
                    kl = ratio * kl  # whoever sampled: the KL of the policy as it is
                if given.get("loss") == "cispo":
                    climb = torch.minimum(ratio, torch.tensor(1 + high)).detach() * a * logp
                else:
                    climb = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
                rows.append(-climb + BETA * kl)
        match given.get("loss", "grpo"):
            case "grpo":
                return torch.stack([row.mean() for row in rows]).mean()
            case "dr_grpo":
                return torch.cat(rows).sum() / (len(rows) * 6)  # the recipe's max_new_tokens
            case _:
                return torch.cat(rows).mean()

    trainer = learner(policy, plan, tmp_path)
    check(policy, trainer, groups, by_hand)
    below, above = (sum(r < 1 - low for r in ratios), sum(r > 1 + high for r in ratios))
    assert variant == "sequence" or below + above > 0, "nothing was clipped: the test says nothing about it"
    measured = trainer.step_metrics
    assert 0 < measured["train/entropy_nats"] < 10
    assert measured["train/kl_token_nats"] > 0
    assert 0 <= measured["train/accuracy"] <= 1
    if given.get("ratio") != "sequence":
        assert measured["train/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)


def test_a_policy_that_has_not_moved_has_ratio_one_and_clips_nothing(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    """The forward pass of training is that of sampling; TRL's own would round the logits where precision is low."""
    plan = learning(recipe, {"algorithm": "grpo"})
    policy = moved(Policy(tiny, plan))
    groups = two_groups(policy)
    trainer = learner(policy, plan, tmp_path)
    trainer.part_loss(policy.model, groups, groups, BETA)
    assert trainer.step_metrics["train/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert trainer.step_metrics["train/clip_frac"] == 0


@pytest.mark.parametrize("given", [{"algorithm": "dpo"}, {"algorithm": "grpo"}])
def test_online_training_goes_without_the_dropout_that_a_model_brings(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, given: dict[str, Any]
) -> None:
    """In attention too, where no module holds it."""
    model = load_model(tiny)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(tiny).save_pretrained(tmp_path / "model")
    plan = learning(recipe, given)
    policy = Policy(str(tmp_path / "model"), plan)
    groups = two_groups(policy)
    trainer = learner(policy, plan, tmp_path)
    losses = [trainer.part_loss(policy.model, groups, groups, BETA).item() for _ in range(2)]
    policy.model.eval()
    assert losses == [trainer.part_loss(policy.model, groups, groups, BETA).item()] * 2


@pytest.mark.parametrize("given", [{"algorithm": "dpo"}, {"algorithm": "grpo"}, {"algorithm": "rloo", "loss": "cispo"}])
@each_kind
def test_low_precision_trains_with_the_ratios_of_its_own_sampling(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str, given: dict[str, Any]
) -> None:
    """Products in bfloat16, sampled by a bfloat16 copy: the weights stay float32, and a ratio starts at 1."""
    plan = learning(recipe, given, kind, steps=2)
    plan = plan.model_copy(
        update={"compute": plan.compute.model_copy(update={"precision": "bf16", "generator_precision": "bf16"})}
    )
    policy = Policy(tiny, plan)
    before, measured = weights(policy.model), list[dict[str, float]]()

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured.append(trainer.step_metrics)

    trainer = learner(policy, plan, tmp_path, living(policy, plan, 0), [Look()])
    trainer.resume(None)
    assert not same(before, weights(policy.model))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert len(measured) == 2
    for row in measured:
        assert all(math.isfinite(value) for value in row.values())
        if given["algorithm"] != "dpo":  # each step is on groups that the policy as it is has sampled
            assert row["train/ratio_mean"] == pytest.approx(1, abs=0.02)


def test_trl_asks_our_forward_pass_for_entropies_too(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Spy(GroupGradientTrainer):
        def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
            asked.append(named)
            return super()._get_per_token_logps_and_entropies(*given, **named)

    plan = learning(recipe, {"algorithm": "grpo"})
    policy = Policy(tiny, plan)
    trainer = Spy(policy, [], plan, tmp_path, [])
    policy.model.train()
    trainer.part_loss(policy.model, [sampled(policy)], [sampled(policy)], BETA)
    assert len(asked) == 1
    assert asked[0]["compute_entropy"] is True
    assert callable(GRPOTrainer._get_per_token_logps_and_entropies)
    assert trainer.ref_model is None  # no second reference is loaded


ALL = [{"algorithm": "dpo", **given} for given in DPO.values()]
ALL += [{"algorithm": "grpo", **given} for given in GRADIENTS.values()]


@pytest.mark.parametrize("given", ALL, ids=lambda given: "-".join(map(str, given.values())))
def test_the_parts_of_an_update_add_up_to_it(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Also where a part has fewer completions and tokens than the others, or nothing to learn from."""
    plan = learning(recipe, given)
    policy = Policy(tiny, plan)
    undecided = sampled(policy, [[0, 0], [0, 0]], OTHERS, name="c", index=2)
    groups = [*two_groups(policy), undecided]
    moved(policy, 0.01)
    trainer = learner(policy, plan, tmp_path)
    whole = gradients(policy, trainer.part_loss(policy.model, groups, groups, BETA))
    losses = [trainer.part_loss(policy.model, [g], groups, BETA) for g in groups]
    parts = gradients(policy, torch.stack(losses).sum())
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, atol=1e-5 * largest, rtol=0), name


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_duplicated_votes_are_the_same_loss_and_a_permutation_too(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, algorithm: str
) -> None:
    """A group counts once however many votes it has; for scores, more votes are another, surer ranking."""
    plan = learning(recipe, {"algorithm": algorithm})
    policy = Policy(tiny, plan)
    order = [2, 0, 1]
    group = sampled(policy)
    shuffled = sampled(policy, [[WINS[i][j] for j in order] for i in order], [TEXTS[k] for k in order])
    doubled = sampled(policy, [[2 * w for w in row] for row in WINS])
    moved(policy)
    trainer = learner(policy, plan, tmp_path)
    with torch.no_grad():
        loss, mixed, twice = (
            float(trainer.part_loss(policy.model, [g], [g], BETA)) for g in (group, shuffled, doubled)
        )
    assert mixed == pytest.approx(loss, rel=1e-4)
    assert (twice == pytest.approx(loss, rel=1e-6)) == (algorithm == "dpo")


def test_a_shift_of_all_scores_changes_no_gradient(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    plan = learning(recipe, {"algorithm": "rloo"})
    policy = Policy(tiny, plan)
    low, high = (sampled(policy, scores=(s + 0.5, s - 1.0, s)) for s in (0.0, 64.0))
    moved(policy)
    trainer = learner(policy, plan, tmp_path)
    a, b = (gradients(policy, trainer.part_loss(policy.model, [g], [g], BETA)) for g in (low, high))
    assert all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


class Watcher(TrainerCallback):
    """Counts what the trainer says, and refuses gradients that are no number, as the recorder does."""

    def __init__(self) -> None:
        self.steps, self.updates, self.logs = 0, 0, list[dict[str, float]]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.updates += 1
        check_gradients(model, state.global_step + 1, "")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
@each_kind
def test_epochs_minibatches_and_parts_are_the_updates_made_by_hand(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, algorithm: str, kind: str
) -> None:
    given = {"algorithm": algorithm, "epochs": 2, "minibatches": 2, "accumulate": 2, "weight_decay": 0.1}
    plan = learning(recipe, given, kind, steps=2, prompts_per_step=4)

    def groups(policy: Policy) -> list[RankedGroup]:
        some = two_groups(policy)
        third = sampled(policy, [[0, 0, 1], [2, 0, 0], [0, 1, 0]], name="c", index=2)
        return [*some, third, sampled(policy, [[0, 0], [1, 0]], OTHERS, name="d", index=3)]

    def policy() -> Policy:
        torch.manual_seed(3)  # adapters start random
        return Policy(tiny, plan)

    trained, watcher = policy(), Watcher()
    learner(trained, plan, tmp_path, forever(groups(trained), BETA), [watcher]).resume(None)

    by_hand = policy()
    trainer, fixed = learner(by_hand, plan, tmp_path), groups(by_hand)
    optimizer = trainer.create_optimizer()
    losses = []
    for step in range(2):
        step_losses = []
        for places in plan_updates(4, 2, 2, (7, step)):
            update = [fixed[k] for k in places]
            optimizer.zero_grad()
            parts = [trainer.part_loss(by_hand.model, [g], update, BETA) for g in update]
            for part in parts:
                part.backward()
            torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
            optimizer.step()
            step_losses.append(sum(float(part.detach()) for part in parts))
        losses.append(sum(step_losses) / 4)

    assert same(weights(trained.model), weights(by_hand.model))
    assert not same(weights(trained.model), weights(policy().model))
    assert (watcher.steps, watcher.updates) == (2, 8)
    assert [row["loss"] for row in watcher.logs] == pytest.approx(losses, abs=1e-4)
    assert all(row["learning_rate"] == pytest.approx(1e-3) for row in watcher.logs)


def test_fewer_groups_than_minibatches_make_fewer_updates(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    """Where few groups were ready, or some were set aside."""
    given = {"algorithm": "dpo", "minibatches": 2, "accumulate": 2}
    plan = learning(recipe, given, steps=1, prompts_per_step=4)
    policy, watcher = Policy(tiny, plan), Watcher()
    learner(policy, plan, tmp_path, forever([sampled(policy)]), [watcher]).resume(None)
    assert (watcher.steps, watcher.updates) == (1, 1)


def test_a_later_update_of_a_step_that_is_no_number_changes_no_weight(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    plan = learning(recipe, {"algorithm": "grpo", "epochs": 2})
    policy, watcher = Policy(tiny, plan), Watcher()
    seen: list[dict[str, Tensor]] = []

    def spoil(gradient: Tensor) -> Tensor:
        seen.append(weights(policy.model))
        return gradient * (math.nan if len(seen) == 2 else 1)

    next(p for p in policy.model.parameters() if p.requires_grad).register_hook(spoil)
    trainer = learner(policy, plan, tmp_path, forever([sampled(policy)]), [watcher])
    with pytest.raises(Diverged, match="gradient of step 1"):
        trainer.resume(None)
    assert not same(seen[0], seen[1])
    assert same(seen[1], weights(policy.model))


def test_scores_that_are_no_numbers_stop_the_run_before_a_weight_changes(
    recipe: MakeRecipe, tiny: str, tmp_path: Path
) -> None:
    plan = learning(recipe, {"algorithm": "grpo"})
    policy = Policy(tiny, plan)
    before = weights(policy.model)
    broken = sampled(policy, scores=(math.inf, 1e300, 1e308))
    trainer = learner(policy, plan, tmp_path, forever([broken]))
    with pytest.raises(Diverged, match="step 1"):
        trainer.resume(None)
    assert same(before, weights(policy.model))


def living(policy: Policy, plan: Recipe, from_step: int) -> Iterator[Batch]:
    """Groups that the policy samples as it is at each step; whoever wrote the larger tokens wins."""
    online = plan.run_online
    assert online is not None
    for step in itertools.count(from_step):
        policy.sync()
        groups = policy.sample_groups(
            [prompt("One?"), prompt("Two?")],
            online.sampling,
            online.group_size,
            first_index=2 * step,
            prefix="r",
            step=step,
            seed=7,
        )
        yield Batch([RankedGroup(g, _larger(g), "item:x", 1.0, True) for g in groups], BETA)


def _larger(group: Any) -> WinMatrix:
    means = [sum(c.token_ids) / len(c.token_ids) for c in group.completions]
    return WinMatrix([[float(a > b) for b in means] for a in means])


RESUMED: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo", "epochs": 2, "minibatches": 2},
    "rloo": {"algorithm": "rloo", "loss": "dapo"},
    "ipo": {"algorithm": "dpo", "loss": "ipo", "labels": "posterior"},
    "dpo, previous": {"algorithm": "dpo", "reference": "previous", "reference_every": 3},
    "grpo, previous": {"algorithm": "grpo", "reference": "previous", "reference_every": 1},
}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("variant", RESUMED)
def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_weights(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, variant: str, kind: str
) -> None:
    plan = learning(recipe, RESUMED[variant], kind, steps=6, checkpoint_every=4)

    def run(folder: str, checkpoint: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        policy = Policy(tiny, plan)
        batches = living(policy, plan, 4 if checkpoint else 0)
        learner(policy, plan, tmp_path / folder, batches).resume(checkpoint)
        return weights(policy.model), weights(policy.reference)

    torch.manual_seed(1)
    whole = run("whole", None)
    torch.manual_seed(2)
    resumed = run("resumed", tmp_path / "whole" / "checkpoint-4")
    assert same(whole[0], resumed[0])
    assert same(whole[1], resumed[1])


@each_kind
def test_the_previous_reference_is_renewed_and_the_start_is_not(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, kind: str
) -> None:
    given = {"algorithm": "dpo", "reference": "previous", "reference_every": 2}
    plan = learning(recipe, given, kind, steps=3)
    policy = Policy(tiny, plan)
    start = weights(policy.start)
    assert same(weights(policy.reference), start)
    batches = []
    for_each = living(policy, plan, 0)

    def remembered() -> Iterator[Batch]:
        for batch in for_each:
            batches.append(batch)
            yield batch

    learner(policy, plan, tmp_path, remembered()).resume(None)
    assert same(weights(policy.start), start)
    assert not same(weights(policy.reference), start)
    drift = [[c.kl_nats for g in b.groups for c in g.group.completions] for b in batches]
    ahead = [[sum(c.logps) - sum(c.ref_logps) for g in b.groups for c in g.group.completions] for b in batches]
    assert drift[1] == pytest.approx(
        ahead[1], abs=1e-5
    )  # not renewed yet: both are the model that training started from
    assert ahead[2] == pytest.approx(
        [0.0] * len(ahead[2]), abs=1e-4
    )  # renewed after step 2: the policy is its reference
    assert max(map(abs, drift[2])) > 0.01  # while the KL is still measured against the start
