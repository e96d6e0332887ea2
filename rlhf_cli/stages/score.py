"""`rlhf score`: what a reward model says of a file of completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.journal.run_dir import RunDir, write_atomic
from rlhf_cli.policy.load import load_config
from rlhf_cli.policy.packaged import PACKAGED
from rlhf_cli.policy.runtime import prepare
from rlhf_cli.policy.scoring import ABOUT, Array, PairwiseModel, RewardModel, Text, open_reward_model
from rlhf_cli.recipe.rows import Row, completion_of, prompt_of, text_of, wrong
from rlhf_cli.recipe.sources import Complaint, scan
from rlhf_cli.types import Message

AT_ONCE = 256
"""Rows that are sorted by length and scored together, and then written together."""
MAX_SHOWN = 10
ADDED = ("reward", "rewards", "spread", "spreads", "probability", "model")
"""What a row of the output has besides the row that was scored."""

OnProgress = Callable[[str, float, float | None], None]


@dataclass(frozen=True, slots=True)
class ToScore:
    """A row of the file; `row` is as it was written, less what an earlier scoring added."""

    row: Row
    prompt: tuple[Message, ...]
    completions: tuple[str, ...]

    @property
    def text(self) -> Text:
        return self.prompt, self.completions


def run(name: str, file: Path, output: Path | None, out: TextIO, on_progress: OnProgress) -> dict[str, Any]:
    """Score every row of `file`, in its order, to `output` or else to `out`.

    A row that `output` has already, with the same content and scored by the same weights, is kept as it is. Rows are
    written many at a time and only as whole lines; should a death tear the last one, it is scored again.

    Raises:
        DataError: Malformed rows, or a single completion for a pairwise model.
        UsageError: `name` is no reward model.
    """
    prepare(None)
    rows = read_to_score(file)
    model = open_reward_model(find_model(name))
    if isinstance(model, PairwiseModel) and any(len(row.completions) < 2 for row in rows):
        raise DataError(f"{file}: a pairwise model compares completions, and there are rows with only one")
    known = _known(output, model.about.version) if output is not None else {}
    kept = sum(_key(row.row) in known for row in rows)
    if output is not None:
        # What can be kept comes first; then only whole lines are added to it.
        ready = next((n for n, row in enumerate(rows) if _key(row.row) not in known), len(rows))
        write_atomic(output, b"".join(known[_key(row.row)] for row in rows[:ready]))
        with output.open("ab") as sink:

            def append(lines: bytes) -> None:
                sink.write(lines)
                sink.flush()  # all of it, or an error: without a buffer, a full disk would take a part in silence

            _score(model, rows, ready, known, append, on_progress)
    else:
        _score(model, rows, 0, known, lambda lines: out.write(lines.decode()), on_progress)
    return {"rows": len(rows), "kept": kept, "scored": len(rows) - kept, "output": str(output) if output else None}


def find_model(name: str) -> str:
    """What to load for `RM`: the reward model of a run folder, a model folder, a packaged model, or a hub id.

    Raises:
        UsageError: A run without a reward model, or a model that was never trained to score.
    """
    folder = Path(name)
    if name in PACKAGED:
        raise UsageError(f"'{name}' is a backbone, no reward model; train one on it with `train_rm.model: {name}`")
    if not folder.is_dir():
        if name.startswith(("./", "../", "/", "~")):
            raise UsageError(f"no such folder: {name}")
    elif (run := RunDir(folder)).journal.is_file():
        if not run.train_rm_model.is_dir():
            raise UsageError(f"{name} is a run without a reward model; `rlhf train-rm` makes one")
        folder = run.train_rm_model
        name = str(folder)
    if not (folder / ABOUT).is_file():
        architectures = load_config(name).architectures or []
        if not any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
            raise UsageError(f"{name} is no reward model: it has no head that scores, its kind is {architectures}")
    return name


def read_to_score(file: Path) -> list[ToScore]:
    """Read rows of `{"prompt", "completion"}` or `{"prompt", "completions"}`; without a prompt, texts by themselves.

    Raises:
        DataError: Malformed or empty.
    """
    rows: list[ToScore] = []
    bad: list[Complaint] = []
    for _, found in scan(file, _row):
        if isinstance(found, Complaint):
            bad.append(found)
        else:
            rows.append(found)
    if bad:
        more = [f"... and {len(bad) - MAX_SHOWN} more"] if len(bad) > MAX_SHOWN else []
        raise DataError("\n".join([*map(str, bad[:MAX_SHOWN]), *more]))
    return rows


def _row(row: Row) -> ToScore:
    row = {key: value for key, value in row.items() if key not in ADDED}
    prompt = tuple(Message(*turn) for turn in prompt_of(row)) if row.get("prompt") else ()
    if "completions" not in row:
        return ToScore(row, prompt, (completion_of(row, "completion"),))
    completions = row["completions"]
    if not isinstance(completions, list) or not completions:
        wrong("'completions' has to be a list of texts")
    texts = (text_of(text, f"completion {n}", empty=True) for n, text in enumerate(completions, 1))
    return ToScore(row, prompt, tuple(texts))


def _score(
    model: RewardModel | PairwiseModel,
    rows: Sequence[ToScore],
    start: int,
    known: dict[str, bytes],
    write: Callable[[bytes], object],
    on_progress: OnProgress,
) -> None:
    for first in range(start, len(rows), AT_ONCE):
        on_progress("scoring", first, len(rows))
        some = rows[first : first + AT_ONCE]
        fresh = [row for row in some if _key(row.row) not in known]
        said = dict(zip(map(id, fresh), _said(model, fresh), strict=True))
        lines = [
            json.dumps({**row.row, **said[id(row)], "model": model.about.version}).encode() + b"\n"
            if id(row) in said
            else known[_key(row.row)]
            for row in some
        ]
        write(b"".join(lines))
    on_progress("scoring", len(rows), len(rows))


def _said(model: RewardModel | PairwiseModel, rows: Sequence[ToScore]) -> list[Row]:
    """What the model says of each row; `probability` is that of the first of two completions being the better one."""
    if not rows:
        return []
    texts = [row.text for row in rows]
    rewards: list[tuple[Array, Array | None]]
    if isinstance(model, PairwiseModel):
        # A pairwise model has no scale of its own: a reward is the mean log-odds against the others of the row.
        logits = model.logits(texts)
        rewards = [(found.sum(1) / (len(found) - 1), None) for found in logits]
    else:
        rewards = model.score_all(texts)
        logits = [scores[:, None] - scores[None, :] for scores, _ in rewards]
    said: list[Row] = []
    for row, (scores, spread), margins in zip(rows, rewards, logits, strict=True):
        if "completions" in row.row:
            found: Row = {"rewards": scores.tolist()} | ({} if spread is None else {"spreads": spread.tolist()})
        else:
            found = {"reward": float(scores[0])} | ({} if spread is None else {"spread": float(spread[0])})
        if len(scores) == 2:
            found["probability"] = float(model.calibrated(margins)[0, 1])
        said.append(found)
    return said


def _known(output: Path, version: str) -> dict[str, bytes]:
    """Whole lines of an earlier output that these weights made, by what was scored."""
    known: dict[str, bytes] = {}
    for line in output.read_bytes().splitlines(keepends=True) if output.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a death; scored again
        if line.endswith(b"\n") and isinstance(row, dict) and row.get("model") == version:
            known[_key({key: value for key, value in row.items() if key not in ADDED})] = line
    return known


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True)
