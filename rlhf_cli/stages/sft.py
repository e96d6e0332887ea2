"""`rlhf sft`: from a base model to the model that online training starts from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.journal.observe import Observer
from rlhf_cli.learner.sft import train_sft
from rlhf_cli.policy.tiny import build_tiny_model
from rlhf_cli.recipe.data import read_conversations
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.stages.session import Result, open_session, put_in_place
from rlhf_cli.types import Message


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Fine-tune on `sft.dataset`; leaves `sft/model`. An interrupted one starts over: it costs no votes."""
    section, model = loaded.recipe.sft, loaded.recipe.model
    if section is None:
        raise UsageError(f"{loaded.path} has no section `sft`; there is nothing to do for `rlhf sft`")
    with open_session("sft", loaded, path, observers) as session:
        if not fresh and (done := session.done(session.run.sft_model)):
            return done
        rows = read_conversations(section.dataset)
        heldout = read_conversations(section.heldout) if section.heldout else []
        session.start()
        folder = session.run.sft_model.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            start = model.path
            if model.from_scratch is not None:
                start = str(Path(scratch) / "start")
                build_tiny_model([_text(r) for r in rows], model.from_scratch, loaded.recipe.seed, Path(start))
            assert start is not None
            session.progress("loading the model", 0, None)
            losses = train_sft(
                start,
                loaded.recipe,
                rows,
                heldout,
                Path(scratch),
                lambda done, total: session.progress("supervised fine-tuning", done, total),
            )
            put_in_place(Path(scratch) / "model", session.run.sft_model)
        return session.finish({"rows": len(rows), **losses})


def _text(row: tuple[Message, ...] | str) -> str:
    return row if isinstance(row, str) else "\n".join(m.content for m in row)
