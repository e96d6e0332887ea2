"""The parts of hybrid feedback, as the recipe wants them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from rlhf_cli.feedback.hybrid import HybridFeedback
from rlhf_cli.feedback.refresh import LiveModel, Refresher
from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.journal.events import Event
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import RunState
from rlhf_cli.learner.refit import refit_heads
from rlhf_cli.policy.scoring import RewardModel
from rlhf_cli.stages.rewards import reward_model
from rlhf_cli.stages.selection import affords, chooser_of
from rlhf_cli.stages.session import Session, put_in_place

AskPeople = Callable[[Callable[[Event], object]], AbstractContextManager[VotesFeedback]]
"""Reaches people for the length of a block; takes what their events are journalled with."""


@contextmanager
def hybrid_of(session: Session, state: RunState, ask_people: AskPeople) -> Iterator[HybridFeedback]:
    """The reward model of the run for all groups, people for some, and a refit on what they said.

    At the end of the run its last version is left in `online/reward_model/model`, where it is not the first.
    """
    recipe, online, run = session.recipe, session.recipe.run_online, session.run
    assert online is not None
    model = reward_model(session)
    assert isinstance(model, RewardModel)  # a recipe with another one is refused
    live, refresher = LiveModel(model), None
    if online.refresh is not None:
        refit = partial(refit_heads, seed=recipe.seed)
        refresher = Refresher(live, refit, online.refresh, recipe.seed, run, session.journal.append, session.note)

    def journal(event: Event) -> None:
        session.journal.append(event)
        if refresher is not None:
            refresher.note(event)

    with ask_people(journal) as people:
        chooser, watch = chooser_of(session, state)
        penalty = online.length.penalty if online.length else 0.0
        hybrid = HybridFeedback(
            people,
            chooser,
            live,
            session.journal.append,
            affords=affords(session, people),
            refresher=refresher,
            watch=watch,
            length_penalty=penalty,
        )
        hybrid.resume(state, read(session.journal.path))
        yield hybrid
    if live.version > 1:
        run.reward_model_versions.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run.reward_model_versions) as scratch:
            live.save(Path(scratch) / "model")
            put_in_place(Path(scratch) / "model", run.reward_model_versions / "model")
