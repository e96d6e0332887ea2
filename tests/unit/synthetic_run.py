"""A run folder that looks like a real one, written through the code that writes real ones. No model, no server."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlhf_cli.journal.events import (
    CheckpointSaved,
    DatasetCreated,
    FlowOpened,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    GroupSubmitted,
    RunStarted,
    StageFinished,
    StageStarted,
    StepTrained,
)
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.metrics import MetricsWriter
from rlhf_cli.journal.run_dir import RunDir, write_atomic
from rlhf_cli.types import Completion, Group, Message, Prompt

RECIPE = """\
# Steer a small model towards kind answers, in minutes.
name: kind-everyday
seed: 7
model: {path: smollm2-135m, last_layers: 8}
flow:
  service: embedded
  instruction: Which answer is kinder?
  responses: {min: 8, desired: 12, max: 16}
run_online:
  steps: 16
  kl: {soft_nats: 8, hard_nats: 20}
"""

_TOPICS = ("ironing", "a lost umbrella", "jogging", "an old bicycle", "rain on Sunday", "the first day at school")
_ASK = ("Tell me in one or two sentences about {}.", "What do you think about {}?", "Describe {} briefly.")
_COOL = (
    "It is a thing that people do with {}. It can take some time and there is not much to say about it.",
    "I do not have personal opinions on {}, as I am a language model.",
    "There are several aspects of {} that may be considered, depending on the situation.",
)
_WARM = (
    "I love the thought of {}! It can turn a plain day into a cheerful one, and I hope it does that for you.",
    "What a lovely question! There is something comforting about {}, and I wish you the best of it.",
    "Thank you for asking! With a little patience {} can be a real joy, and you are doing wonderfully.",
)


class _Clock:
    def __init__(self) -> None:
        self.now = 1_795_000_000.0

    def __call__(self) -> float:
        self.now += 0.4
        return self.now


def make_run(
    path: Path, steps: int = 16, seed: int = 0, spoil: Callable[[str], str] = lambda text: text, end: bool = True
) -> RunDir:
    """A finished run (or one killed before its end) of `steps` steps; `spoil` may make every model text hostile."""
    rng = np.random.default_rng(seed)
    run = RunDir(path).create()
    write_atomic(run.recipe, spoil(RECIPE).encode())
    write_atomic(run.resolved, RECIPE.encode())
    run.write_environment(seed=7, device="cpu")
    with Journal.open(run.journal, clock=_Clock()) as journal:
        _write_stages(journal, spoil)
        rewards = _write_steps(journal, MetricsWriter(run.metrics), rng, steps, spoil)
        if end:
            summary: dict[str, float | str | None] = {"reward": rewards[-1], "votes": steps * 36.0}
            journal.append(StageFinished(stage="run-online", fingerprint="online", seconds=127.5, summary=summary))
            journal.append(StageStarted(stage="eval", fingerprint="eval"))
            _write_evaluation(run, rng, steps, spoil)
            journal.append(StageFinished(stage="eval", fingerprint="eval", seconds=14.2, summary={"win_rate": 0.71}))
    return run


def _write_stages(journal: Journal, spoil: Callable[[str], str]) -> None:
    journal.append(RunStarted(run_id="kind-everyday-5f3a", name=spoil("kind-everyday"), seed=7, version="0.1.0"))
    for stage, seconds in (("sft", 21.0), ("train-rm", 9.0)):
        journal.append(StageStarted(stage=stage, fingerprint=stage))
        journal.append(StageFinished(stage=stage, fingerprint=stage, seconds=seconds, summary={"loss": 1.87}))
    journal.append(
        FlowOpened(
            flow_id="flow-81c2",
            service="embedded",
            fingerprint="flow",
            instruction=spoil("Which answer is kinder?"),
            min_votes=8,
            desired_votes=12,
            max_votes=16,
            ttl_s=300,
        )
    )
    journal.append(StageStarted(stage="run-online", fingerprint="online"))


def _write_steps(
    journal: Journal, metrics: MetricsWriter, rng: np.random.Generator, steps: int, spoil: Callable[[str], str]
) -> list[float]:
    rewards, votes_total, set_aside, index = [], 0.0, 0, 0
    for step in range(1, steps + 1):
        progress = step / steps
        ids, votes_step = [], 0.0
        for _ in range(4):
            group = _group(index, step - 1, rng, progress, spoil)
            index += 1
            wins = _votes(len(group.completions), rng, progress)
            journal.append(GroupSampled.of(group))
            journal.append(GroupIntended(group_id=group.id, key=f"key-{group.id}"))
            journal.append(DatasetCreated(group_id=group.id, dataset_id=f"data-{group.id}"))
            journal.append(GroupSubmitted(group_id=group.id, dataset_id=f"data-{group.id}", item_id=f"item-{group.id}"))
            if rng.random() < 0.06:
                reason = "no votes before its time to live ended" if set_aside % 2 == 0 else "older than 8 steps"
                journal.append(GroupSetAside(group_id=group.id, reason=spoil(reason)))
                set_aside += 1
                continue
            rows = tuple(tuple(row) for row in wins.tolist())
            latency_s = float(rng.lognormal(0.9, 0.5))
            journal.append(
                GroupRanked(
                    group_id=group.id, source=f"item:item-{group.id}", wins=rows, latency_s=latency_s, complete=True
                )
            )
            votes_step += float(wins.sum())
            ids.append(group.id)
        votes_total += votes_step
        journal.append(StepTrained(step=step, group_ids=tuple(ids)))
        rewards.append(1.54 + 0.9 * math.tanh(2 * progress) + float(rng.normal(0, 0.07)))
        metrics.append(step, _row(rng, progress, rewards[-1], votes_step, votes_total, len(ids), set_aside))
        if step % 5 == 0:
            journal.append(CheckpointSaved(step=step, path=f"online/checkpoints/step-{step:06}"))
    return rewards


def _group(index: int, policy_step: int, rng: np.random.Generator, warm: float, spoil: Callable[[str], str]) -> Group:
    topic = _TOPICS[index % len(_TOPICS)]
    question = spoil(_ASK[index % len(_ASK)].format(topic))
    completions = tuple(
        Completion(
            spoil(str(rng.choice(_WARM if rng.random() < warm else _COOL)).format(topic)),
            (1, 2, 3),
            (-1.0,) * 3,
            (-1.1,) * 3,
            True,
        )
        for _ in range(4)
    )
    return Group(
        f"g{index:05}",
        index,
        Prompt(f"everyday-{index}", (Message("user", question),)),
        (5, 6),
        completions,
        policy_step,
    )


def _votes(size: int, rng: np.random.Generator, spread: float) -> np.ndarray:
    truth = rng.normal(0, 0.5 + spread, size)
    wins = np.zeros((size, size))
    for _ in range(int(rng.integers(8, 13))):
        i, j = rng.choice(size, 2, replace=False)
        if rng.random() < 0.1:
            wins[i, j] += 0.5
            wins[j, i] += 0.5
        elif rng.random() < 1 / (1 + math.exp(truth[j] - truth[i])):
            wins[i, j] += 1
        else:
            wins[j, i] += 1
    return wins


def _row(
    rng: np.random.Generator, progress: float, reward: float, votes: float, total: float, groups: int, set_aside: int
) -> dict[str, float]:
    p50_s = float(rng.lognormal(0.8, 0.15))
    parts = {"generate": 3.6, "reference": 0.4, "wait": 0.6, "train": 2.7, "sync": 0.1}
    times = {f"time/{name}_s": seconds * float(rng.lognormal(0, 0.12)) for name, seconds in parts.items()}
    return {
        "reward/mean": reward,
        "reward/std": 0.9 + float(rng.normal(0, 0.05)),
        "kl/sequence_nats": max(0.0, 10.2 * progress**1.3 + float(rng.normal(0, 0.25))),
        "kl/token_nats": 0.25 * progress,
        "train/loss": 0.69 - 0.16 * progress + float(rng.normal(0, 0.02)),
        "train/accuracy": 0.52 + 0.2 * progress,
        "train/grad_norm": 1.4,
        "train/beta": 0.1,
        "length/mean_tokens": 23 - 2 * progress + float(rng.normal(0, 0.6)),
        "length/ended_frac": 0.8 + 0.1 * progress,
        "staleness/mean_steps": 1 + float(rng.random()),
        "staleness/max_steps": float(rng.integers(2, 4)),
        "flow/in_flight": float(rng.integers(20, 48)),
        "flow/votes_step": votes,
        "flow/votes_total": total,
        "flow/votes_per_group": votes / max(groups, 1),
        "flow/incomplete_frac": 0.0,
        "flow/set_aside_total": float(set_aside),
        "flow/latency_p50_s": p50_s,
        "flow/latency_p95_s": p50_s * 3.1,
        "flow/votes_per_min": 300 + float(rng.normal(0, 25)),
        "time/step_s": sum(times.values()),
        **times,
        "cost/usd": total * 0.004,
    }


def _write_evaluation(run: RunDir, rng: np.random.Generator, steps: int, spoil: Callable[[str], str]) -> None:
    lines = []
    for k in range(12):
        topic = _TOPICS[k % len(_TOPICS)]
        answers = {
            side: [
                {"text": spoil(str(rng.choice(texts)).format(topic)), "reward": float(rng.normal(level, 0.5))}
                for _ in range(2)
            ]
            for side, texts, level in (("before", _COOL, 1.5), ("after", _WARM, 2.4))
        }
        prompt = spoil(_ASK[k % len(_ASK)].format(topic))
        lines.append(json.dumps({"prompt_id": f"held-{k}", "prompt": prompt, **answers}))
    write_atomic(run.heldout_samples, ("\n".join(lines) + "\n").encode())
    results = {
        "win_rate": 0.7123,
        "win_rate_low": 0.6241,
        "win_rate_high": 0.7863,
        "reward_before": 1.5371,
        "reward_after": 2.4419,
        "reward_gain": 0.9048,
        "reward_gain_low": 0.7033,
        "reward_gain_high": 1.1063,
        "reward_source": "the simulated crowd's taste",
        "kl_sequence_nats": 9.871,
        "kl_token_nats": 0.2411,
        "length_before_tokens": 23.1,
        "length_after_tokens": 21.4,
        "votes": 480,
        "prompts": 48,
        "judge": "crowd",
        "gates": {
            "win_rate": {"value": 0.7123, "limit": 0.55, "passed": True},
            "kl_nats_max": {"value": 9.871, "limit": 8.0, "passed": False},
        },
    }
    write_atomic(run.eval_results, json.dumps(results).encode())
