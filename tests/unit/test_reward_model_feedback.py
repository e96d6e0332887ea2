"""A reward model in place of people: its probabilities are the votes, and a score that is none is no label."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from stream_world import Disk

from rlhf_cli.feedback.reward_model import RewardModelFeedback
from rlhf_cli.journal.events import GroupRanked, GroupSampled, GroupSetAside
from rlhf_cli.policy.scoring import About, Array, Reader, Text
from rlhf_cli.types import Completion, Group, Message, Prompt, RankedGroup, Unranked


class Scorer(Reader):
    """Reads the reward of a completion from its text."""

    def __init__(self) -> None:
        self.about = About()

    def logits(self, texts: Sequence[Text]) -> list[Array]:
        rewards = [np.array([float(c) for c in completions]) for _, completions in texts]
        return [r[:, None] - r[None, :] for r in rewards]


def group(*rewards: float, name: str = "g") -> Group:
    completions = tuple(Completion(str(reward), (1,), (-1.0,), (-1.0,), True) for reward in rewards)
    return Group(name, 0, Prompt("p", (Message("user", "Hi"),)), (1,), completions, 0)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def feedback(disk: Disk) -> RewardModelFeedback:
    return RewardModelFeedback(Scorer(), disk.append)  # type: ignore[arg-type]


def test_every_pair_is_one_vote_split_by_bradley_terry(feedback: RewardModelFeedback, disk: Disk) -> None:
    asked = group(1.0, 0.0, -2.0)
    disk.append(GroupSampled.of(asked))
    feedback.submit(asked)
    (ranked,) = feedback.collect()
    assert isinstance(ranked, RankedGroup)
    wins = ranked.wins.wins
    assert wins[0, 1] == pytest.approx(1 / (1 + math.exp(-1)))
    assert wins[2, 0] == pytest.approx(1 / (1 + math.exp(3)))
    assert np.allclose(wins + wins.T, 1 - np.eye(3))
    assert ranked.votes_paid == 0
    assert feedback.collect() == []
    (event,) = disk.of(GroupRanked)
    assert event.matrix() == ranked.wins
    assert disk.state().votes_total == 0


def test_rewards_far_apart_are_certain(feedback: RewardModelFeedback) -> None:
    feedback.submit(group(1e5, -1e5))
    (ranked,) = feedback.collect()
    assert isinstance(ranked, RankedGroup)
    assert ranked.wins.wins.tolist() == [[0, 1], [0, 0]]


def test_a_score_that_is_not_a_number_is_no_label(feedback: RewardModelFeedback, disk: Disk) -> None:
    feedback.submit(group(1.0, math.nan))
    (unranked,) = feedback.collect()
    assert isinstance(unranked, Unranked)
    assert "not a number" in unranked.reason
    assert len(disk.of(GroupSetAside)) == 1
    assert not disk.of(GroupRanked)


def test_a_group_that_a_crash_left_without_an_answer_is_answered(feedback: RewardModelFeedback, disk: Disk) -> None:
    disk.append(GroupSampled.of(group(1.0, 0.0)))
    feedback.resume(disk.state().open_groups)
    assert len(feedback.collect()) == 1
    assert not disk.state().open_groups
