"""A tiny model of random weights on disk, and recipes in memory, for tests that need a real model but no wits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_cli.recipe.schema import FromScratch, Recipe
from rlhf_cli.types import Message, Prompt

TEXTS = ["What is a river? Water that flows to the sea.", "Why is the sky blue? Light is scattered.", "Say hello. Hi!"]

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a two-layer model, its weights large enough for every token of the context to matter."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_cli.policy.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(TEXTS, FromScratch(layers=2, hidden=32, heads=2), 3, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a two-layer encoder in the shape of BERT, with 64 positions and a letter a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [*marks, *"abcdefghijklmnopqrstuvwxyz?!.,", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz?!.,")]
    core = Tokenizer(models.WordPiece({token: n for n, token in enumerate(letters)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = BertModel(
            BertConfig(
                vocab_size=len(letters),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.2,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tiny: str) -> MakeRecipe:
    """Makes a recipe on the tiny model: `recipe(model={"lora": {}}, run_online={"steps": 3})`."""

    def make(model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        online = {"steps": 2, "prompts_per_step": 2, "group_size": 3, "sampling": {"max_new_tokens": 6}}
        online |= sections.pop("run_online", {})
        base: dict[str, Any] = {
            "name": "tiny",
            "seed": 7,
            "model": {"path": tiny, **(model or {})},
            "data": {"prompts": "prompts.jsonl"},
            "flow": {
                "service": "embedded",
                "instruction": "Which is better?",
                "responses": {"min": 1, "desired": 2, "max": 3},
                "crowd": {},
            },
            "compute": {"precision": "fp32", "generator_precision": "fp32", "threads": 1},
        }
        return Recipe.model_validate({**base, **sections, "run_online": online})

    return make


def prompt(text: str, name: str = "p") -> Prompt:
    return Prompt(name, (Message("user", text),))
