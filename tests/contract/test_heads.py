"""Heads apart from their backbone: what they read, in every architecture that is used here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_cli.feedback.refresh import LiveModel
from rlhf_cli.policy.heads import Heads, fresh_heads, get_head, save_heads
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.policy.scoring import About, RewardModel, load_reward_model, open_reward_model, write_about
from rlhf_cli.types import Message

TEXTS = [((Message("user", "what is it?"),), ["a river", "the sea, or so they say", ""])]


@pytest.fixture(params=["decoder", "encoder"])
def model(request: pytest.FixtureRequest, tiny: str, tiny_encoder: str) -> RewardModel:
    opened = open_reward_model(tiny if request.param == "decoder" else tiny_encoder)
    assert isinstance(opened, RewardModel)
    return opened


def test_heads_on_their_features_give_the_rewards_of_the_model(model: RewardModel) -> None:
    heads = Heads.of(model.model)
    (features_GH,) = model.features(TEXTS)
    assert features_GH.shape == (3, heads.weight.shape[1])
    (rewards_GK,) = model.rewards(TEXTS)
    assert heads.rewards(features_GH) == pytest.approx(rewards_GK, rel=1e-4, abs=1e-5)
    assert np.ptp(rewards_GK) > 1e-4


def test_the_model_has_its_head_back_after_a_look_at_the_features(model: RewardModel) -> None:
    before, head = model.rewards(TEXTS), get_head(model.model)
    model.features(TEXTS)
    assert get_head(model.model) is head
    assert np.array_equal(model.rewards(TEXTS)[0], before[0])


def test_heads_that_are_put_into_a_model_are_what_it_scores_by(model: RewardModel) -> None:
    heads = Heads.of(model.model)
    wide = Heads(np.concatenate([heads.weight, -2 * heads.weight]), np.zeros(2))
    (features_GH,) = model.features(TEXTS)
    wide.put_into(model.model)
    assert model.rewards(TEXTS)[0] == pytest.approx(wide.rewards(features_GH), rel=1e-4, abs=1e-5)


def test_an_ensemble_from_disk_has_as_many_heads(tiny: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = load_reward_model(tiny)
    fresh_heads(made, 4)
    save_heads(made, tmp_path)
    made.save_pretrained(tmp_path)
    load_tokenizer(tiny).save_pretrained(tmp_path)
    write_about(tmp_path, About(ensemble=4))
    opened = open_reward_model(str(tmp_path))
    assert isinstance(opened, RewardModel)
    heads = Heads.of(opened.model)
    assert heads.weight.shape[0] == 4
    assert heads.rewards(opened.features(TEXTS)[0]) == pytest.approx(opened.rewards(TEXTS)[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_refitted_model_can_be_saved_as_a_whole(tiny: str, tmp_path: Path, heads: int) -> None:
    opened = open_reward_model(tiny)
    assert isinstance(opened, RewardModel)
    opened.about = About(temperature=0.5, ensemble=heads if heads > 1 else None)
    live = LiveModel(opened)
    live.heads = Heads(np.random.default_rng(0).normal(size=(heads, live.first.weight.shape[1])), np.zeros(heads))
    wanted = live.heads.rewards(opened.features(TEXTS)[0])
    live.save(tmp_path)
    whole = open_reward_model(str(tmp_path))
    assert isinstance(whole, RewardModel)
    assert whole.rewards(TEXTS)[0] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert whole.about.temperature == 0.5
    assert whole.about.version
