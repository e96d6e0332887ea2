"""`rlhf votes export`: the votes of a run as rows for other tools. Reads only, so the run may be at work or dead."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rlhf_cli.errors import DataError
from rlhf_cli.feedback.items import Shown
from rlhf_cli.flow.wire import Body, Outcome
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import GroupState, attempts
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.server.store import Store
from rlhf_cli.server.times import iso
from rlhf_cli.text import visible

View = Literal["matrices", "pairs", "votes", "preferences"]
Form = Literal["jsonl", "csv"]
Part = Literal["run-online", "eval"]
Row = dict[str, Any]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A spreadsheet takes a cell that begins with one of these for a formula; the last four are their wide forms."""


class _Vote(Body):
    """One vote as a server of ours tells it; its places are among what was shown."""

    rater: str
    simulated: bool = False
    left: int = Field(ge=0)
    right: int = Field(ge=0)
    outcome: Outcome
    response_ms: int | None = None
    counts: bool
    late: bool = False
    undone: bool = False
    created_at: str

    def row(self) -> Row:
        return {**self.model_dump(exclude={"created_at"}), "at": self.created_at}


class _Page(Body):
    page: int = 1
    items: list[_Vote]


@dataclass(frozen=True, slots=True)
class Voted:
    """A group, the attempt at run-online that it belongs to, and its votes if there are any."""

    attempt: int
    state: GroupState
    wins: np.ndarray[Any, np.dtype[np.float64]] | None

    @property
    def by_people(self) -> bool:
        return self.state.ranked is None or self.state.ranked.by_people


def export(path: Path, view: View, part: Part = "run-online") -> list[Row]:
    """The votes of the run folder at `path`, of all attempts, in the order in which groups were sampled.

    Raises:
        DataError: No journal, or raw votes where the service does not give them.
        RunDamaged: The journal was changed.
    """
    run = RunDir(path)
    groups = list(_groups(run, part))
    if view == "votes":
        return _raw_votes(run, groups)
    voted = [group for group in groups if group.wins is not None and group.wins.any()]
    if view == "matrices":
        return [_matrix(group) for group in voted]
    people = [group for group in voted if group.by_people]
    if view == "pairs":
        return [row for group in people for row in _pairs(group)]
    return [row for group in people for row in _preferences(group)]


def as_text(rows: Sequence[Row], form: Form) -> str:
    """Rows as JSON lines, exact and all ASCII, or as CSV that no spreadsheet takes for formulas."""
    if form == "jsonl":
        return "".join(json.dumps(row).replace("\x7f", "\\u007f") + "\n" for row in rows)
    out = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(out, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        value = json.dumps(value)
    if not isinstance(value, str):
        return value
    return visible(f"'{value}" if value.startswith(_FORMULA) else value)


def _groups(run: RunDir, part: Part) -> Iterator[Voted]:
    """Every group that was ever sampled; what an attempt or an eval that was replaced had asked was paid for too."""
    if part == "run-online":
        if not run.journal.exists():
            raise DataError(f"{run.path}: no run folder, it has no journal.jsonl")
        journals = [run.journal]
    else:
        journals = [*sorted(run.eval_journal.parent.glob("journal.replaced-*.jsonl")), run.eval_journal]
    for journal in journals:
        for state in attempts(read(journal)):
            yield from (Voted(state.attempt, group, _wins(group)) for group in state.groups.values())


def _wins(group: GroupState) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    if group.ranked is not None:
        return group.ranked.matrix().wins
    seen = [np.array(ended.wins) for ended in group.ended if ended.wins is not None]
    return np.sum(seen, axis=0) if seen else None


def _matrix(group: Voted) -> Row:
    state, ranked = group.state, group.state.ranked
    assert group.wins is not None
    row = {
        **_ids(group),
        "prompt": _prompt(state),
        "completions": [c.text for c in state.sampled.completions],
        "wins": group.wins.tolist(),
        "votes": float(group.wins.sum()),
        "source": ranked.source if ranked else "+".join(f"item:{ended.item_id}" for ended in state.ended),
        "complete": ranked.complete if ranked else False,
        "latency_s": ranked.latency_s if ranked else None,
        "policy_step": state.sampled.policy_step,
        "trained_step": state.step,
        "set_aside": state.set_aside,
    }
    if any(c.role for c in state.sampled.completions):
        row["roles"] = [c.role for c in state.sampled.completions]
    if ranked is not None and ranked.segments:
        keys = ("completion", "start", "end", "good")
        row["segments"] = [dict(zip(keys, segment, strict=True)) for segment in ranked.segments]
    if state.late:
        row["late_wins"] = np.sum([late.matrix().wins for late in state.late], axis=0).tolist()
    return row


def _pairs(group: Voted) -> Iterator[Row]:
    """Pairs with votes; completion i stands before j."""
    wins, completions = group.wins, group.state.sampled.completions
    texts, roles = [c.text for c in completions], [c.role for c in completions]
    assert wins is not None
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            if wins[i, j] + wins[j, i] > 0:
                yield {
                    **_ids(group),
                    "i": i,
                    "j": j,
                    "wins_i": float(wins[i, j]),
                    "wins_j": float(wins[j, i]),
                    "prompt": _prompt(group.state),
                    "completion_i": texts[i],
                    "completion_j": texts[j],
                    **({"role_i": roles[i], "role_j": roles[j]} if any(roles) else {}),
                }


def _preferences(group: Voted) -> Iterator[Row]:
    """Rows in TRL's conversational preference format; a pair without a majority says nothing and makes none."""
    for pair in _pairs(group):
        sides = [("i", pair["wins_i"]), ("j", pair["wins_j"])]
        (worse, fewer), (better, more) = sorted(sides, key=lambda side: side[1])
        if more > fewer:
            yield {
                "prompt": _messages(group.state),
                "chosen": [{"role": "assistant", "content": pair[f"completion_{better}"]}],
                "rejected": [{"role": "assistant", "content": pair[f"completion_{worse}"]}],
                "votes_chosen": more,
                "votes_rejected": fewer,
                **_ids(group),
            }


def _ids(group: Voted) -> Row:
    sampled = group.state.sampled
    return {"group_id": sampled.group_id, "prompt_id": sampled.prompt_id, "attempt": group.attempt}


def _messages(state: GroupState) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in state.sampled.messages]


def _prompt(state: GroupState) -> str | list[dict[str, str]]:
    """As data files have it: text where that says everything."""
    messages = state.sampled.messages
    return messages[0][1] if [role for role, _ in messages] == ["user"] else _messages(state)


def _raw_votes(run: RunDir, groups: Iterable[Voted]) -> list[Row]:
    """Every vote as it was cast; `left` and `right` are places among the group's completions."""
    said = {**_votes_of_bodies(run.flow_bodies), **_votes_of_store(run.flow_store)}
    if not said:
        raise DataError(
            f"{run.path}: holds no raw votes; only the embedded server and `rlhf serve` give them, and only of items "
            "that have ended. Use --as matrices or --as pairs."
        )
    rows = []
    for group in groups:
        sampled, state = group.state.sampled, group.state
        shown = Shown.of(sampled.group_id, [c.text for c in sampled.completions]).indices
        doubles = [item_id for double in state.doubles for item_id in double.item_ids]
        for item_id in dict.fromkeys([*(ask.item_id for ask in state.asks), *doubles]):
            for vote in said.get(item_id or "", ()):
                if max(vote["left"], vote["right"]) < len(shown):  # a service may say anything
                    places = {side: shown[vote[side]] for side in ("left", "right")}
                    rows.append({**_ids(group), "item_id": item_id, **vote, **places})
    return rows


def _votes_of_store(path: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    if not path.exists():
        return found
    with closing(Store(path)) as store:
        simulated = {token.id for token in store.tokens.all() if token.simulated}
        votes = store.votes()
        places = {item_id: [c.sort_index for c in store.candidates(item_id)] for item_id in {v.item_id for v in votes}}
    for vote in votes:
        row = {
            "rater": vote.rater_id,
            "simulated": vote.rater_id in simulated,
            "left": places[vote.item_id][vote.left],
            "right": places[vote.item_id][vote.right],
            "outcome": vote.outcome,
            "response_ms": vote.response_ms,
            "counts": vote.counts,
            "late": vote.late,
            "undone": vote.undone,
            "at": iso(vote.created_at),
        }
        found.setdefault(vote.item_id, []).append(row)
    return found


def _votes_of_bodies(path: Path) -> dict[str, list[Row]]:
    """What a server of ours said of items that have ended; the last time counts, for late votes are in it too."""
    if not path.exists():
        return {}
    pages: dict[tuple[str, int], list[Row]] = {}
    for line in path.read_bytes().splitlines():
        try:
            kept = json.loads(line)
            page = _Page.model_validate_json(kept["body"]) if kept["kind"] == "votes" else None
        except ValueError:
            continue  # half a line, or half a page, or no page at all: what counts is in the matrix
        if page is not None:
            pages[kept["item_id"], page.page] = [vote.row() for vote in page.items]
    found: dict[str, list[Row]] = {}
    for (item_id, _), rows in sorted(pages.items()):
        found.setdefault(item_id, []).extend(rows)
    return found
