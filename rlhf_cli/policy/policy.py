"""The model being trained, with everything that goes with it: reference, generator, tokenizer, precision."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.policy.generate import Sampled, encode_prompt, sample, token_logps
from rlhf_cli.policy.load import (
    frozen_copy,
    load_model,
    load_tokenizer,
    lora_config,
    precision,
    stop_token_ids,
    train_only_last_layers,
)
from rlhf_cli.recipe.online import Role, Sampling
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, Group, Message, Prompt

REFERENCE, PREVIOUS = "reference.safetensors", "previous.safetensors"

Score = Callable[[Prompt, Sequence[str]], list[float]]
"""Scores completions of a prompt; higher is better."""


class Stopwatch:
    """Wall seconds per named phase since the last `lap`."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Return what was spent and start over."""
        spent, self._spent = self._spent, {}
        return spent


class Policy:
    """Samples groups and says how likely completions are under the policy and under its frozen reference.

    `model` holds the trained weights in float32 (a PeftModel with `model.lora`). With a low-precision generator,
    completions come from a copy that `sync` brings up to date.

    Args:
        path: Folder, hub id or packaged model to start from.
        train: Make the weights that the recipe names trainable, and keep a reference as they are now; it shares every
            weight that is not trained. Without it nothing is trainable.
        reference: For a policy that is not trained: what to compare it with; itself when left out.
        score: Says which candidate is best, for roles that sample `best_of` several.
    """

    def __init__(
        self,
        path: str,
        recipe: Recipe,
        *,
        train: bool = True,
        reference: PreTrainedModel | None = None,
        score: Score | None = None,
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        base = load_model(path).to(device)
        lora = lora_config(recipe.model, "CAUSAL_LM") if train else None
        if lora is not None or not train:
            base.requires_grad_(False)
        elif recipe.model.last_layers is not None:
            train_only_last_layers(base, recipe.model.last_layers)
        self.dtype = precision(recipe.compute.precision, device)
        generator_dtype = precision(recipe.compute.generator_precision, device)
        self.generator = None if generator_dtype == base.dtype else copy.deepcopy(base).to(generator_dtype).eval()
        if reference is None:
            reference = frozen_copy(base) if train else base
        self.start = self.reference = reference
        """The model that training started from, and what the policy is held to."""
        self.model: PreTrainedModel | PeftModel = base
        if lora is not None:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(recipe.seed)  # adapters start random, and again as they were after a crash
                self.model = get_peft_model(base, lora)
        self.previous: PreTrainedModel | None = None
        """What `policy: previous` samples from; None where no role does."""
        if train and recipe.run_online is not None:
            if recipe.run_online.learner.reference == "previous":
                self.reference = self._copy_of_start()
            if recipe.run_online.samples_previous:
                self.previous = self._copy_of_start()
        self.model.eval()
        self.stop_ids = stop_token_ids(self.tokenizer, base)
        self.pad_id = int(self.tokenizer.pad_token_id)
        assert recipe.data is not None
        self.max_prompt_tokens = recipe.data.max_prompt_tokens
        self.max_new_tokens = recipe.run_online.sampling.max_new_tokens if recipe.run_online else 0
        self.context_tokens: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.system_prompt = recipe.data.system_prompt
        self.score = score
        self.phase = Stopwatch()

    def _copy_of_start(self) -> PreTrainedModel:
        """The model that training started from, to be renewed; weights that are not trained are shared."""
        own = {name for name, _ in trained_weights(self.model)}
        shared = {id(p): p for name, p in self.start.named_parameters() if name not in own}
        return copy.deepcopy(self.start, memo=shared)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the precision of the recipe; weights and sums of log-probabilities stay float32."""
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, with the recipe's system prompt where the prompt has none of its own.

        Raises:
            DataError: Longer than the recipe allows, or than the model can hold together with its answer.
        """
        if self.system_prompt is not None and prompt.messages[0].role != "system":
            prompt = Prompt(prompt.id, (Message("system", self.system_prompt), *prompt.messages))
        ids = encode_prompt(self.tokenizer, prompt, self.max_prompt_tokens)
        if self.context_tokens is not None and len(ids) + self.max_new_tokens > self.context_tokens:
            raise DataError(
                f"prompt '{prompt.id}' has {len(ids)} tokens, which with the {self.max_new_tokens} of "
                f"run_online.sampling.max_new_tokens is more than the {self.context_tokens} that the model can hold; "
                "shorten either"
            )
        return ids

    def sample_groups(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        group_size: int,
        *,
        first_index: int,
        prefix: str,
        step: int,
        seed: int,
    ) -> list[Group]:
        """Sample one group per prompt, with log-probabilities under policy and reference.

        Args:
            first_index: Index of the first group; the others follow.
            prefix: Group ids are `<prefix>-<index>`.
            step: Learner steps that the policy has taken.
            seed: Together with `first_index` it fixes the random numbers.
        """
        roles = sampling.of_group(group_size)
        prompt_ids = [self.encode(p) for p in prompts]
        with self.phase("generate"):
            candidates = [(ids, role) for ids in prompt_ids for role in roles for _ in range(role.best_of)]
            drawn = iter(self._draw(candidates, sampling.max_new_tokens, seed * 1_000_003 + first_index))
        with self.phase("best_of"):
            sampled = [self._best(p, [next(drawn) for _ in range(r.best_of)]) for p in prompts for r in roles]
        rows, token_ids = [ids for ids in prompt_ids for _ in roles], [s.token_ids for s in sampled]
        with self.phase("reference"):
            logps = self._sampling_logps(rows, token_ids, [role.policy for role in roles] * len(prompts))
            ref_logps = logps if self.reference is self.model else self.logps(self.reference, rows, token_ids)
            start_logps: Sequence[float | None] = [None] * len(rows)
            if self.start is not self.reference:
                start_logps = [sum(row) for row in self.logps(self.start, rows, token_ids)]
        completions = [
            Completion(self.decode(s.token_ids), s.token_ids, logp, ref_logp, s.ended, role.name, start_logp)
            for s, logp, ref_logp, role, start_logp in zip(
                sampled, logps, ref_logps, roles * len(prompts), start_logps, strict=True
            )
        ]
        return [
            Group(
                id=f"{prefix}-{first_index + i:06d}",
                index=first_index + i,
                prompt=prompt,
                prompt_ids=prompt_ids[i],
                completions=tuple(completions[i * group_size : (i + 1) * group_size]),
                policy_step=step,
            )
            for i, prompt in enumerate(prompts)
        ]

    def _draw(self, rows: Sequence[tuple[tuple[int, ...], Role]], max_new_tokens: int, seed: int) -> list[Sampled]:
        """One completion per row of prompt and role; the policy as it is and as it was have random numbers apart."""
        drawn: dict[int, Sampled] = {}
        for number, (policy, model) in enumerate(self._sources().items()):
            mine = [k for k, (_, role) in enumerate(rows) if role.policy == policy]
            if mine:
                some = sample(
                    model,
                    [rows[k][0] for k in mine],
                    [rows[k][1].temperature for k in mine],
                    max_new_tokens=max_new_tokens,
                    top_p=[rows[k][1].top_p for k in mine],
                    stop_ids=self.stop_ids,
                    pad_id=self.pad_id,
                    seed=seed + number * 2_654_435_769,  # far away in the lower 32 bits too: a CPU looks at no others
                )
                drawn |= dict(zip(mine, some, strict=True))
        return [drawn[k] for k in range(len(rows))]

    def _sources(self) -> dict[str, PreTrainedModel | PeftModel]:
        """What samples, by the word of a role."""
        current = {"current": self.generator or self.model}
        return current if self.previous is None else {**current, "previous": self.previous}

    def _best(self, prompt: Prompt, candidates: Sequence[Sampled]) -> Sampled:
        """The candidate with the highest score; the only one where there is one."""
        if len(candidates) == 1:
            return candidates[0]
        if self.score is None:
            raise DataError("sampling the best of several needs a reward model, and this policy was given none")
        scores = self.score(prompt, [self.decode(c.token_ids) for c in candidates])
        numbers = [k for k, score in enumerate(scores) if math.isfinite(score)]
        if not numbers:
            raise DataError(
                f"the reward model gave no number for any of {len(candidates)} answers to prompt '{prompt.id}', so "
                "none of them is best; train it again, or take `best_of` out of run_online.sampling.roles"
            )
        return candidates[max(numbers, key=scores.__getitem__)]

    def _sampling_logps(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], policies: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Token log-probabilities of each row under the weights that sampled it."""
        found: dict[int, tuple[float, ...]] = {}
        for policy, model in (("current", self.model), ("previous", self.previous)):
            mine = [k for k, name in enumerate(policies) if name == policy]
            if mine and model is not None:
                some = self.logps(model, [prompts[k] for k in mine], [completions[k] for k in mine])
                found |= dict(zip(mine, some, strict=True))
        return [found[k] for k in range(len(prompts))]

    def logps(
        self, model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """Token log-probabilities in the precision that training uses, so that the two can be compared."""
        was_training = model.training
        model.eval()
        with self.autocast():
            rows = token_logps(model, prompts, completions, self.pad_id)
        model.train(was_training)
        return rows

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the trained weights to the generator, adapters merged in; nothing to do where there is only one copy."""
        if self.generator is None:
            return
        with self.phase("sync"):
            targets = dict(self.generator.named_parameters())
            for name, weight in trained_weights(self.model):
                targets[name].copy_(weight)

    def renew_reference(self) -> None:
        """Hold the policy from now on to what it is now; groups that were sampled keep the reference of then."""
        self._renew(self.reference)

    def renew_previous(self) -> None:
        """What `policy: previous` samples from is the policy as it is now."""
        if self.previous is not None:
            self._renew(self.previous)

    def save_copies(self, folder: Path) -> None:
        """Write the weights of a renewed reference and of the previous policy, where there are such."""
        for file, model in self._copies().items():
            weights = dict(model.named_parameters())
            save_file({n: weights[n].detach().contiguous() for n, _ in trained_weights(self.model)}, folder / file)

    @torch.no_grad()
    def load_copies(self, folder: Path) -> None:
        """Read what `save_copies` wrote."""
        for file, model in self._copies().items():
            targets = dict(model.named_parameters())
            for name, weight in load_file(folder / file).items():
                targets[name].copy_(weight)

    def _copies(self) -> dict[str, PreTrainedModel]:
        copies = {REFERENCE: None if self.reference is self.start else self.reference, PREVIOUS: self.previous}
        return {file: model for file, model in copies.items() if model is not None}

    @torch.no_grad()
    def _renew(self, model: PreTrainedModel) -> None:
        targets = dict(model.named_parameters())
        for name, weight in trained_weights(self.model):
            targets[name].copy_(weight)

    def save(self, path: str) -> None:
        """Save model (adapters merged in) and tokenizer as a folder that `from_pretrained` loads."""
        merged = copy.deepcopy(self.model).merge_and_unload() if isinstance(self.model, PeftModel) else self.model
        merged.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def trained_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values, in the model without adapters, of all weights that training changes."""
    if not isinstance(model, PeftModel):
        yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            adapter = module.active_adapters[0]
            yield f"{name}.weight", module.get_base_layer().weight + module.get_delta_weight(adapter)
