"""What the budget allows: what is spent, and the most that groups still out with people may add."""

from __future__ import annotations

from rlhf_cli.recipe.schema import Recipe


def affords(recipe: Recipe, votes: float, groups: int) -> bool:
    """Whether the budget holds if `groups` groups get as many votes as they may, on top of `votes` received."""
    budget, flow = recipe.budget, recipe.flow
    assert flow is not None
    assert recipe.run_online is not None
    most = flow.responses.max
    if recipe.run_online.incomplete == "resubmit_once":
        most += flow.responses.min - 1  # a group is asked about again only where it got fewer than the minimum
    expected = votes + groups * most
    usd = expected * budget.usd_per_1k_votes / 1000
    return (budget.votes is None or expected <= budget.votes) and (budget.usd is None or usd <= budget.usd)
