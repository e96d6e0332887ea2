"""A reward model in place of people: its probabilities are the votes, and a score that is none is no label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from stream_world import Disk

from rlhf_cli.feedback.reward_model import RewardModelFeedback
from rlhf_cli.feedback.scores import Scored, by_rewards, less_length
from rlhf_cli.journal.events import GroupRanked, GroupSampled, GroupSetAside
from rlhf_cli.policy.scoring import About, Array, Reader, RewardModel, Text, open_reward_model
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


def test_scores_are_rewards_over_temperature_and_the_votes_follow_from_their_differences() -> None:
    scored = by_rewards("v1", np.array([[3.0, 5.0], [1.0, -1.0]]), 2.0)
    assert scored.heads is not None
    assert scored.heads.tolist() == [[1.5, 0.5], [2.5, -0.5]]
    assert scored.scores is not None
    assert scored.scores.tolist() == [2.0, 0.0]
    assert scored.spread == pytest.approx([math.sqrt(0.5), math.sqrt(0.5)])
    assert scored.probabilities[0, 1] == pytest.approx(1 / (1 + math.exp(-2)))
    assert by_rewards("v1", np.array([[3.0], [1.0]]), 2.0).spread is None


def test_the_length_penalty_is_taken_for_every_character_from_scores_and_votes_alike() -> None:
    texts = ["x" * 10, "y" * 4]
    scored = less_length(by_rewards("v1", np.array([[2.0], [1.0]]), 1.0), texts, 0.25)
    assert scored.scores is not None
    assert scored.scores.tolist() == [-0.5, 0.0]
    assert scored.probabilities[0, 1] == pytest.approx(1 / (1 + math.exp(0.5)))
    compared = less_length(Scored("v1", np.array([[0.0, 1.0], [-1.0, 0.0]])), texts, 0.25)
    assert compared.scores is None
    assert np.array_equal(compared.log_odds, scored.log_odds)


def test_the_penalty_does_not_depend_on_the_scale_of_the_rewards() -> None:
    texts = ["x" * 10, "y" * 4]
    small = less_length(by_rewards("v1", np.array([[2.0], [1.0]]), 1.0), texts, 0.25)
    large = less_length(by_rewards("v1", np.array([[200.0], [100.0]]), 100.0), texts, 0.25)
    assert np.array_equal(large.log_odds, small.log_odds)


def test_a_pairwise_model_gives_votes_and_no_scores(feedback: RewardModelFeedback, disk: Disk) -> None:
    feedback.submit(group(1.0, 0.0))
    (ranked,) = feedback.collect()
    assert isinstance(ranked, RankedGroup)
    assert ranked.scores is None
    assert disk.of(GroupRanked)[0].scores is None


@pytest.mark.parametrize("penalty", [0.0, 0.02])
def test_a_scalar_model_gives_scores_that_say_what_its_votes_say(tiny: str, disk: Disk, penalty: float) -> None:
    model = open_reward_model(tiny)
    assert isinstance(model, RewardModel)
    model.about = replace(model.about, temperature=0.5)
    feedback = RewardModelFeedback(model, disk.append, penalty)
    asked = group(10.0, -2.5, 0.125)
    feedback.submit(asked)
    (ranked,) = feedback.collect()
    assert isinstance(ranked, RankedGroup)
    texts = [c.text for c in asked.completions]
    wanted = [2 * r - penalty * len(t) for r, t in zip(model.score(asked.prompt.messages, texts), texts, strict=True)]
    assert ranked.scores == pytest.approx(wanted, abs=1e-12)
    assert ranked.wins.wins[0, 1] == pytest.approx(1 / (1 + math.exp(wanted[1] - wanted[0])), abs=1e-12)
    assert disk.of(GroupRanked)[0].scores == ranked.scores
