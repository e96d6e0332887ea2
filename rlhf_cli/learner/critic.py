"""The critic of PPO: what a completion will still earn, token by token, read by a copy of the reward model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.policy.generate import positions
from rlhf_cli.policy.heads import get_head, head_name
from rlhf_cli.policy.load import load_tokenizer, lora_config, train_only_last_layers
from rlhf_cli.policy.scoring import load_reward_model, read_about
from rlhf_cli.recipe.schema import Model


class Critic(nn.Module):
    """Expects one number before each token of a completion is drawn, from the tokens before it alone."""

    def __init__(self, model: PreTrainedModel | PeftModel, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.eval()  # dropout would be noise in the value that its own clip compares with

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Values, right-aligned as `completion_logps`, shape (B, longest completion); padding holds anything."""
        classifier = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        longest = max(1, int(lengths_B.max()))
        hidden_BTH = classifier.base_model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions(mask_BT), use_cache=False
        ).last_hidden_state[:, -longest - 1 : -1]
        with torch.autocast(ids_BT.device.type, enabled=False):  # sums of rewards need more digits than bfloat16 has
            values_BT: Tensor = classifier.get_submodule(self.head)(hidden_BTH.float())[:, :, 0]
        return values_BT


def load_critic(
    folder: Path, tokenizer: PreTrainedTokenizerBase, section: Model, device: torch.device, seed: int
) -> Critic:
    """A critic that starts as the reward model in `folder`, on the scale of its calibrated scores.

    Args:
        tokenizer: Of the policy, whose tokens it will read.
        section: Says which weights are trained, as of the policy; the head always is.
        seed: Of new adapters.

    Raises:
        DataError: The reward model knows other tokens than the policy, or reads two completions at once.
    """
    about = read_about(folder)
    if about is not None and about.kind == "pairwise":
        raise DataError(
            f"the reward model in {folder} compares completions, a critic has to score one: use bradley_terry"
        )
    known = load_tokenizer(str(folder)).get_vocab()
    if any(known.get(token) != place for token, place in tokenizer.get_vocab().items()):
        raise DataError(
            f"the reward model in {folder} does not know the policy's tokens, so the critic of ppo cannot start as it. "
            "Leave train_rm.model out, or name a model with the policy's tokenizer, and train it again."
        )
    model = load_reward_model(str(folder)).to(device)
    with torch.no_grad():
        for parameter in get_head(model).parameters():
            parameter.div_(about.temperature if about is not None else 1.0)
    name = head_name(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if (lora := lora_config(section, "SEQ_CLS")) is not None:
            return Critic(get_peft_model(model, lora), name)
    if section.last_layers is not None:
        train_only_last_layers(model, section.last_layers)
    return Critic(model, name)
