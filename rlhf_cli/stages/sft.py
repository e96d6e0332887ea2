"""`rlhf sft`: from a base model to the model that online training starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.journal.metrics import MetricsWriter
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.run_dir import write_atomic
from rlhf_cli.learner.checkpoints import Checkpoints, clear, newest
from rlhf_cli.learner.sft import SftResult, SftRow, train_sft
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.policy.checks import check_sft
from rlhf_cli.policy.hub import hub_rows
from rlhf_cli.policy.row_checks import conversations
from rlhf_cli.policy.tiny import build_tiny_model
from rlhf_cli.recipe.data import Conversations, read_conversations
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.stages.session import Result, Session, open_session, put_in_place
from rlhf_cli.text import one_line
from rlhf_cli.types import Message

SHOWN, SHOWN_CHARACTERS = 2, 120


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Fine-tune on `sft.dataset`; leaves `sft/model`. Goes on from its newest checkpoint unless `fresh`."""
    section, model = loaded.recipe.sft, loaded.recipe.model
    if section is None:
        raise UsageError(f"{loaded.path} has no section `sft`; there is nothing to do for `rlhf sft`")
    with open_session("sft", loaded, path, observers) as session, StopRequest().listening() as stop:
        run = session.run
        if not fresh and (done := session.done(run.sft_model)):
            return done
        train, heldout = read_conversations(section.dataset, section.heldout, seed=loaded.recipe.seed, hub=hub_rows)
        rows, heldout_rows = _briefed(session, train), _briefed(session, heldout)
        checkpoint = None if fresh else newest(run.sft_checkpoints, session.fingerprint)
        if checkpoint is None:
            clear(run.sft_checkpoints)
            run.sft_metrics.unlink(missing_ok=True)
        scratch = run.sft_checkpoints / ".scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir(parents=True)
        session.progress("checking model and data", 0, 1)
        start = model.path
        if model.from_scratch is not None:
            start = str(scratch / "start")
            build_tiny_model([_text(row) for row in rows], model.from_scratch, loaded.recipe.seed, Path(start))
        assert start is not None
        known, known_heldout = conversations(rows, train.wheres), conversations(heldout_rows, heldout.wheres)
        warnings = check_sft(start, known, known_heldout, section.max_length)
        session.progress("checking model and data", 1, 1)
        session.start(resumed_from_step=checkpoint.step if checkpoint else None)
        for warning in warnings:
            session.note(warning)
        checkpoints = Checkpoints(
            run.sft_checkpoints,
            session.fingerprint,
            section.checkpoint_every,
            stopping=lambda: stop.signal_number is not None,
            stop=lambda steps: session.stopped(stop, steps),
        )
        result = train_sft(
            start,
            loaded.recipe,
            rows,
            heldout_rows,
            scratch / "model",
            checkpoints,
            checkpoint,
            lambda done, total: session.progress("supervised fine-tuning", done, total),
            MetricsWriter(run.sft_metrics, observers).append,
        )
        write_atomic(run.sft_samples, b"".join(json.dumps(s).encode() + b"\n" for s in result.samples))
        put_in_place(scratch / "model", run.sft_model)
        finished = session.finish({"rows": len(rows), "heldout_rows": len(heldout_rows), **result.figures})
        clear(run.sft_checkpoints)
        _show(session, result)
        stop.check()  # asked too late to stop this stage: the next one shall not begin
        return finished


def _show(session: Session, result: SftResult) -> None:
    """Say what became of the rows, and show the first answers before and after."""
    if result.figures["truncated"] or result.figures["dropped"]:
        session.note(
            f"{result.figures['truncated']} rows were longer than sft.max_length and lost their end; "
            f"{result.figures['dropped']} were left out because no room was left for the answer"
        )
    for sample in result.samples[:SHOWN]:
        asked, before, after = (one_line(sample[key])[:SHOWN_CHARACTERS] for key in ("prompt", "before", "after"))
        session.note(f"asked: {asked!r} | before: {before!r} | after: {after!r}")


def _briefed(session: Session, read: Conversations) -> list[SftRow]:
    """The rows as the model will meet them: with the system prompt of the recipe where they have none of their own."""
    data = session.recipe.data
    if data is None or data.system_prompt is None:
        return list(read.rows)
    system = Message("system", data.system_prompt)
    return [row if isinstance(row, str) or row[0].role == "system" else (system, *row) for row in read.rows]


def _text(row: SftRow) -> str:
    return row if isinstance(row, str) else "\n".join(m.content for m in row)
