"""Whoever compares the completions of a run, as the recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_cli.feedback.recorded import RecordedFeedback, Recording
from rlhf_cli.feedback.reward_model import RewardModelFeedback
from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.journal.replay import RunState
from rlhf_cli.stages.rewards import reward_model
from rlhf_cli.stages.service import flow_service, flow_spec
from rlhf_cli.stages.session import Session
from rlhf_cli.types import Feedback


@contextmanager
def feedback_of(session: Session, state: RunState, recording: Recording | None) -> Iterator[Feedback]:
    """Whoever compares the completions, asking again about the groups that were open when the last process ended."""
    recipe, online = session.recipe, session.recipe.run_online
    assert online is not None
    if online.feedback == "reward_model":
        penalty = online.length.penalty if online.length else 0.0
        by_model = RewardModelFeedback(reward_model(session), session.journal.append, penalty)
        by_model.resume(state.open_groups)
        yield by_model
        return
    if recording is not None:
        recorded = RecordedFeedback(recording, session.journal.append)
        recorded.resume(state.open_groups)
        yield recorded
        return
    assert recipe.flow is not None
    assert state.flow is not None
    assert state.run_id is not None
    with flow_service(recipe, session.run, outage_s=recipe.flow.outage_s) as connect:
        votes = VotesFeedback(
            connect,
            state.flow.flow_id,
            flow_spec(recipe),
            session.journal.append,
            run_id=state.run_id,
            incomplete=online.incomplete,
            stop_when_decided=recipe.flow.stop_when_decided,
            settle_s=recipe.flow.settle_s,
            poll_s=recipe.flow.poll_s,
            votes_before=state.votes_total,
            note=session.note,
        )
        try:
            votes.resume(state.groups.values())
            yield votes
        finally:
            votes.close()
