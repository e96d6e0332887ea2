"""A reward model in place of people: its calibrated probabilities as the votes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf_cli.feedback.at_once import AnswersAtOnce
from rlhf_cli.journal.events import Event, GroupRanked
from rlhf_cli.policy.scoring import PairwiseModel, RewardModel
from rlhf_cli.types import Group


class RewardModelFeedback(AnswersAtOnce):
    """One expected vote per pair, split by the probability that the model gives to either side."""

    def __init__(self, model: RewardModel | PairwiseModel, journal: Callable[[Event], object]) -> None:
        super().__init__(journal)
        self.model = model

    def submit(self, group: Group) -> None:
        wins_GG = self.model.probability(group.prompt.messages, [c.text for c in group.completions])
        if not np.isfinite(wins_GG).all():
            self._set_aside(group, "the reward model gave a score that is not a number")
            return
        np.fill_diagonal(wins_GG, 0)
        wins = tuple(tuple(row) for row in wins_GG.tolist())
        source = "reward_model:train_rm"
        self._rank(group, GroupRanked(group_id=group.id, source=source, wins=wins, latency_s=0.0, complete=True))
