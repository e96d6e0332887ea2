"""Going on from an earlier step: which one, and what of the later ones has to go."""

from __future__ import annotations

import shutil

from rlhf_cli.errors import RunDamaged
from rlhf_cli.journal.events import RolledBack
from rlhf_cli.journal.metrics import MetricsWriter
from rlhf_cli.journal.replay import RunState
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.online.checkpoint import Checkpoint, before, discard_after, partial_dir
from rlhf_cli.online.guards import Trip


def check_lineage(checkpoint: Checkpoint, state: RunState) -> None:
    """Make sure that a checkpoint belongs to this journal.

    Raises:
        RunDamaged: It has seen other groups than the journal says.
    """
    journalled = {step: event.group_ids for step, event in state.steps.items() if step <= checkpoint.step}
    if journalled != checkpoint.consumed:
        raise RunDamaged(
            f"the checkpoint {checkpoint.path} consumed other groups than the journal says; "
            "restore both from one backup, or start over with --fresh"
        )


def roll_back(run: RunDir, state: RunState, trip: Trip, factor: float) -> RolledBack:
    """Back to the last good checkpoint, or to the start where there is none; beta is `factor` times what it was.

    Good is the newest one before the trip, unless the latest roll-back went there already: where a run trips again
    before it has made another one, it goes on from further back.

    Raises:
        RunDamaged: The checkpoint is not whole, or of another run.
    """
    good = before(run, trip.step)
    if good is not None and state.rollbacks and state.rollbacks[-1].to_step == good.step:
        good = before(run, good.step)
    if good is not None:
        check_lineage(good, state)
    return RolledBack(
        guard=trip.guard,
        value=trip.value,
        limit=trip.limit,
        from_step=trip.step,
        to_step=good.step if good else 0,
        checkpoint=str(good.path.relative_to(run.path)) if good else None,
        beta_scale=state.beta_scale * factor,
    )


def clear_up(run: RunDir, state: RunState) -> None:
    """Remove the files of the steps that the latest roll-back made void.

    To be done before the next step is trained; can be done again, whatever died in here before.
    """
    if state.rollbacks and max(state.steps, default=0) <= state.rollbacks[-1].to_step:
        to_step = state.rollbacks[-1].to_step
        discard_after(run, to_step)
        shutil.rmtree(partial_dir(run), ignore_errors=True)
        MetricsWriter(run.metrics).void_after(to_step)
