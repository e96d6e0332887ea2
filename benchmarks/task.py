"""One task with a known true taste, shared by the benchmarks about learning: a tiny policy, prompts, simulated raters.

The policy is a Llama of 2 layers and width 64 with a vocabulary of its own, trained for a few hundred steps on the
everyday sentences of `recipes/data`. The true reward of a completion is ten times its share of vowels. A rater prefers
i over j with probability logistic(k * (reward i - reward j)), so Bradley-Terry holds and the truth is known.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent.parent / "recipes" / "data"
PROMPTS, HELDOUT = DATA / "everyday_train.jsonl", DATA / "everyday_heldout.jsonl"
NEW_TOKENS = 16
AGREEMENT = 0.72
"""How often two raters agree on a pair whose rewards differ by a standard normal: what people reach."""
MEASURED = 8
"""Completions of each held-out prompt that the true reward is measured on."""
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}
"""Student's t for the 95 % interval of a mean, by the number of runs."""


def true_reward(completion: str) -> float:
    from rlhf_cli.server.tastes import letters

    return letters("", completion)


def start_model(folder: Path) -> Path:
    """The policy that every run starts from, trained by `rlhf sft` from nothing; returns its folder."""
    from rlhf_cli.recipe.load import load_recipe
    from rlhf_cli.stages import sft

    recipe = {
        "name": "start",
        "seed": 1,
        "model": {"from_scratch": {"layers": 2, "hidden": 64, "heads": 4}},
        "sft": {"dataset": str(DATA / "smoke_sft.jsonl"), "max_steps": 340, "learning_rate": 3e-3, "batch_size": 16},
        "compute": {"precision": "fp32", "threads": 1},
    }
    file = folder / "start.yaml"
    file.write_text(json.dumps(recipe))
    sft.run(load_recipe(file), folder / "start")
    return folder / "start" / "sft" / "model"


def prompts(path: Path = PROMPTS) -> list[Any]:
    from rlhf_cli.recipe.data import read_prompts

    return list(read_prompts(path))


class Raters:
    """Simulated people: Bradley-Terry votes on the true reward, with a random stream of their own."""

    def __init__(self, seed: int, agreement: float = AGREEMENT) -> None:
        from rlhf_cli.server.crowd import sharpness

        self._logits = sharpness(agreement)
        self._rng = np.random.default_rng(seed)

    def prefers_first(self, first: str, second: str) -> bool:
        logit = self._logits * (true_reward(first) - true_reward(second))
        return bool(self._rng.random() < 0.5 + 0.5 * math.tanh(0.5 * logit))


class Clock:
    """Seconds since the start, without what was spent in `paused`: measuring is nobody's work."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._paused_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._started - self._paused_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - since


@dataclass(frozen=True, slots=True)
class Point:
    """How good the policy is after so many votes and seconds."""

    step: int
    votes: float
    wall_s: float
    reward: float
    """Mean true reward of completions of held-out prompts."""
    kl_nats: float
    """A completion, against the start."""


class Meter:
    """Measures a policy on held-out prompts, always with the same random numbers."""

    def __init__(self, start: Path) -> None:
        from transformers import AutoModelForCausalLM

        from rlhf_cli.policy.generate import encode_prompt
        from rlhf_cli.policy.load import load_tokenizer, stop_token_ids

        self._start = AutoModelForCausalLM.from_pretrained(start).eval()
        self._tokenizer = load_tokenizer(str(start))
        self._stop = stop_token_ids(self._tokenizer, self._start)
        self._rows = [encode_prompt(self._tokenizer, p, 512) for p in prompts(HELDOUT) for _ in range(MEASURED)]

    def __call__(self, model: Any) -> tuple[float, float]:
        """Mean true reward, and KL to the start in nats a completion."""
        from rlhf_cli.policy.generate import sample, token_logps

        was_training = model.training
        model.eval()
        pad = self._tokenizer.pad_token_id
        with_settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "top_p": 1.0, "stop_ids": self._stop}
        sampled = sample(
            model, self._rows, [1.0] * len(self._rows), pad_id=pad, seed=1, batch_size=len(self._rows), **with_settings
        )
        ids = [s.token_ids for s in sampled]
        now, before = token_logps(model, self._rows, ids, pad), token_logps(self._start, self._rows, ids, pad)
        model.train(was_training)
        texts = [self._tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids]
        kl = [math.fsum(a) - math.fsum(b) for a, b in zip(now, before, strict=True)]
        return statistics.fmean(true_reward(text) for text in texts), statistics.fmean(kl)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean over runs, and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
