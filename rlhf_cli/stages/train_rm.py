"""`rlhf train-rm`: from votes to a reward model, and how far to trust it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.evaluation.honesty import Judged, honesty_report
from rlhf_cli.journal.metrics import MetricsWriter
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.run_dir import write_atomic
from rlhf_cli.journal.votes import read_run_votes
from rlhf_cli.learner.checkpoints import Checkpoints, clear, newest
from rlhf_cli.learner.reward import train_reward_model
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.policy.checks import check_train_rm
from rlhf_cli.policy.hub import hub_rows
from rlhf_cli.policy.row_checks import voted
from rlhf_cli.policy.scoring import (
    PairwiseModel,
    RewardModel,
    open_reward_model,
    order_consistency,
    write_about,
)
from rlhf_cli.recipe.data import read_votes
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.schema import TrainRm
from rlhf_cli.recipe.sources import is_held_out
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.stages.session import Result, Session, open_session, put_in_place


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Fit a reward model to all votes of the section; leaves `train_rm/model` and `train_rm/report.json`.

    Goes on from its newest checkpoint unless `fresh`.
    """
    section = loaded.recipe.train_rm
    if section is None:
        raise UsageError(f"{loaded.path} has no section `train_rm`; there is nothing to do for `rlhf train-rm`")
    if section.votes is not None and section.votes.resolve() == path.resolve():
        # Its journal grows with every start, so what was done could never be told from what is to be done.
        raise UsageError(f"train_rm.votes is the folder of this run itself, {path}; give another one with --run-dir")
    with open_session("train-rm", loaded, path, observers) as session, StopRequest().listening() as stop:
        if not fresh and (done := session.done(session.run.train_rm_model)):
            return done
        start = section.model or session.start_model()
        groups, heldout = _votes(section, loaded.recipe.seed)
        run = session.run
        checkpoint = None if fresh else newest(run.train_rm_checkpoints, session.fingerprint)
        if checkpoint is None:
            clear(run.train_rm_checkpoints)
            run.train_rm_metrics.unlink(missing_ok=True)
        scratch = run.train_rm_checkpoints / ".scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir(parents=True)
        session.progress("checking model and data", 0, 1)
        warnings = check_train_rm(start, voted(groups), voted(heldout))
        session.progress("checking model and data", 1, 1)
        session.start(resumed_from_step=checkpoint.step if checkpoint else None)
        for warning in warnings:
            session.note(f"train-rm: {warning}")
        checkpoints = Checkpoints(
            run.train_rm_checkpoints,
            session.fingerprint,
            section.checkpoint_every,
            stopping=lambda: stop.signal_number is not None,
            stop=lambda steps: session.stopped(stop, steps),
        )
        figures: dict[str, Any] = train_reward_model(
            start,
            loaded.recipe,
            groups,
            heldout,
            scratch,
            lambda done, total: session.progress("reward model", done, total),
            checkpoints,
            checkpoint,
            MetricsWriter(run.train_rm_metrics, observers).append,
        )
        _note_truncated(session, figures, len(groups))
        if heldout:
            session.progress("held-out votes", 0, 1)
            figures |= _judge(session, scratch / "model", heldout)
            session.progress("held-out votes", 1, 1)
        else:
            run.train_rm_report.unlink(missing_ok=True)
            session.note("train-rm: no held-out votes, so nothing says how far to trust this reward model")
        put_in_place(scratch / "model", run.train_rm_model)
        result = session.finish({"groups": len(groups), "heldout_groups": len(heldout), **figures})
        clear(run.train_rm_checkpoints)
        stop.check()  # asked too late to stop this stage: the next one shall not begin
        return result


def _votes(section: TrainRm, seed: int) -> tuple[list[VotedGroup], list[VotedGroup]]:
    """Groups to train on and groups kept apart, from data files and from a run's own votes."""
    groups: list[VotedGroup] = []
    heldout: list[VotedGroup] = []
    if section.dataset is not None:
        groups, heldout = read_votes(section.dataset, section.heldout, seed=seed, hub=hub_rows)
    elif section.heldout is not None and not isinstance(section.heldout, float):
        heldout, _ = read_votes(section.heldout, seed=seed, hub=hub_rows)
    if section.votes is not None:
        share = section.heldout if isinstance(section.heldout, float) else 0.0
        for group in read_run_votes(section.votes):
            (heldout if is_held_out(group.key, share) else groups).append(group)
        if share and not heldout:
            raise DataError(f"train_rm.heldout: a share of {share:g} leaves no group to measure on; make it larger")
        if not groups:
            raise DataError("no group is left to train on; make train_rm.heldout smaller")
    return groups, heldout


def _judge(session: Session, folder: Path, heldout: Sequence[VotedGroup]) -> Result:
    """Write what held-out votes say of the model, and into the model the temperature that they ask for."""
    model = open_reward_model(str(folder))
    report = honesty_report(judged(model, heldout))
    write_about(folder, replace(model.about, temperature=report["temperature"]["value"]))
    write_atomic(session.run.train_rm_report, json.dumps(report, indent=2).encode() + b"\n")
    for text in report["warnings"]:
        session.note(f"train-rm: {text}")
    return {"temperature": report["temperature"]["value"]}


def judged(model: RewardModel | PairwiseModel, heldout: Sequence[VotedGroup]) -> Judged:
    """What a reward model says of groups that people voted on."""
    texts = [(group.prompt, group.completions) for group in heldout]
    tokens = [
        [len(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in group.completions]
        for group in heldout
    ]
    cut = sum(model.cuts(*text) for text in texts)
    if isinstance(model, PairwiseModel):
        one_way = model.one_way(texts)
        both = [(logits - logits.T) / 2 for logits in one_way]
        return Judged(heldout, both, tokens, cut, order_consistency(one_way))
    return Judged(heldout, [rewards for rewards, _ in model.score_all(texts)], tokens, cut)


def _note_truncated(session: Session, figures: Result, groups: int) -> None:
    if count := int(figures["truncated"]):
        what = (
            "pairs" if session.recipe.train_rm and session.recipe.train_rm.kind == "pairwise" else f"of {groups} groups"
        )
        session.note(
            f"train-rm: {count} {what} hold a text longer than train_rm.max_length; such a text lost the start of its "
            "prompt, then that of its completion"
        )
