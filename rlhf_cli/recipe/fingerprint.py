"""What the result of a stage follows from, as one hash; while it stays the same, the stage need not run again."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.online import RunOnline
from rlhf_cli.recipe.schema import Recipe

Stage = Literal["sft", "train-rm", "open-flow", "run-online", "eval"]

_VERSION = 1
"""Counts up when the same keys begin to mean something else."""

_HOW_TO_TALK = {"settle_s", "poll_s", "outage_s", "token_env", "client_id_env", "client_secret_env"}
_HOW_TO_KEEP = {"checkpoint_every", "keep_checkpoints"}
_HOW_TO_CALL = {
    "function": {"token_env", "batch", "timeout_s"},
    "judge": {"key_env", "at_once", "timeout_s", "usd_per_1m_tokens"},
}


def stage_fingerprint(loaded: LoadedRecipe, stage: Stage) -> str:
    """Hash of the recipe keys, data files and earlier stages that the stage's result follows from.

    A file counts by its content, never by its path; so does a model folder. A stage that the recipe does not have
    counts as absent.
    """
    inputs = {"version": _VERSION, "stage": stage, **_inputs(loaded, stage)}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _inputs(loaded: LoadedRecipe, stage: Stage) -> dict[str, Any]:
    recipe = loaded.recipe
    # where the policy comes from: the stages on the model share these
    start = {"model": _model(recipe), "seed": recipe.seed, "precision": recipe.compute.precision}
    sft = stage_fingerprint(loaded, "sft") if recipe.sft and stage != "sft" else None
    if stage == "sft":
        system_prompt = recipe.data.system_prompt if recipe.data else None
        return {**start, "sft": _content(recipe.sft, without=_HOW_TO_KEEP), "system_prompt": system_prompt}
    if stage == "train-rm":
        own = recipe.train_rm.model if recipe.train_rm else None
        backbone = {"backbone": _weights(own), "after": None} if own else {"after": sft}
        return {**start, **backbone, "train_rm": _content(recipe.train_rm, without={"model", *_HOW_TO_KEEP})}
    if stage == "open-flow":
        marked = {"segments": True} if recipe.run_online and recipe.run_online.segments else {}
        return {"flow": _content(recipe.flow, without={"crowd", "stop_when_decided", *_HOW_TO_TALK}), **marked}
    if stage == "run-online":
        online = recipe.run_online
        with_model, with_people = online is not None and online.reads_reward_model, online is None or online.asks_people
        return {
            **start,
            "after": [sft, stage_fingerprint(loaded, "train-rm") if with_model else None],
            "flow": _content(recipe.flow, without=_HOW_TO_TALK) if with_people else None,
            "data": _content(recipe.data, without={"heldout_prompts"}),
            "system_prompt": recipe.data.system_prompt if recipe.data else None,
            "generator": [recipe.compute.generator, recipe.compute.generator_precision],
            "run_online": _content(online, without=_HOW_TO_KEEP | set(_HOW_TO_CALL)),
            "function": _content(online and online.function, without=_HOW_TO_CALL["function"]),
            "judge": _judge(online) if online is not None and online.feedback == "judge" else None,
            "previous_every": online.checkpoint_every if online is not None and online.samples_previous else None,
        }
    heldout = recipe.data.heldout_prompts if recipe.data else None
    return {
        "after": [
            stage_fingerprint(loaded, "run-online"),
            stage_fingerprint(loaded, "train-rm") if recipe.train_rm else None,
        ],
        "flow": _content(recipe.flow, without=_HOW_TO_TALK),
        "heldout_prompts": _file(heldout) if heldout else None,
        "eval": _content(recipe.eval),
        "judge": _judge(recipe.run_online) if recipe.eval is not None and recipe.eval.judge == "judge" else None,
    }


def _judge(online: RunOnline | None) -> Any:
    return _content(online and online.judge, without=_HOW_TO_CALL["judge"])


def _content(section: Any, without: set[str] | frozenset[str] = frozenset()) -> Any:
    """The values of a section, with files replaced by their content."""
    if section is None:
        return None
    values = section.model_dump(mode="python", exclude=without)
    return _with_files(values)


def _with_files(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_files(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_files(item) for item in value]
    return _file(value) if isinstance(value, Path) else value


def _model(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model.model_dump(mode="json")
    return {**values, "path": _weights(recipe.model.path)}


def _weights(path: str | None) -> Any:
    return _folder(Path(path)) if path and os.path.isabs(path) else path


def _folder(path: Path) -> list[tuple[str, str]]:
    return [(str(file.relative_to(path)), _file(file)) for file in sorted(path.rglob("*")) if file.is_file()]


def _file(path: Path) -> str:
    path = path / "journal.jsonl" if path.is_dir() else path  # a recording counts by what happened in it
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Of the content; size and time are there so that a file that changed is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
