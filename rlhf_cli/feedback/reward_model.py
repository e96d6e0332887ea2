"""A reward model in place of people: its calibrated probabilities as the votes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rlhf_cli.journal.events import GroupRanked, GroupSetAside
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.policy.scoring import PairwiseModel, RewardModel
from rlhf_cli.types import Group, RankedGroup, Unranked, WinMatrix


class RewardModelFeedback:
    """Answers at once; one expected vote per pair, split by the probability that the model gives to either side."""

    def __init__(self, model: RewardModel | PairwiseModel, journal: Journal) -> None:
        self.model, self.journal = model, journal
        self._decided: list[RankedGroup | Unranked] = []

    def submit(self, group: Group) -> None:
        wins_GG = self.model.probability(group.prompt.messages, [c.text for c in group.completions])
        if not np.isfinite(wins_GG).all():
            reason = "the reward model gave a score that is not a number"
            self.journal.append(GroupSetAside(group_id=group.id, reason=reason))
            self._decided.append(Unranked(group, reason))
            return
        np.fill_diagonal(wins_GG, 0)
        ranked = RankedGroup(group, WinMatrix(wins_GG), source="reward_model:train_rm", latency_s=0.0, complete=True)
        wins = tuple(tuple(row) for row in ranked.wins.wins.tolist())
        self.journal.append(
            GroupRanked(group_id=group.id, source=ranked.source, wins=wins, latency_s=0.0, complete=True)
        )
        self._decided.append(ranked)

    def resume(self, open_groups: Iterable[GroupState]) -> None:
        """Answer groups that an earlier process was about to answer."""
        for state in open_groups:
            self.submit(state.sampled.group())

    def collect(self) -> list[RankedGroup | Unranked]:
        decided, self._decided = self._decided, []
        return decided

    def status(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
