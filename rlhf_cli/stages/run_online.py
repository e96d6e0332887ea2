"""`rlhf run-online`: improve the policy from votes, step by step, while generation, voting and training overlap."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import (
    BudgetReached,
    CredentialsError,
    FlowRefused,
    FlowUnavailable,
    RlhfError,
    Stopped,
    UsageError,
)
from rlhf_cli.feedback.abandon import REASON, abandon
from rlhf_cli.feedback.recorded import Recording
from rlhf_cli.journal.events import StageStarted
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.metrics import MetricsWriter, read_metrics
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.replay import GroupState, RunState, replay
from rlhf_cli.learner.online import online_learner
from rlhf_cli.online.checkpoint import Checkpoint, latest, partial_dir
from rlhf_cli.online.degenerate import left_open
from rlhf_cli.online.guards import RollBack, Trip
from rlhf_cli.online.recorded import RecordedStream
from rlhf_cli.online.recorder import Recorder
from rlhf_cli.online.rollback import check_lineage, clear_up, roll_back
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.online.stream import Stream
from rlhf_cli.policy.checks import check_run_online
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.policy.policy import Policy
from rlhf_cli.policy.row_checks import prompts_only
from rlhf_cli.recipe.data import read_prompts
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.stages.feedback import check_credentials, feedback_of
from rlhf_cli.stages.rewards import reward_for_display, score_for_best_of
from rlhf_cli.stages.service import Connect, flow_service, recording_at
from rlhf_cli.stages.session import Result, Session, open_session, put_in_place
from rlhf_cli.types import Prompt

ABANDON_S = 30.0
"""How long ending the items of an attempt that is given up may take."""


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Train `run_online.steps` steps; leaves `online/model`. Goes on where it stopped with `resume`."""
    recipe = loaded.recipe
    if recipe.run_online is None:
        raise UsageError(f"{loaded.path} has no section `run_online`; there is nothing to do for `rlhf run-online`")
    assert recipe.data is not None  # a recipe with run_online is refused without
    with open_session("run-online", loaded, path, observers) as session, StopRequest().listening() as stop:
        if not fresh and (done := session.done(session.run.online_model)):
            return done
        recording = _recording(session)
        state, checkpoint = _begin(session, resume, fresh)
        policy = _policy(session)
        prompts = read_prompts(recipe.data.prompts)
        measured = recipe.data.heldout_prompts if recipe.eval else None
        heldout = read_prompts(measured) if measured else []
        for prompt in [*prompts, *heldout]:
            policy.encode(prompt)  # one that is too long is found before anything is paid for
        _note_checks(session, policy, prompts, heldout)
        _announce(session)
        given: dict[str, Any] = {"prompts": prompts, "stop": stop, "started": time.monotonic()}
        while isinstance(stream := _attend(session, state, policy, checkpoint, recording, given), RollBack):
            del policy  # there may be no room for two
            gc.collect()
            state, checkpoint = _roll_back(session, stream.trip)
            policy = _policy(session)
        with tempfile.TemporaryDirectory(dir=session.run.checkpoints) as scratch:
            policy.save(str(Path(scratch) / "model"))
            put_in_place(Path(scratch) / "model", session.run.online_model)
        return session.finish(_summary(session, stream))


def _policy(session: Session) -> Policy:
    session.progress("loading the policy", 0, 1)
    policy = Policy(session.start_model(), session.recipe, score=score_for_best_of(session))
    session.progress("loading the policy", 1, 1)
    return policy


def _attend(
    session: Session,
    state: RunState,
    policy: Policy,
    checkpoint: Checkpoint | None,
    recording: Recording | None,
    given: dict[str, Any],
) -> Stream | RollBack:
    """Train from `checkpoint` to the last step, or to where a guard wants steps given up."""
    try:
        with feedback_of(session, state, recording) as feedback:
            given = {
                **given,
                "policy": policy,
                "feedback": feedback,
                "journal": session.journal,
                "state": state,
                "recipe": session.recipe,
                "observers": session.observers,
                "reward": reward_for_display(session)[0],
            }
            stream = Stream(**given) if recording is None else RecordedStream(recording, **given)
            _train(session, stream, policy, checkpoint)
            return stream
    except RollBack as rolled:
        return RollBack(rolled.trip)  # without the frames, which hold the model


def _roll_back(session: Session, trip: Trip) -> tuple[RunState, Checkpoint | None]:
    """Give up the steps after the last good checkpoint; from here on the process is as one that resumed."""
    online = session.recipe.run_online
    assert online is not None
    event = roll_back(session.run, replay(read(session.journal.path)), trip, online.kl.rollback_beta)
    session.journal.append(event)
    beta = online.learner.beta * event.beta_scale
    session.note(f"{trip}: rolled back to step {event.to_step}, beta is {beta:g} from here on")
    _clear_up(session, replay(read(session.journal.path)))
    return replay(read(session.journal.path)), latest(session.run)


def _clear_up(session: Session, state: RunState) -> None:
    """Remove what the latest roll-back made void, and end the items that people still vote on for it."""
    clear_up(session.run, state)
    if state.rollbacks:
        void = [group for group in state.groups.values() if group.void and not group.ranked]
        void = [group for group in void if not (group.ended or group.stopped)]
        reason = f"rolled back to step {state.rollbacks[-1].to_step}"
        _end_items(session, void, reason, "the steps that were given up")


def _note_checks(session: Session, policy: Policy, prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    assert session.recipe.run_online is not None
    by_model = session.recipe.run_online.feedback in ("reward_model", "hybrid")
    scorer = load_tokenizer(str(session.run.train_rm_model)) if by_model else None
    for warning in check_run_online(policy.tokenizer, scorer, prompts_only(prompts), prompts_only(heldout)):
        session.note(f"run-online: {warning}")


def _begin(session: Session, resume: bool, fresh: bool) -> tuple[RunState, Checkpoint | None]:
    """Decide between a first start, going on, and starting over; votes were paid for, so nothing is done unasked."""
    state, run = session.state, session.run
    inputs = [e.event for e in session.journal.entries if isinstance(e.event, StageStarted)]
    inputs = [event for event in inputs if event.stage == session.stage]
    paid = f"{len(state.steps)} steps trained, {state.votes_total:.0f} votes received"
    if state.groups and not fresh:
        if inputs[-1].fingerprint != session.fingerprint:
            raise UsageError(
                f"{run.path} holds a run-online with other inputs ({paid}). Undo the change, start over with --fresh, "
                "or use another folder with --run-dir."
            )
        if not resume:
            raise UsageError(
                f"{run.path} holds an unfinished run-online ({paid}). Go on with --resume, or start over with --fresh."
            )
    session.start_model()  # what is missing is said before anything is moved
    assert session.recipe.run_online is not None
    online = session.recipe.run_online
    if online.asks_people:
        session.require("open-flow")
    if online.reads_reward_model:
        session.require("train-rm", run.train_rm_model)
    check_credentials(session.recipe)
    if fresh:
        _end_items(session, state.open_groups, REASON, "the attempt before")
    else:
        _clear_up(session, state)
    attempt = max(1, state.attempt + (1 if fresh and state.groups else 0))
    if fresh and run.checkpoints.parent.exists():
        run.checkpoints.parent.rename(run.path / f"online.replaced-{time.time_ns()}")
        run.metrics.unlink(missing_ok=True)
    checkpoint = latest(run)
    shutil.rmtree(partial_dir(run), ignore_errors=True)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        check_lineage(checkpoint, state)
    session.start(attempt, resumed_from_step=checkpoint.step if checkpoint else 0 if state.groups else None)
    for verdict in left_open(session.state, online.cut_off):
        session.journal.append(verdict)
    return replay(read(session.journal.path)), checkpoint


def _end_items(session: Session, groups: Sequence[GroupState], reason: str, of: str) -> None:
    """End the items that people still vote on for groups that are given up; every vote on them would cost."""
    asked = [group for group in groups if any(ask.dataset_id for ask in group.asks)]
    recipe, flow = session.recipe, session.state.flow
    if not asked or flow is None:
        return
    go_on = f"{len(asked)} items of {of} may go on until their time is over"
    if recipe.flow is None or recipe.flow.service != flow.service:
        session.note(f"{go_on}: they are at {flow.service}, which the recipe no longer names")
        return

    async def end(connect: Connect) -> int:
        client = connect()
        try:
            async with asyncio.timeout(ABANDON_S):
                return await abandon(client, flow.flow_id, asked, session.journal.append, reason)
        finally:
            await client.close()

    try:
        with flow_service(recipe, session.run) as connect:
            ended = asyncio.run(end(connect))
    except (FlowUnavailable, FlowRefused, TimeoutError) as error:
        session.note(f"{go_on}: {error or 'the service did not answer in time'}")
    else:
        session.note(f"ended {ended} items that people were still voting on for {of}")


def _announce(session: Session) -> None:
    """Tell whoever watches the figures that stay the same for the whole run."""
    recipe = session.recipe
    assert recipe.run_online is not None
    kl, budget = recipe.run_online.kl, recipe.budget
    limits = {
        "run/steps_total": recipe.run_online.steps,
        "kl/soft_nats": kl.soft_nats,
        "kl/hard_nats": kl.hard_nats,
        "budget/votes": budget.votes,
        "budget/usd": budget.usd,
    }
    row: dict[str, float] = {name: limit for name, limit in limits.items() if limit is not None}
    if recipe.run_online.asks_people and recipe.flow is not None:
        votes = recipe.flow.responses
        row |= {"flow/min_votes": votes.min, "flow/desired_votes": votes.desired, "flow/max_votes": votes.max}
    for observer in session.observers:
        observer.on_status(row)


def _recording(session: Session) -> Recording | None:
    """The run whose votes are given again, where the recipe says `flow.service: replay`."""
    flow, online = session.recipe.flow, session.recipe.run_online
    assert online is not None
    if online.feedback != "votes" or flow is None or flow.recording is None:
        return None
    recording = recording_at(flow.recording, session.run)
    recording.steps_for(online.steps)
    return recording


def _train(session: Session, stream: Stream, policy: Policy, checkpoint: Checkpoint | None) -> None:
    """Let the learner pull batches from the stream until all steps are taken; save when it has to stop early."""
    run = session.run
    metrics = MetricsWriter(run.metrics, session.observers)
    recorder = Recorder(run, session.journal, metrics, stream, dict(checkpoint.consumed) if checkpoint else {})
    reward_model = run.train_rm_model if run.train_rm_model.exists() else None
    learner = online_learner(policy, stream, session.recipe, partial_dir(run), [recorder], reward_model)
    recorder.learner = learner
    stream.step = checkpoint.step if checkpoint else 0
    if checkpoint is not None and checkpoint.step == stream.online.steps:  # only the final model was not saved yet
        learner.load(checkpoint.path)
        return
    try:
        learner.resume(checkpoint.path if checkpoint else None)
    except (Stopped, BudgetReached, FlowUnavailable, FlowRefused, CredentialsError) as error:
        if stream.step > recorder.last_saved:
            learner.save()
        raise _with_what_was_kept(error, session, stream) from error


def _with_what_was_kept(error: RlhfError, session: Session, stream: Stream) -> RlhfError:
    online = stream.online
    kept = (
        f"{error}\n{stream.step} of {online.steps} steps are done and saved, "
        f"{stream.feedback.status().get('flow/votes_total', 0):.0f} votes are kept, "
        f"{stream.outstanding} groups are still out for votes.\n"
        f"go on with: {session.loaded.command('run-online', '--run-dir', str(session.run.path), '--resume')}"
    )
    if isinstance(error, Stopped):
        return Stopped(kept, error.exit_code - 128)
    return type(error)(kept)


def _summary(session: Session, stream: Stream) -> dict[str, float | str | None]:
    rows = [row for row in read_metrics(session.run.metrics) if "kl/sequence_nats" in row]  # steps that sampled
    status = stream.feedback.status()
    votes = status.get("flow/votes_total", 0.0)
    return {
        "steps": stream.step,
        "rollbacks": stream.rollbacks or None,
        "votes": votes,
        "cost_usd": stream.usd(),
        "reward_first": rows[0].get("reward/mean") if rows else None,
        "reward_last": rows[-1].get("reward/mean") if rows else None,
        "kl_sequence_nats": rows[-1].get("kl/sequence_nats") if rows else None,
        **{name.replace("/", "_"): figure for name, figure in status.items() if name.startswith("judge/")},
    }
