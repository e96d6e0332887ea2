"""What it costs to learn from a group of 8 completions with votes on all 28 pairs, beside TRL's pair collators.

    OMP_NUM_THREADS=1 python benchmarks/learner.py                # about 3 minutes
    OMP_NUM_THREADS=1 python benchmarks/learner.py --json FILE

Reward model and DPO, each on the same weights, the same tokens and the same votes, in float32. Ours reads a completion
once; TRL's stock trainers and collators read two sequences for each pair. Timed is what differs: collating, loss and
gradient, in processor seconds; the trainers take turns. The gradient norms stand beside the times: were they not
equal, the two would not do the same work.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from machine import machine, write
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as DpoCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from rlhf_cli.learner.dpo import GroupDPOTrainer
from rlhf_cli.learner.groups import Example
from rlhf_cli.learner.reward import VotesTrainer, head_scores
from rlhf_cli.policy.encoding import Encoded
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.policy.policy import Policy
from rlhf_cli.policy.runtime import prepare
from rlhf_cli.policy.scoring import load_reward_model
from rlhf_cli.policy.tiny import build_tiny_model
from rlhf_cli.recipe.schema import FromScratch, Recipe
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, WinMatrix

COMPLETIONS, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 40, 64
BETA, CENTERING = 0.1, 0.01
VERSIONS = ("rlhf-cli", "torch", "trl", "transformers")


@dataclass(frozen=True, slots=True)
class Work:
    """One way to the gradient of the same group."""

    name: str
    sequences: int
    model: torch.nn.Module
    loss: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A group as token ids, its completions from the best to the worst: each pair has one vote, for the earlier."""

    prompt: list[int]
    completions: list[list[int]]

    @property
    def wins(self) -> WinMatrix:
        size = len(self.completions)
        return WinMatrix([[float(i < j) for j in range(size)] for i in range(size)])

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        return list(combinations(self.completions, 2))


def draw(rng: random.Random, groups: int, vocabulary: int) -> list[Tokens]:
    def text(tokens: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(tokens)]

    return [Tokens(text(PROMPT_TOKENS), [text(COMPLETION_TOKENS) for _ in range(COMPLETIONS)]) for _ in range(groups)]


def make_model(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A tokenizer, and a Llama of random weights; large enough that arithmetic and not Python takes the time."""
    build_tiny_model(["a river is water that flows"], FromScratch(layers=1, hidden=32, heads=2), 0, folder)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(folder))
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)


def reward_models(folder: str, groups: Sequence[Tokens], scratch: Path) -> list[Work]:
    torch.manual_seed(1)
    ours = load_reward_model(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    theirs.load_state_dict(ours.state_dict())
    tokenizer = load_tokenizer(folder)
    common = {"use_cpu": True, "report_to": [], "bf16": False, "gradient_checkpointing": False}
    examples = [
        Example(tuple(Encoded((*g.prompt, *c), None, 0) for c in g.completions), g.wins, (1.0,)) for g in groups
    ]
    by_votes = VotesTrainer(
        [],
        [],
        head_scores,
        CENTERING,
        model=ours,
        processing_class=tokenizer,
        args=RewardConfig(str(scratch), disable_dropout=False, **common),
    )
    pairs = [{"chosen_ids": g.prompt + c, "rejected_ids": g.prompt + r} for g in groups for c, r in g.pairs]
    by_pairs = RewardTrainer(
        model=theirs,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs),
        args=RewardConfig(str(scratch), center_rewards_coefficient=CENTERING, **common),
    )
    collator = by_pairs.data_collator
    assert type(collator) is RewardCollator
    count = sum(len(e.rows) for e in examples)
    return [
        Work("rlhf", count, ours, lambda: by_votes.compute_loss(ours, by_votes.collate(examples))),
        Work("TRL RewardTrainer", 2 * len(pairs), theirs, lambda: by_pairs.compute_loss(theirs, collator(pairs))),
    ]


def dpo(folder: str, groups: Sequence[Tokens], scratch: Path) -> list[Work]:
    recipe = Recipe.model_validate(
        {
            "name": "learner",
            "model": {"path": folder},
            "data": {"prompts": "prompts.jsonl"},
            "flow": {"service": "embedded", "instruction": "Which is better?", "crowd": {}},
            "run_online": {
                "steps": 1,
                "prompts_per_step": 1,
                "group_size": COMPLETIONS,
                "learner": {"algorithm": "dpo", "beta": BETA},
            },
            "compute": {"precision": "fp32", "generator_precision": "fp32", "threads": 1},
        }
    )
    policy = Policy(folder, recipe)
    shift(policy.model)
    ranked, pairs = [], []
    for n, g in enumerate(groups):
        ref_logps = policy.logps(policy.reference, [g.prompt] * len(g.completions), g.completions)
        made = tuple(Completion("", tuple(c), r, r, True) for c, r in zip(g.completions, ref_logps, strict=True))
        group = Group(f"g{n}", n, Prompt("p", (Message("user", "?"),)), tuple(g.prompt), made, 0)
        ranked.append(RankedGroup(group, g.wins, "item:x", 0.0, True))
        for (c, ref_c), (r, ref_r) in combinations(zip(g.completions, map(sum, ref_logps), strict=True), 2):
            ids = {"prompt_ids": g.prompt, "chosen_ids": c, "rejected_ids": r}
            pairs.append({**ids, "ref_chosen_logps": ref_c, "ref_rejected_logps": ref_r})
    by_votes = GroupDPOTrainer(policy, [], recipe, scratch, [])

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    by_pairs = DPOTrainer(
        model=theirs,
        ref_model=reference,
        processing_class=policy.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # the collator gets `pairs`
        args=DPOConfig(
            str(scratch),
            beta=BETA,
            use_cpu=True,
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
        ),
    )
    shift(theirs)
    collator = by_pairs.data_collator
    assert type(collator) is DpoCollator

    def of_pairs(precomputed: bool) -> torch.Tensor:
        by_pairs.precompute_ref_logps = precomputed
        return by_pairs.compute_loss(theirs, collator(pairs))

    count, completions = 2 * len(pairs), sum(len(g.completions) for g in groups)
    return [
        Work("rlhf", completions, policy.model, lambda: by_votes.part_loss(policy.model, ranked, ranked, BETA)),
        Work("TRL DPOTrainer, reference precomputed", count, theirs, lambda: of_pairs(True)),
        Work("TRL DPOTrainer", count, theirs, lambda: of_pairs(False)),
    ]


@torch.no_grad()
def shift(model: torch.nn.Module) -> None:
    """Move a policy away from its reference, the same way each time: at the start, DPO's margins are all zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def gradient(work: Work) -> tuple[float, float]:
    """Loss and gradient norm."""
    work.model.zero_grad()
    loss = work.loss()
    loss.backward()
    squares = [float(p.grad.double().square().sum()) for p in work.model.parameters() if p.grad is not None]
    return loss.item(), sum(squares) ** 0.5


def cpu_seconds(works: Sequence[Work], repeats: int) -> dict[str, list[float]]:
    """Of each repeat, the works taking turns; one round to warm up."""
    spent: dict[str, list[float]] = {work.name: [] for work in works}
    for repeat in range(repeats + 1):
        for work in works:
            work.model.zero_grad()
            start = time.process_time()
            work.loss().backward()
            if repeat:
                spent[work.name].append(time.process_time() - start)
    return spent


def measure(works: Sequence[Work], repeats: int) -> list[dict[str, Any]]:
    found = {work.name: gradient(work) for work in works}
    spent = cpu_seconds(works, repeats)
    median = {name: statistics.median(times) for name, times in spent.items()}
    return [
        {
            "name": work.name,
            "sequences": work.sequences,
            "cpu_s": median[work.name],
            "cpu_s_all": spent[work.name],
            "ratio": median[work.name] / median[works[0].name],
            "loss": found[work.name][0],
            "gradient_norm": found[work.name][1],
        }
        for work in works
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2], help="prompts a step, 8 completions each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write date, machine, settings and results")
    args = parser.parse_args()
    prepare(1)
    rng = random.Random(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, args.layers, args.hidden, args.vocabulary)
        for count, (kind, make) in product(args.groups, (("reward model", reward_models), ("DPO", dpo))):
            kind = f"{kind}, {count} x {COMPLETIONS} completions"
            groups = draw(rng, count, args.vocabulary)
            results[kind] = measure(make(str(folder), groups, Path(scratch) / "trainer"), args.repeats)
            print(f"{kind}\n  {'':38} {'sequences':>9} {'cpu s':>7} {'ratio':>6} {'loss':>9} {'gradient':>9}")
            for row in results[kind]:
                times = f"{row['cpu_s']:7.3f} {row['ratio']:6.2f}"
                print(f"  {row['name']:38} {row['sequences']:9} {times} {row['loss']:9.6f} {row['gradient_norm']:9.6f}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        settings |= {"completions": COMPLETIONS, "prompt_tokens": PROMPT_TOKENS, "tokens": COMPLETION_TOKENS}
        versions = {name: metadata.version(name) for name in VERSIONS}
        write(args.json, {"versions": versions, "settings": settings, **results})


if __name__ == "__main__":
    main()
