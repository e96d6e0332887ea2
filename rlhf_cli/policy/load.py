"""From `model:` in a recipe to weights and a tokenizer in memory."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.errors import DataError, MissingStage
from rlhf_cli.policy.packaged import PACKAGED, model_dir
from rlhf_cli.recipe.schema import Model

PAD = "[PAD]"
"""What a reward model pads with where its tokenizer has nothing of its own."""


def locate(path: str) -> str:
    """Where `from_pretrained` finds a model: a packaged model's folder, a local folder, or the hub id as it is.

    Raises:
        MissingStage: A packaged model that was not pulled yet.
    """
    if path in PACKAGED:
        if not model_dir(path).is_dir():
            raise MissingStage(f"the packaged model '{path}' is not on this machine yet; run: rlhf models pull {path}")
        return str(model_dir(path))
    return path


def precision(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if setting != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[setting]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad; padding is on the left, where generation needs it.

    One without a padding token pads with its end-of-sequence token. For a policy that is enough: its padding is masked
    by length, and the loss sees every end of an answer. A reward model needs `own_pad`.

    Raises:
        DataError: Nothing loadable there, or a tokenizer with nothing to pad with.
    """
    tokenizer = _from_pretrained(AutoTokenizer, path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of '{path}' has neither a padding nor an end-of-sequence token, so texts of different "
                'lengths cannot share a batch; set "eos_token" in its tokenizer_config.json'
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises:
        DataError: Nothing loadable there.
    """
    config: PretrainedConfig = _from_pretrained(AutoConfig, path)
    return config


def own_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a reward model pad on the right with a token that nothing else uses.

    Its head reads the last token that is not padding, so a padding token that also ends a text would hide that end.
    The new token is saved with model and tokenizer; it is masked everywhere, so its embedding stays as it starts.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
        if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def load_model(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model. Of its own generation settings only the special tokens are kept.

    Raises:
        DataError: Nothing loadable there.
    """
    model: PreTrainedModel = _from_pretrained(AutoModelForCausalLM, path, dtype=dtype)
    # How to sample is the recipe's to say: a repetition penalty that a model brings along would make what is sampled
    # another distribution than the one that is scored and trained.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    model.get_output_embeddings().__class__ = _Head
    return model


class _Head(torch.nn.Linear):
    """A vocabulary projection that is exact under autocast and fast on slices.

    Rounding logits to bfloat16 costs a few hundredths of a nat per token, which is what preference learning lives on.
    And projecting a non-contiguous slice makes torch copy the whole vocabulary matrix once per row (seen: 3.1 of 5.6
    seconds of generating).
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.contiguous().to(self.weight.dtype))


def _from_pretrained(auto_class: Any, path: str, **kwargs: Any) -> Any:
    location = locate(path)
    try:
        return auto_class.from_pretrained(location, **kwargs)
    except (OSError, ValueError) as error:
        offline = " (HF_HUB_OFFLINE is set, so the hub was not asked)" if os.environ.get("HF_HUB_OFFLINE") else ""
        known = ", ".join(PACKAGED)
        raise DataError(
            f"no model could be loaded from '{path}'{offline}: {str(error).splitlines()[0]}\n"
            f"model.path takes a folder, a hub id, or a packaged model ({known})"
        ) from error


def train_only_last_layers(model: PreTrainedModel, count: int) -> None:
    """Freeze everything but the last `count` transformer layers and what comes after them: norm, pooler, scalar head.

    The vocabulary projection of a language model stays frozen too.

    Raises:
        DataError: A backbone without a list of layers.
    """
    backbone = model.base_model
    lists = [(name, m) for name, m in backbone.named_modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise DataError(f"{type(model).__name__} has no list of layers, so model.last_layers means nothing for it")
    name, layers = max(lists, key=lambda found: len(found[1]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers[-count:]:
        layer.requires_grad_(True)
    parts = [part for part, _ in backbone.named_children()]
    for part in parts[parts.index(name.split(".")[0]) + 1 :]:
        backbone.get_submodule(part).requires_grad_(True)
    if model.get_output_embeddings() is None:
        for _, part in model.named_children():
            if part is not backbone:
                part.requires_grad_(True)


def lora_config(section: Model, task: str) -> LoraConfig | None:
    """The recipe's adapters on all linear layers, for peft's task type `task`; None for training the weights."""
    if section.lora is None:
        return None
    return LoraConfig(
        r=section.lora.rank,
        lora_alpha=section.lora.alpha or 2 * section.lora.rank,
        lora_dropout=section.lora.dropout,
        target_modules="all-linear",
        task_type=task,
    )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A reference that stays as `model` is now; weights that will not be trained are shared, not copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    reference: PreTrainedModel = copy.deepcopy(model, memo=shared)
    return reference.requires_grad_(False).eval()


def load_stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """As `stop_token_ids`, without loading the model."""
    try:
        return _stops(tokenizer, GenerationConfig.from_pretrained(locate(path)))
    except OSError:  # not every model brings generation settings; then its configuration has them
        return _stops(tokenizer, load_config(path))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Every token that ends an answer: the tokenizer's and what the model's generation settings add."""
    return _stops(tokenizer, model.generation_config)


def _stops(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | PretrainedConfig) -> list[int]:
    configured = getattr(settings, "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *extra] if i is not None})
