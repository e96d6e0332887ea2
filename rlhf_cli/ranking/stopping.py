"""When the best of a group is known well enough, so that nobody votes on it any longer."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_cli.ranking.bradley_terry import TAU, components, fit, p_best
from rlhf_cli.types import WinMatrix


class Verdict(NamedTuple):
    """What the votes on a group say about its winner."""

    stop: bool
    leader: int
    p_leader: float
    """Probability that the leader is the best of the group, right to about 0.01."""


def judge_best(wins: WinMatrix, min_votes: float, threshold: float = 0.9, tau: float = TAU) -> Verdict:
    """Stop once the leader is the best with probability `threshold`, after `min_votes` and all are connected.

    A posterior does not mind being looked at after every vote: with a prior that fits, at least a share `threshold` of
    the leaders stopped at are the best of their groups.

    Raises:
        ValueError: `threshold` is not a probability, or `wins` is empty.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is a probability between 0 and 1, not {threshold}")
    if wins.size == 0:
        raise ValueError("a group without completions has no best one")
    p_G = p_best(*fit(wins.wins, tau))
    leader = int(p_G.argmax())
    connected = not components(wins.wins + wins.wins.T > 0).any()
    return Verdict(bool(connected and wins.votes >= min_votes and p_G[leader] >= threshold), leader, float(p_G[leader]))
