"""A reward model in place of people: its calibrated probabilities as the votes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf_cli.feedback.at_once import AnswersAtOnce
from rlhf_cli.feedback.scores import Scored, less_length, score_groups
from rlhf_cli.journal.events import Event, GroupRanked
from rlhf_cli.policy.scoring import PairwiseModel, RewardModel
from rlhf_cli.types import Group

NOT_FINITE = "the reward model gave a score that is not a number"


class RewardModelFeedback(AnswersAtOnce):
    """One expected vote per pair, split by the probability that the model gives to either side.

    Args:
        length_penalty: Taken from a completion's log-odds for every character, in scores and votes alike.
    """

    def __init__(
        self,
        model: RewardModel | PairwiseModel,
        journal: Callable[[Event], object],
        length_penalty: float = 0.0,
    ) -> None:
        super().__init__(journal)
        self.model, self.length_penalty = model, length_penalty

    def submit(self, group: Group) -> None:
        (scored,) = score_groups(self.model, [group])
        if scored.finite:
            self._rank(group, model_ranked(group, scored, self.length_penalty))
        else:
            self._set_aside(group, NOT_FINITE)


def model_ranked(group: Group, scored: Scored, length_penalty: float) -> GroupRanked:
    """The entry in the journal of a group that a model ranked: one expected vote a pair, and its scores if it has any.

    Its source names the version of the model.
    """
    scored = less_length(scored, [c.text for c in group.completions], length_penalty)
    wins_GG, scores = scored.probabilities, scored.scores
    np.fill_diagonal(wins_GG, 0)
    return GroupRanked(
        group_id=group.id,
        source=f"reward_model:{scored.version}",
        wins=tuple(tuple(row) for row in wins_GG.tolist()),
        latency_s=0.0,
        complete=True,
        scores=None if scores is None else tuple(scores.tolist()),
    )
