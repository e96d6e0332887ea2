"""Rewards to look at: the run's reward model, or what a simulated crowd is known to like."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.online.stream import Reward
from rlhf_cli.policy.scoring import PairwiseModel, RewardModel, open_reward_model
from rlhf_cli.server.tastes import taste
from rlhf_cli.stages.session import Session
from rlhf_cli.types import Prompt


def reward_model(session: Session) -> RewardModel | PairwiseModel:
    """The reward model of this run.

    Raises:
        MissingStage: It was not trained yet.
    """
    session.require("train-rm", session.run.train_rm_model)
    return open_reward_model(str(session.run.train_rm_model))


def reward_for_display(session: Session) -> tuple[Reward | None, str | None]:
    """What live view and evaluation call reward, and where it comes from; None with people and no reward model.

    A simulated crowd's taste is the truth that it votes by, so it comes before the score of the run's reward model,
    unless that model is what the policy learns from. Labels never come from here. A pairwise model has no reward that
    could be followed over prompts and steps, so it shows none.
    """
    recipe = session.recipe
    by_people = recipe.run_online is None or recipe.run_online.asks_people
    if by_people and recipe.flow is not None and recipe.flow.crowd is not None:
        score = taste(recipe.flow.crowd.taste)

        def by_taste(prompt: Prompt, completions: Sequence[str]) -> list[float]:
            return [score(prompt.text, c) for c in completions]

        return by_taste, f"taste '{recipe.flow.crowd.taste}' of the simulated crowd"
    if recipe.train_rm is not None and recipe.train_rm.kind == "bradley_terry":
        model = reward_model(session)
        return lambda prompt, completions: model.score(prompt.messages, completions), "reward model"
    return None, None


def score_for_best_of(session: Session) -> Reward | None:
    """What roles that keep the best of several choose by; None where there is no such role."""
    online = session.recipe.run_online
    if online is None or not any(role.best_of > 1 for role in online.sampling.roles or []):
        return None
    model = reward_model(session)
    return lambda prompt, completions: model.score(prompt.messages, completions)
