"""`rlhf train-rm`: from votes to a reward model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.journal.observe import Observer
from rlhf_cli.learner.reward import train_reward_model
from rlhf_cli.recipe.data import read_voted_groups
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.stages.session import Result, open_session, put_in_place


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Fit a reward model to `train_rm.dataset`; leaves `train_rm/model`."""
    section = loaded.recipe.train_rm
    if section is None:
        raise UsageError(f"{loaded.path} has no section `train_rm`; there is nothing to do for `rlhf train-rm`")
    with open_session("train-rm", loaded, path, observers) as session:
        if not fresh and (done := session.done(session.run.train_rm_model)):
            return done
        start = session.start_model()
        groups = read_voted_groups(section.dataset)
        heldout = read_voted_groups(section.heldout) if section.heldout else []
        session.start()
        folder = session.run.train_rm_model.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            session.progress("loading the model", 0, None)
            figures = train_reward_model(
                start,
                loaded.recipe,
                groups,
                heldout,
                Path(scratch),
                lambda done, total: session.progress("reward model", done, total),
            )
            put_in_place(Path(scratch) / "model", session.run.train_rm_model)
        return session.finish({"groups": len(groups), **figures})
