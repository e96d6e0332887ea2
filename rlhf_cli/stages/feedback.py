"""Whoever compares the completions of a run, as the recipe says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from functools import partial

from rlhf_cli.errors import CredentialsError
from rlhf_cli.feedback.answers import Answers
from rlhf_cli.feedback.endpoint import Patience
from rlhf_cli.feedback.function import FunctionFeedback, HttpFeedback, PythonFeedback, load_function
from rlhf_cli.feedback.judge import JudgeFeedback
from rlhf_cli.feedback.recorded import RecordedFeedback, Recording
from rlhf_cli.feedback.reward_model import RewardModelFeedback
from rlhf_cli.feedback.scores import score_groups
from rlhf_cli.feedback.selection import SelectedVotes
from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.flow.credentials import Credentials, usable
from rlhf_cli.journal.events import Event
from rlhf_cli.journal.replay import RunState
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.hybrid import hybrid_of
from rlhf_cli.stages.rewards import reward_model
from rlhf_cli.stages.selection import affords, chooser_of
from rlhf_cli.stages.service import flow_service, flow_spec
from rlhf_cli.stages.session import Session
from rlhf_cli.types import Feedback


@contextmanager
def feedback_of(session: Session, state: RunState, recording: Recording | None) -> Iterator[Feedback]:
    """Whoever compares the completions, asking again about the groups that were open when the last process ended."""
    online = session.recipe.run_online
    assert online is not None
    if online.feedback == "reward_model":
        penalty = online.length.penalty if online.length else 0.0
        by_model = RewardModelFeedback(reward_model(session), session.journal.append, penalty)
        by_model.resume(state.open_groups)
        yield by_model
    elif recording is not None:
        recorded = RecordedFeedback(recording, session.journal.append)
        recorded.resume(state.open_groups)
        yield recorded
    elif online.feedback == "function":
        # What a function prints is no result of ours.
        with redirect_stdout(sys.stderr), closing(_function(session.recipe, session.journal.append)) as function:
            function.resume(state.open_groups)
            yield function
    elif online.feedback == "judge":
        with closing(judge_of(session, session.journal.append, session.recipe.budget.usd)) as judge:
            judge.resume(state.open_groups)
            yield judge
    elif online.feedback == "hybrid":
        with hybrid_of(session, state, partial(_people, session, state)) as hybrid:
            yield hybrid
    else:
        with _people(session, state, session.journal.append) as people:
            asked = people if online.selection is None else _selected(session, state, people)
            asked.resume(state.groups.values())
            yield asked


def _selected(session: Session, state: RunState, people: VotesFeedback) -> SelectedVotes:
    """People who see a part of the groups; a reward model says where it is unsure, if that is what counts."""
    online = session.recipe.run_online
    assert online is not None
    assert online.selection is not None
    chooser, _ = chooser_of(session, state)
    journal, within = session.journal.append, affords(session, people)
    if online.selection.by != "uncertainty":
        return SelectedVotes(people, chooser, journal, affords=within)
    model = reward_model(session)
    return SelectedVotes(people, chooser, journal, affords=within, score=lambda group: score_groups(model, [group])[0])


@contextmanager
def _people(session: Session, state: RunState, journal: Callable[[Event], object]) -> Iterator[VotesFeedback]:
    """People at the flow of the run, or whoever votes there; not asked yet about what is open."""
    recipe, online = session.recipe, session.recipe.run_online
    assert recipe.flow is not None
    assert online is not None
    assert state.flow is not None
    assert state.run_id is not None
    with flow_service(recipe, session.run, outage_s=recipe.flow.outage_s) as connect:
        votes = VotesFeedback(
            connect,
            state.flow.flow_id,
            flow_spec(recipe),
            journal,
            run_id=state.run_id,
            incomplete=online.incomplete,
            stop_when_decided=recipe.flow.stop_when_decided,
            settle_s=recipe.flow.settle_s,
            poll_s=recipe.flow.poll_s,
            votes_before=state.votes_total,
            note=session.note,
        )
        try:
            yield votes
        finally:
            votes.close()


def _function(recipe: Recipe, journal: Callable[[Event], object]) -> FunctionFeedback:
    online = recipe.run_online
    assert online is not None
    section = online.function
    assert section is not None
    given = {
        "batch": section.batch,
        "penalty": online.length.penalty if online.length else 0.0,
        "all_scores": online.learner.algorithm == "ppo",  # its rewards are scores; votes alone give it none
    }
    if section.url is not None:
        credentials = token(section.token_env, section.url)
        return HttpFeedback(section.url, credentials, Patience(section.timeout_s), journal, **given)
    assert section.file is not None
    score = load_function(section.file, section.name)
    return PythonFeedback(score, section.name, section.timeout_s, journal, **given)


def judge_of(session: Session, journal: Callable[[Event], object], budget_usd: float | None = None) -> JudgeFeedback:
    """The language model of `run_online.judge`, with all that it has answered in this run folder before."""
    online = session.recipe.run_online
    assert online is not None
    section = online.judge
    assert section is not None
    return JudgeFeedback(
        section,
        token(section.key_env, section.url),
        Answers(session.run.judge_answers),
        journal,
        seed=session.recipe.seed,
        budget_usd=budget_usd,
    )


def token(name: str | None, url: str) -> Credentials | None:
    """The secret for `url` in the environment variable of that name; None where the recipe names none.

    Raises:
        CredentialsError: The variable is not set, or holds what cannot be sent.
    """
    if name is None:
        return None
    secret = os.environ.get(name, "").strip()
    if not usable(secret):
        what = "holds something that cannot be sent in a header" if secret else "is not set"
        raise CredentialsError(f"the environment variable {name} {what}; it has to hold the key for {url}")
    return Credentials(token=secret, origin=f"${name}")


def check_credentials(recipe: Recipe) -> None:
    """Find a missing secret before a model is loaded.

    Raises:
        CredentialsError: As `token`.
    """
    online = recipe.run_online
    if online is not None and online.function is not None and online.function.url is not None:
        token(online.function.token_env, online.function.url)
    if online is not None and online.judge is not None:
        token(online.judge.key_env, online.judge.url)
