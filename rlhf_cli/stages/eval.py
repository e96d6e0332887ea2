"""`rlhf eval`: the trained policy against the model it started from, on held-out prompts."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.heldout import (
    check_gates,
    comparisons,
    drift_rows,
    pair_up,
    reward_rows,
    same_answer,
    win_rate_rows,
)
from rlhf_cli.feedback.judge import JudgeFeedback
from rlhf_cli.feedback.recorded import RecordedFeedback, Recording
from rlhf_cli.feedback.reward_model import RewardModelFeedback
from rlhf_cli.feedback.votes import VotesFeedback
from rlhf_cli.journal.events import GroupSampled, RunStarted, StageStarted
from rlhf_cli.journal.journal import Journal, read
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir, write_atomic
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.data import read_prompts
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.online import Sampling
from rlhf_cli.stages.feedback import check_credentials, judge_of
from rlhf_cli.stages.open_flow import open_or_adopt
from rlhf_cli.stages.rewards import reward_for_display, reward_model
from rlhf_cli.stages.service import flow_service, flow_spec
from rlhf_cli.stages.session import Result, Session, open_session
from rlhf_cli.types import Group, RankedGroup, Unranked

POLL_S = 0.05
ANSWERS_AT_ONCE = 64
"""Decoding costs mostly the pass over the weights, so a wide batch is hardly slower than a narrow one."""


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Measure win rate, reward, KL and lengths; leaves `eval/results.json` and `samples/heldout.jsonl`."""
    recipe = loaded.recipe
    if recipe.eval is None:
        raise UsageError(f"{loaded.path} has no section `eval`; there is nothing to do for `rlhf eval`")
    with open_session("eval", loaded, path, observers) as session:
        session.fingerprint += f"/{session.state.attempt}"  # every attempt at run-online makes another policy
        results_file = session.run.eval_results
        if not fresh and (done := session.done(results_file)):
            return {**json.loads(results_file.read_bytes()), **done}
        session.require("run-online", session.run.online_model)
        check_credentials(recipe)
        session.start()
        before, after = _answers(session)
        rewards = _rewards(session, before, after)
        verdicts, identical, about_judge = _ask(session, before, after, fresh)
        results = {
            **win_rate_rows(comparisons(verdicts, identical)),
            **rewards["rows"],
            "reward_source": rewards["source"],
            **drift_rows(before, after),
            "votes": sum(v.votes_paid for v in verdicts if isinstance(v, RankedGroup)),
            "prompts": len(before),
            "pairs": len(verdicts) + len(identical),
            "pairs_identical": len(identical),
            "pairs_without_votes": sum(isinstance(v, Unranked) for v in verdicts),
            "judge": recipe.eval.judge,
            **about_judge,
        }
        results["gates"] = check_gates(results, recipe.eval.gates.model_dump())
        _write_samples(session, before, after, rewards)
        write_atomic(results_file, json.dumps(results, indent=2).encode() + b"\n")
        quoted = ("win_rate", "reward_before", "reward_after", "reward_gain", "kl_sequence_nats", "votes")
        return {**results, **session.finish({key: results.get(key) for key in quoted})}


def _answers(session: Session) -> tuple[list[Group], list[Group]]:
    """Answers to the held-out prompts by the model that training started from, and by the trained policy."""
    recipe = session.recipe
    assert recipe.eval is not None
    assert recipe.data is not None
    assert recipe.data.heldout_prompts is not None
    prompts = read_prompts(recipe.data.heldout_prompts)
    sampling = recipe.run_online.sampling.plain if recipe.run_online else Sampling()
    count = recipe.eval.answers_per_prompt
    at_once = max(1, ANSWERS_AT_ONCE // count)

    def answer(policy: Policy, who: str) -> list[Group]:
        groups: list[Group] = []
        for start in range(0, len(prompts), at_once):
            session.progress(f"held-out answers, {who}", start, len(prompts))
            some = prompts[start : start + at_once]
            groups += policy.sample_groups(
                some, sampling, count, first_index=start, prefix=who, step=0, seed=recipe.seed
            )
        session.progress(f"held-out answers, {who}", len(prompts), len(prompts))
        return groups

    started_from = Policy(session.start_model(), recipe, train=False)
    before = answer(started_from, "before")
    trained = Policy(str(session.run.online_model), recipe, train=False, reference=started_from.model)
    return before, answer(trained, "after")


def _rewards(session: Session, before: Sequence[Group], after: Sequence[Group]) -> dict[str, Any]:
    """Rewards of all answers, one row per prompt, and the figures over them; nothing where there is no reward."""
    score, source = reward_for_display(session)
    if score is None:
        return {"rows": {}, "source": None, "before": None, "after": None}
    rows = [[score(g.prompt, [c.text for c in g.completions]) for g in groups] for groups in (before, after)]
    return {"rows": reward_rows(*rows), "source": source, "before": rows[0], "after": rows[1]}


def _ask(
    session: Session, before: Sequence[Group], after: Sequence[Group], fresh: bool
) -> tuple[list[RankedGroup | Unranked], list[Group], dict[str, float]]:
    """Have the judge compare answers pair by pair; returns the verdicts, the pairs that needed none, and what there is
    to say about the judge.

    The comparisons have a journal and a run id of their own: an eval that died picks up what it has paid for, and
    another eval never gets the items of this one.
    """
    path = session.run.eval_journal
    path.parent.mkdir(exist_ok=True)
    if path.exists() and (fresh or not _same_inputs(path, session.fingerprint)):
        path.rename(path.with_name(f"journal.replaced-{time.time_ns()}.jsonl"))
    with Journal.open(path) as journal:
        state = replay(journal.entries)
        if state.started is None:
            name, seed = session.recipe.name, session.recipe.seed
            started = RunStarted(run_id=uuid.uuid4().hex[:12], name=name, seed=seed, version=__version__)
            inputs = StageStarted(stage="eval", fingerprint=session.fingerprint)
            state = replay([journal.append(started), journal.append(inputs)])
        assert state.run_id is not None
        pairs = pair_up(before, after, f"{state.run_id}-eval")
        identical = [pair for pair in pairs if same_answer(pair)]
        asked = [pair for pair in pairs if not same_answer(pair)]
        verdicts: list[RankedGroup | Unranked] = [
            RankedGroup(known.sampled.group(), known.ranked.matrix(), known.ranked.source, 0.0, known.ranked.complete)
            if known.ranked is not None
            else Unranked(known.sampled.group(), str(known.set_aside))
            for known in state.groups.values()
            if not known.open
        ]
        with _judge(session, journal, state.run_id) as feedback:
            feedback.resume(state.open_groups)
            for pair in asked:
                if pair.id not in state.groups:
                    journal.append(GroupSampled.of(pair))
                    feedback.submit(pair)
            while len(verdicts) < len(asked):
                verdicts += feedback.collect()
                session.progress("comparing held-out answers", len(verdicts), len(asked))
                time.sleep(POLL_S)
            about = {name.replace("/", "_"): n for name, n in feedback.status().items() if name.startswith("judge/")}
        return verdicts, identical, about


def _same_inputs(path: Path, fingerprint: str) -> bool:
    current = replay(read(path)).current
    return current is not None and current.fingerprint == fingerprint


@contextmanager
def _judge(
    session: Session, journal: Journal, run_id: str
) -> Iterator[VotesFeedback | RewardModelFeedback | RecordedFeedback | JudgeFeedback]:
    recipe = session.recipe
    assert recipe.eval is not None
    if recipe.eval.judge == "judge":
        with closing(judge_of(session, journal.append)) as judge:
            yield judge
        return
    if recipe.eval.judge == "reward_model":
        yield RewardModelFeedback(reward_model(session), journal.append)
        return
    assert recipe.flow is not None
    if recipe.flow.recording is not None:
        recording = Recording.read(RunDir(recipe.flow.recording).eval_journal)
        yield RecordedFeedback(recording, journal.append)
        return
    spec = flow_spec(recipe)
    with flow_service(recipe, session.run, outage_s=recipe.flow.outage_s) as connect:
        flow_id = asyncio.run(open_or_adopt(connect, recipe, session.state.flow))
        votes = VotesFeedback(
            connect,
            flow_id,
            spec,
            journal.append,
            run_id=run_id,
            settle_s=recipe.flow.settle_s,
            poll_s=recipe.flow.poll_s,
            note=session.note,
        )
        try:
            yield votes
        finally:
            votes.close()


def _write_samples(session: Session, before: Sequence[Group], after: Sequence[Group], rewards: dict[str, Any]) -> None:
    def answers(group: Group, row: Sequence[float] | None) -> list[dict[str, Any]]:
        return [
            {"text": c.text, "reward": row[i] if row is not None else None} for i, c in enumerate(group.completions)
        ]

    lines = []
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        row_before = rewards["before"][i] if rewards["before"] else None
        row_after = rewards["after"][i] if rewards["after"] else None
        row = {
            "prompt_id": b.prompt.id,
            "prompt": b.prompt.text,
            "before": answers(b, row_before),
            "after": answers(a, row_after),
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomic(session.run.heldout_samples, ("\n".join(lines) + "\n").encode())
