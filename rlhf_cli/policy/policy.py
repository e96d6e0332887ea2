"""The model being trained, with everything that goes with it: reference, generator, tokenizer, precision."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.policy.generate import encode_prompt, sample, token_logps
from rlhf_cli.policy.load import (
    frozen_copy,
    load_model,
    load_tokenizer,
    lora_config,
    precision,
    stop_token_ids,
    train_only_last_layers,
)
from rlhf_cli.recipe.online import Sampling
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, Group, Message, Prompt

REFERENCE = "reference.safetensors"


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
    """

    def __init__(
        self, path: str, recipe: Recipe, *, train: bool = True, reference: PreTrainedModel | None = None
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
        self.model: PreTrainedModel | PeftModel = base if lora is None else get_peft_model(base, lora)
        if train and recipe.run_online is not None and recipe.run_online.learner.reference == "previous":
            own = {name for name, _ in trained_weights(self.model)}
            shared = {id(p): p for name, p in reference.named_parameters() if name not in own}
            self.reference = copy.deepcopy(reference, memo=shared)
        self.model.eval()
        self.stop_ids = stop_token_ids(self.tokenizer, base)
        self.pad_id = int(self.tokenizer.pad_token_id)
        assert recipe.data is not None
        self.max_prompt_tokens = recipe.data.max_prompt_tokens
        self.max_new_tokens = recipe.run_online.sampling.max_new_tokens if recipe.run_online else 0
        self.context_tokens: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.system_prompt = recipe.data.system_prompt
        self.phase = Stopwatch()

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
        temperatures = sampling.temperature if isinstance(sampling.temperature, list) else [sampling.temperature]
        spread = [temperatures[i * len(temperatures) // group_size] for i in range(group_size)]
        prompt_ids = [self.encode(p) for p in prompts]
        rows = [ids for ids in prompt_ids for _ in range(group_size)]
        with self.phase("generate"):
            sampled = sample(
                self.generator or self.model,
                rows,
                spread * len(prompts),
                max_new_tokens=sampling.max_new_tokens,
                top_p=sampling.top_p,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
                seed=seed * 1_000_003 + first_index,
            )
        with self.phase("reference"):
            token_ids = [s.token_ids for s in sampled]
            logps = self.logps(self.model, rows, token_ids)
            ref_logps = logps if self.reference is self.model else self.logps(self.reference, rows, token_ids)
            start_logps: Sequence[float | None] = [None] * len(rows)
            if self.start is not self.reference:
                start_logps = [sum(row) for row in self.logps(self.start, rows, token_ids)]
        completions = [
            Completion(self.decode(s.token_ids), s.token_ids, logp, ref_logp, s.ended, start_logp=start_logp)
            for s, logp, ref_logp, start_logp in zip(sampled, logps, ref_logps, start_logps, strict=True)
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

    @torch.no_grad()
    def renew_reference(self) -> None:
        """Hold the policy from now on to what it is now; groups that were sampled keep the reference of then."""
        targets = dict(self.reference.named_parameters())
        for name, weight in trained_weights(self.model):
            targets[name].copy_(weight)

    def save_reference(self, folder: Path) -> None:
        """Write the weights of the reference that are not those of the model that training started from."""
        weights = dict(self.reference.named_parameters())
        own = {name: weights[name].detach().contiguous() for name, _ in trained_weights(self.model)}
        save_file(own, folder / REFERENCE)

    @torch.no_grad()
    def load_reference(self, folder: Path) -> None:
        """Read what `save_reference` wrote."""
        targets = dict(self.reference.named_parameters())
        for name, weight in load_file(folder / REFERENCE).items():
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
