"""PPO through the trainer: the critic starts as the reward model, the gradient is the one on paper, and a run goes on
bit by bit where it stopped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import MakeRecipe, prompt
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_cli.errors import DataError, Diverged
from rlhf_cli.learner.batch import Batch
from rlhf_cli.learner.critic import Critic, load_critic
from rlhf_cli.learner.online import online_learner
from rlhf_cli.learner.ppo import PPOTrainer
from rlhf_cli.policy.generate import pack
from rlhf_cli.policy.load import load_tokenizer, own_pad
from rlhf_cli.policy.policy import Policy
from rlhf_cli.policy.scoring import About, load_reward_model, write_about
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, Group, RankedGroup, WinMatrix

KINDS: dict[str, dict[str, Any]] = {"full": {}, "last_layers": {"last_layers": 1}, "lora": {"lora": {"rank": 4}}}
each_kind = pytest.mark.parametrize("kind", KINDS)
PROMPT_IDS = (9, 40, 7)
LONG, SHORT, CUT = (200, 33, 34, 35, 1), (30, 31, 1), (8, 50, 51, 52)
TEMPERATURE = 2.0


@pytest.fixture(scope="session")
def reward_model(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model on the tiny model's weights, with a random head."""
    return save_reward_model(tiny, tmp_path_factory.mktemp("rm"), About(temperature=TEMPERATURE))


def save_reward_model(backbone: str, folder: Path, about: About) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = load_reward_model(backbone)
    tokenizer = load_tokenizer(backbone)
    own_pad(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_about(folder, about)
    return folder


def online(recipe: MakeRecipe, kind: str = "full", learner: dict[str, Any] | None = None, **given: Any) -> Recipe:
    keys = {"algorithm": "ppo", "learning_rate": 1e-3, **(learner or {})}
    run_online = {"steps": 3, "checkpoint_every": 2, "feedback": "reward_model", "learner": keys, **given}
    return recipe(model=KINDS[kind], train_rm={"dataset": "votes.jsonl"}, run_online=run_online)


def scored(
    policy: Policy, *completions: tuple[int, ...], scores: Sequence[float], name: str = "g", drift: float = 0.0
) -> RankedGroup:
    """A group with scores; the policy that sampled it was `drift` nats a token above the reference."""
    prompts = [PROMPT_IDS] * len(completions)
    logps = policy.logps(policy.model, prompts, completions)
    made = tuple(
        Completion("", ids, row, tuple(x - drift for x in row), ids[-1] == 1)
        for ids, row in zip(completions, logps, strict=True)
    )
    wins = WinMatrix([[0.0] * len(made)] * len(made))
    group = Group(name, 0, prompt("Hi"), PROMPT_IDS, made, 0)
    return RankedGroup(group, wins, "reward_model:train_rm", 0.0, True, scores=tuple(scores))


def two_groups(policy: Policy) -> list[RankedGroup]:
    return [
        scored(policy, LONG, SHORT, scores=(1.0, -0.5), name="a", drift=0.1),
        scored(policy, CUT, scores=(0.3,), name="b", drift=-0.2),
    ]


class Log(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(logs)


def forever(make: Callable[[], Batch]) -> Iterator[Batch]:
    while True:
        yield make()


def trainer(
    policy: Policy, plan: Recipe, folder: Path, reward_model: Path, batch: Batch | None = None, *callbacks: Any
) -> PPOTrainer:
    batches = [] if batch is None else forever(lambda: batch)
    made = online_learner(policy, batches, plan, folder, list(callbacks), reward_model)
    assert isinstance(made, PPOTrainer)
    return made


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(model: nn.Module, by: float = 0.05) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))


# --- the critic


@each_kind
def test_the_critic_starts_as_the_reward_model_of_what_was_said_so_far(
    recipe: MakeRecipe, tiny: str, reward_model: Path, kind: str
) -> None:
    """Before each token: the calibrated reward of prompt and completion up to there, whatever stands beside it."""
    tokenizer, section = load_tokenizer(tiny), recipe(model=KINDS[kind]).model
    critic = load_critic(reward_model, tokenizer, section, torch.device("cpu"), 7)
    inputs = pack([PROMPT_IDS] * 3, [LONG, SHORT, CUT], int(tokenizer.pad_token_id), torch.device("cpu"))
    values_BT = critic(**inputs)
    model = load_reward_model(str(reward_model)).eval()
    assert values_BT.shape == (3, 5)
    for row, completion in zip(values_BT, [LONG, SHORT, CUT], strict=True):
        for t in range(len(completion)):
            seen = torch.tensor([[*PROMPT_IDS, *completion[:t]]])
            reward = model(input_ids=seen, attention_mask=torch.ones_like(seen)).logits[0, 0].item()
            assert row[5 - len(completion) + t].item() == pytest.approx(reward / TEMPERATURE, abs=1e-5)
    assert len({round(v, 4) for v in values_BT[0].tolist()}) == 5  # the head tells prefixes apart


def test_the_head_of_the_critic_is_always_trained(recipe: MakeRecipe, tiny: str, reward_model: Path) -> None:
    for kind in KINDS:
        critic = load_critic(
            reward_model, load_tokenizer(tiny), recipe(model=KINDS[kind]).model, torch.device("cpu"), 7
        )
        trained = [name for name, p in critic.named_parameters() if p.requires_grad]
        assert any("score" in name for name in trained), kind
        assert kind == "full" or len(trained) < len(list(critic.parameters()))


def test_new_adapters_of_the_critic_follow_from_the_seed(recipe: MakeRecipe, tiny: str, reward_model: Path) -> None:
    section, device = recipe(model=KINDS["lora"]).model, torch.device("cpu")

    def made(noise: int, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        return weights(load_critic(reward_model, load_tokenizer(tiny), section, device, seed))

    assert same(made(1, 7), made(2, 7))
    assert not same(made(1, 7), made(1, 8))


def test_a_reward_model_with_other_tokens_is_refused(
    recipe: MakeRecipe, tiny: str, tiny_encoder: str, tmp_path: Path
) -> None:
    other = save_reward_model(tiny_encoder, tmp_path, About())
    with pytest.raises(DataError, match="does not know the policy's tokens"):
        load_critic(other, load_tokenizer(tiny), recipe().model, torch.device("cpu"), 7)


def test_a_model_that_compares_is_refused(recipe: MakeRecipe, tiny: str, tmp_path: Path) -> None:
    pairwise = save_reward_model(tiny, tmp_path, About(kind="pairwise"))
    with pytest.raises(DataError, match="use bradley_terry"):
        load_critic(pairwise, load_tokenizer(tiny), recipe().model, torch.device("cpu"), 7)


# --- the loss


def on_paper(
    policy: Policy, critic: Critic, critic_before: Critic, groups: Sequence[RankedGroup], plan: Recipe, beta: float
) -> Tensor:
    """The loss of one update on all groups, with a loop over completions and tokens, and no batch or padding."""
    assert plan.run_online is not None
    learner = plan.run_online.learner
    told: list[tuple[Tensor, Tensor, Tensor, list[float], list[float], list[float], list[float]]] = []
    for g in groups:
        assert g.scores is not None
        for completion, score in zip(g.group.completions, g.scores, strict=True):
            one = pack([g.group.prompt_ids], [completion.token_ids], policy.pad_id, torch.device("cpu"))
            logits = policy.model(input_ids=one["ids_BT"]).logits[0, len(g.group.prompt_ids) - 1 : -1].double()
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            chosen = logp[range(len(completion.token_ids)), list(completion.token_ids)]
            values = critic(**one)[0].double()
            before = critic_before(**one)[0].double().tolist()
            rewards = [-beta * (p - r) for p, r in zip(completion.logps, completion.ref_logps, strict=True)]
            cut = learner.unended_reward is not None and not completion.ended
            rewards[-1] += learner.unended_reward if cut else score  # type: ignore[operator]
            advantages, ahead, after = [0.0] * len(rewards), 0.0, 0.0
            for t in reversed(range(len(rewards))):
                surprise = rewards[t] + learner.gamma * after - before[t]
                ahead = surprise + learner.gamma * learner.gae_lambda * ahead
                advantages[t], after = ahead, before[t]
            returns = [a + v for a, v in zip(advantages, before, strict=True)]
            told.append((chosen, entropy, values, list(completion.logps), before, advantages, returns))
    every = [a for *_, advantages, _ in told for a in advantages]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
    total = torch.zeros((), dtype=torch.float64)
    for chosen, entropy, values, old, before, advantages, returns in told:
        for t in range(len(old)):
            advantage = (advantages[t] - mean) / (deviation + 1e-8)
            ratio = (chosen[t] - old[t]).exp()
            climb = torch.minimum(
                ratio * advantage, ratio.clamp(1 - learner.clip, 1 + (learner.clip_high or learner.clip)) * advantage
            )
            miss = (values[t] - returns[t]) ** 2 / 2
            if learner.value_clip is not None:
                near = before[t] + (values[t] - before[t]).clamp(-learner.value_clip, learner.value_clip)
                miss = torch.maximum(miss, (near - returns[t]) ** 2 / 2)
            total = total - climb + learner.value_coefficient * miss - learner.entropy * entropy[t]
    return total / len(every)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"entropy": 0.3, "gamma": 0.9, "gae_lambda": 0.5, "value_clip": None, "value_coefficient": 1.5},
        {"clip": 0.02, "clip_high": 0.3, "value_clip": 0.01, "unended_reward": -4.0},
    ],
)
def test_loss_and_gradients_are_those_on_paper(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path, keys: dict[str, Any]
) -> None:
    plan = online(recipe, learner=keys)
    policy = Policy(tiny, plan)
    groups = two_groups(policy)
    one = trainer(policy, plan, tmp_path, reward_model)
    one.begin_step(groups, 0.2)
    before = load_critic(reward_model, policy.tokenizer, plan.model, torch.device("cpu"), 7)
    moved(policy.model, 0.02)
    moved(one.critic, 0.02)
    both = nn.ModuleDict({"policy": policy.model, "critic": one.critic})
    ours = one.part_loss(policy.model, groups, groups, 0.2)
    ours.backward()
    found = gradients(both)
    both.zero_grad()

    paper = on_paper(policy, one.critic, before, groups, plan, 0.2)
    paper.backward()

    assert ours.item() == pytest.approx(paper.item(), abs=1e-5)
    assert one.step_metrics["train/clip_frac"] > 0
    assert close(found, gradients(both))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Each within a thousandth of its own length."""
    return a.keys() == b.keys() and all((a[n] - b[n]).norm() <= 1e-3 * b[n].norm() + 1e-7 for n in a)


def test_the_parts_of_an_update_add_up_to_its_gradient(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    """A short completion beside a long one is padded, alone it is not; neither changes what it contributes."""
    plan = online(recipe, learner={"entropy": 0.1})
    policy = Policy(tiny, plan)
    groups = two_groups(policy)
    one = trainer(policy, plan, tmp_path, reward_model)
    both = nn.ModuleDict({"policy": policy.model, "critic": one.critic})
    one.begin_step(groups, 0.2)
    moved(both, 0.02)

    one.part_loss(policy.model, groups, groups, 0.2).backward()
    whole, figures = gradients(both), one.figures.means()
    both.zero_grad()
    one.figures.clear()
    for group in groups:
        one.part_loss(policy.model, [group], groups, 0.2).backward()

    assert close(gradients(both), whole)
    assert one.figures.means() == pytest.approx(
        {n: x for n, x in figures.items() if n in one.figures.means()}, rel=1e-4
    )
    assert "train/entropy_nats" in one.figures.means()


def test_the_score_is_on_the_end_of_the_answer_and_padding_earns_nothing(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    """With lambda 1 the return of a token is all that is earned from there on."""
    plan = online(recipe, learner={"gae_lambda": 1.0, "unended_reward": -4.0})
    policy = Policy(tiny, plan)
    one = trainer(policy, plan, tmp_path, reward_model)
    one.begin_step(two_groups(policy), 0.2)
    returns = one.targets.returns
    assert returns[0].tolist() == pytest.approx([1 - 0.02 * k for k in (5, 4, 3, 2, 1)], abs=1e-5)
    assert returns[1][2:].tolist() == pytest.approx([-0.5 - 0.02 * k for k in (3, 2, 1)], abs=1e-5)
    assert returns[2][1:].tolist() == pytest.approx([-4 + 0.04 * k for k in (4, 3, 2, 1)], abs=1e-5)
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3, [False] + [True] * 4])
    assert not one.targets.advantages[~mask].any()
    assert float(one.targets.advantages[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert one.step_metrics["train/score"] == pytest.approx((1 - 0.5 - 4) / 3)


def test_figures_count_real_tokens_alone(recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path) -> None:
    plan = online(recipe)
    policy = Policy(tiny, plan)
    groups = two_groups(policy)
    one = trainer(policy, plan, tmp_path, reward_model)
    one.begin_step(groups, 0.2)
    one.part_loss(policy.model, groups, groups, 0.2)
    by_hand = []
    for g in groups:
        for c in g.group.completions:
            ids = torch.tensor([[*PROMPT_IDS, *c.token_ids]])
            logp = policy.model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
            by_hand += (-(logp.exp() * logp).sum(-1)).tolist()
    figures = one.step_metrics
    assert len(by_hand) == 12
    assert figures["train/entropy_nats"] == pytest.approx(sum(by_hand) / 12, rel=1e-4)
    assert figures["train/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert (figures["train/clip_frac"], figures["train/value_clip_frac"]) == (0, 0)
    kl = (8 * (math.exp(-0.1) - 0.9) + 4 * (math.exp(0.2) - 1.2)) / 12  # 8 tokens drift by 0.1 nats, 4 by -0.2
    assert figures["train/kl_token_nats"] == pytest.approx(kl, rel=1e-3)
    assert figures["train/policy_loss"] == pytest.approx(0, abs=1e-5)  # whitened advantages at a ratio of 1


def test_dropout_of_adapters_is_no_part_of_a_ratio(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    """What was sampled was scored without it, so the first update is at a ratio of 1, and the critic repeats itself."""
    plan = online(recipe, steps=1).model_copy(
        update={"model": recipe(model={"lora": {"rank": 4, "dropout": 0.5}}).model}
    )
    policy = Policy(tiny, plan)
    moved(policy.model, 0.02)
    one = trainer(policy, plan, tmp_path, reward_model, Batch(two_groups(policy), 0.1))
    moved(one.critic, 0.02)
    one.resume(None)
    assert one.step_metrics["train/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert one.step_metrics["train/value_clip_frac"] == 0


def test_feedback_without_scores_is_never_taken_for_a_score_of_zero(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    plan = online(recipe)
    policy = Policy(tiny, plan)
    unscored = dataclasses.replace(two_groups(policy)[0], scores=None)
    with pytest.raises(DataError, match="group a came back from reward_model:train_rm without scores"):
        trainer(policy, plan, tmp_path, reward_model, Batch([unscored], 0.1)).resume(None)


# --- steps and checkpoints


@each_kind
def test_policy_and_critic_both_learn_and_nothing_else_moves(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path, kind: str
) -> None:
    plan = online(recipe, kind, learner={"value_learning_rate": 3e-3})
    policy = Policy(tiny, plan)
    one = trainer(policy, plan, tmp_path, reward_model, Batch(two_groups(policy), 0.1), log := Log())
    before = {"reference": weights(policy.reference), "policy": weights(policy.model), "critic": weights(one.critic)}
    one.resume(None)
    assert same(before["reference"], weights(policy.reference))
    for name, model in (("policy", policy.model), ("critic", one.critic)):
        now = weights(model)
        changed = {n for n in now if not torch.equal(now[n], before[name][n])}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert changed, name
        assert changed <= trained, name
    rates = {group["lr"] for group in one.optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 3e-3}
    assert [row["learning_rate"] for row in log.rows if "loss" in row] == [1e-3] * 3


@pytest.mark.parametrize("longest", [1e9, 0.01])
def test_policy_and_critic_are_clipped_each_by_its_own_norm(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path, longest: float
) -> None:
    plan = online(recipe, learner={"max_grad_norm": longest}, steps=1)
    policy = Policy(tiny, plan)
    norms: dict[str, float] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            for name, model in (("policy", given["model"]), ("critic", one.critic)):
                norms[name] = float(torch.stack([g.norm() for g in gradients(model).values()]).norm())

    one = trainer(policy, plan, tmp_path, reward_model, Batch(two_groups(policy), 0.1), Look())
    one.resume(None)
    if longest < 1:
        assert norms == pytest.approx({"policy": longest, "critic": longest}, rel=1e-3)
        assert one.step_metrics["train/value_grad_norm"] > 2 * longest
    else:
        assert norms["critic"] == pytest.approx(one.step_metrics["train/value_grad_norm"])


MANY = {"epochs": 2, "minibatches": 2, "kl_target_nats": 0.5, "value_learning_rate": 2e-3}


@each_kind
def test_a_resumed_run_ends_with_the_same_weights_of_policy_and_critic(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path, kind: str
) -> None:
    plan = online(recipe, kind, steps=4, learner=MANY)

    def run(folder: str, checkpoint: Path | None = None) -> tuple[PPOTrainer, Policy]:
        policy = Policy(tiny, plan)
        one = trainer(policy, plan, tmp_path / folder, reward_model, Batch(two_groups(Policy(tiny, plan)), 0.1))
        one.resume(checkpoint)
        return one, policy

    torch.manual_seed(1)
    whole, whole_policy = run("whole")
    torch.manual_seed(2)
    rest, rest_policy = run("rest", tmp_path / "whole" / "checkpoint-2")
    assert whole.beta_factor != 1
    assert rest.beta_factor == whole.beta_factor
    assert same(weights(whole_policy.model), weights(rest_policy.model))
    assert same(weights(whole.critic), weights(rest.critic))
    assert rest.step_metrics == whole.step_metrics


@each_kind
def test_a_checkpoint_can_be_loaded_without_training(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path, kind: str
) -> None:
    plan = online(recipe, kind, steps=2, learner=MANY)
    policy = Policy(tiny, plan)
    one = trainer(policy, plan, tmp_path, reward_model, Batch(two_groups(policy), 0.1))
    one.resume(None)
    again = Policy(tiny, plan)
    other = trainer(again, plan, tmp_path / "other", reward_model)
    assert not same(weights(other.critic), weights(one.critic))
    other.load(tmp_path / "checkpoint-2")
    assert same(weights(again.model), weights(policy.model))
    assert same(weights(other.critic), weights(one.critic))
    assert other.beta_factor == one.beta_factor


def test_a_gradient_of_the_critic_that_is_no_number_changes_no_weight(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    plan = online(recipe)
    policy = Policy(tiny, plan)
    one = trainer(policy, plan, tmp_path, reward_model, Batch(two_groups(policy), 0.1))
    before = weights(policy.model), weights(one.critic)
    next(one.critic.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match=r"gradient of step 1 .*value_learning_rate"):
        one.resume(None)
    assert same(before[0], weights(policy.model))
    assert same(before[1], weights(one.critic))


def test_the_weight_of_the_kl_adapts_to_its_target_step_by_step(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    """The completions were sampled with a KL of 0.5, 0.3 and -0.8 nats: 0 on average, and the target is above."""
    plan = online(recipe, learner={"kl_target_nats": 1.0})
    policy = Policy(tiny, plan)
    one = trainer(policy, plan, tmp_path, reward_model, Batch(two_groups(policy), 0.2))
    one.resume(None)
    assert one.step_metrics["train/beta"] == pytest.approx(0.2 * 0.9**2)
    assert one.beta_factor == pytest.approx(0.9**3)


def even(ids: Sequence[int]) -> float:
    """A taste that a policy of random weights can learn: even tokens."""
    return 2 * sum(i % 2 == 0 for i in ids) / len(ids) - 1


@dataclasses.dataclass
class Sampler:
    """Groups that the policy samples as it is when the trainer asks for them, scored by that taste."""

    policy: Policy
    plan: Recipe
    scores: list[float] = dataclasses.field(default_factory=list)
    kl_nats: list[float] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        online = self.plan.run_online
        assert online is not None
        questions = [prompt(text) for text in ("Say hello.", "Why?", "What is a river?", "Hi!")]
        for step in range(online.steps):
            self.policy.sync()
            groups = self.policy.sample_groups(
                questions, online.sampling, 4, first_index=4 * step, prefix="g", step=step, seed=3
            )
            ranked = []
            for group in groups:
                mine = tuple(even(c.token_ids) for c in group.completions)
                self.scores += mine
                self.kl_nats += [sum(c.logps) - sum(c.ref_logps) for c in group.completions]
                ranked.append(RankedGroup(group, WinMatrix([[0.0] * 4] * 4), "function:even", 0.0, True, scores=mine))
            yield Batch(ranked, online.learner.beta)

    def run(self, folder: Path, reward_model: Path) -> None:
        PPOTrainer(self.policy, self, self.plan, folder, [], reward_model).resume(None)


FAST = {"learning_rate": 1e-2, "value_learning_rate": 1e-2, "epochs": 2, "minibatches": 2}


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize(
    ("kind", "precision"), [("full", "fp32"), ("last_layers", "fp32"), ("lora", "fp32"), ("full", "bf16")]
)
def test_scores_rise_when_the_policy_samples_for_itself(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path, kind: str, precision: str
) -> None:
    plan = online(recipe, kind, {**FAST, "beta": 0.01}, steps=32, group_size=4, checkpoint_every=100)
    compute = plan.compute.model_copy(update={"precision": precision, "generator_precision": precision})
    plan = plan.model_copy(update={"compute": compute})
    policy = Policy(tiny, plan)
    assert (policy.generator is not None) is (precision == "bf16")
    samples = Sampler(policy, plan)
    samples.run(tmp_path, reward_model)
    assert mean(samples.scores[-64:]) > mean(samples.scores[:64]) + 0.2


def test_a_larger_beta_keeps_the_policy_nearer_to_its_reference(
    recipe: MakeRecipe, tiny: str, tmp_path: Path, reward_model: Path
) -> None:
    drift = {}
    for beta in (0.001, 0.5):
        plan = online(recipe, "full", {**FAST, "beta": beta}, steps=16, group_size=4, checkpoint_every=100)
        samples = Sampler(Policy(tiny, plan), plan)
        samples.run(tmp_path / str(beta), reward_model)
        drift[beta] = mean(samples.kl_nats[-64:])
    assert drift[0.001] > 2 * drift[0.5]
