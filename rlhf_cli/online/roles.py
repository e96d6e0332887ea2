"""What each role adds to the groups: its rewards, its lengths, and how often it is preferred to the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_cli.types import Completion, RankedGroup


@dataclass(slots=True)
class RoleFigures:
    """Of the completions that one role sampled since the last step."""

    tokens: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def add(self, completion: Completion, reward: float | None) -> None:
        self.tokens.append(len(completion.token_ids))
        if reward is not None:
            self.rewards.append(reward)


def role_metrics(fresh: Mapping[str, RoleFigures], groups: Sequence[RankedGroup]) -> dict[str, float]:
    """Rows of metrics.jsonl, `role/<name>/...`: of what was sampled since the last step, and of what trained in it."""
    row = {}
    for name, figures in fresh.items():
        row[f"role/{name}/length_tokens"] = statistics.fmean(figures.tokens)
        if figures.rewards:
            row[f"role/{name}/reward"] = statistics.fmean(figures.rewards)
    return row | {f"role/{name}/win_frac": share for name, share in win_shares(groups).items()}


def win_shares(groups: Iterable[RankedGroup]) -> dict[str, float]:
    """Of the votes between a completion of each role and one of another, the share that it won.

    Votes within a role say nothing about it and do not count; a role without others' votes is left out. Shares of
    several roles do not add up to 1 unless there are two.
    """
    won: dict[str, float] = {}
    votes: dict[str, float] = {}
    for ranked in groups:
        roles = np.array([completion.role for completion in ranked.group.completions])
        for name in dict.fromkeys(roles.tolist()):
            mine, wins = roles == name, ranked.wins.wins
            won[name] = won.get(name, 0.0) + float(wins[np.ix_(mine, ~mine)].sum())
            lost = float(wins[np.ix_(~mine, mine)].sum())
            votes[name] = votes.get(name, 0.0) + float(wins[np.ix_(mine, ~mine)].sum()) + lost
    return {name: won[name] / votes[name] for name in won if votes[name]}
