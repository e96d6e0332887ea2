"""The head of a reward model: one number per text, or several that vote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.errors import DataError
from rlhf_cli.types import WinMatrix

HEADS = "heads.safetensors"

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """The last layer of a reward model apart from its backbone: K heads side by side over H features."""

    weight: Array
    """Shape (K, H)."""
    bias: Array
    """Shape (K,); 0 where the model has none."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        head = get_head(model)
        weight = head.weight.detach().double().cpu().numpy()
        return cls(weight, np.zeros(len(weight)) if head.bias is None else head.bias.detach().double().cpu().numpy())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        found = load(data)
        return cls(found["weight"], found["bias"])

    def to_bytes(self) -> bytes:
        """As safetensors, in full precision."""
        return save({"weight": self.weight, "bias": self.bias})

    def rewards(self, features: Array) -> Array:
        """What each head gives to texts of these features, shape (G, H): shape (G, K)."""
        return np.asarray(features @ self.weight.T + self.bias)

    def put_into(self, model: nn.Module) -> None:
        """Make them the last layer of `model`."""
        old = get_head(model)
        wide = nn.Linear(self.weight.shape[1], len(self.weight), bias=old.bias is not None)
        with torch.no_grad():
            wide.weight.copy_(torch.from_numpy(self.weight))
            if wide.bias is not None:
                wide.bias.copy_(torch.from_numpy(self.bias))
        set_head(model, wide.to(old.weight.device, old.weight.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class VotedFeatures:
    """Completions as heads see them, and the votes between them."""

    index: int
    """Of the group in its run: what is random about it follows from this."""
    features: Array
    """Shape (G, H)."""
    wins: WinMatrix


def head_name(model: nn.Module) -> str:
    """Where the last linear layer of a sequence classifier is, as in `get_submodule`.

    Raises:
        DataError: Nothing of the names that transformers uses.
    """
    modules = dict(model.named_modules())
    for name in ("score", "classifier", "classifier.out_proj"):
        if isinstance(modules.get(name), nn.Linear):
            return name
    raise DataError(f"{type(model).__name__} has no head that is known here: `score` or `classifier`")


def get_head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a sequence classifier."""
    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear)
    return head


def set_head(model: nn.Module, head: nn.Linear) -> None:
    """Put another last layer in its place."""
    *above, name = head_name(model).split(".")
    setattr(model.get_submodule(".".join(above)), name, head)


@contextmanager
def headless(model: nn.Module) -> Iterator[None]:
    """Without its last layer the model gives what that layer reads: one row of features per text."""
    head, (*above, name) = get_head(model), head_name(model).split(".")
    parent = model.get_submodule(".".join(above))
    setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, name, head)


def fresh_heads(model: PreTrainedModel, count: int, deviation: float = 0.02) -> None:
    """Replace the head by `count` random ones side by side, whose numbers come out as as many columns."""
    head = get_head(model)
    wide = nn.Linear(head.in_features, count, bias=head.bias is not None)
    nn.init.normal_(wide.weight, std=deviation)
    if wide.bias is not None:
        nn.init.zeros_(wide.bias)
    set_head(model, wide)


def save_heads(model: PreTrainedModel, folder: Path) -> None:
    """Write the heads of an ensemble, and leave their mean in the model: its plain score is the mean of theirs."""
    wide = get_head(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in wide.state_dict().items()}, folder / HEADS)
    mean = nn.Linear(wide.in_features, 1, bias=wide.bias is not None)
    with torch.no_grad():
        mean.weight.copy_(wide.weight.mean(0, keepdim=True))
        if wide.bias is not None:
            mean.bias.copy_(wide.bias.mean(0, keepdim=True))
    set_head(model, mean)


def load_heads(model: PreTrainedModel, folder: Path) -> None:
    """Give a model its ensemble back, in place of the mean."""
    state = load_file(folder / HEADS)
    count, width = state["weight"].shape
    wide = nn.Linear(width, count, bias="bias" in state)
    wide.load_state_dict(state)
    set_head(model, wide.to(model.device))


def set_dropout(model: nn.Module, share: float) -> None:
    """Drop this share of hidden units while training, everywhere that the architecture has a place for it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name in _ATTENTION:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


_ATTENTION: Sequence[str] = ("attention_dropout",)
