"""The votes of a run, as data to train a reward model on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlhf_cli.errors import DataError
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import GroupState, attempts
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.types import Message, WinMatrix


def read_run_votes(run_dir: Path) -> list[VotedGroup]:
    """Every group of the run that people voted on, with all their votes.

    Also those that no policy step could use: votes that came after their group was decided, those on groups that were
    set aside, and those of attempts that --fresh gave up. What a model said in people's place is left out: a reward
    model would learn from itself.

    Raises:
        DataError: There is no journal, or nobody voted in it.
        RunDamaged: As `journal.read`.
    """
    path = RunDir(run_dir).journal
    if not path.exists():
        raise DataError(f"{run_dir}: no run folder, it has no journal.jsonl")
    states = list(attempts(read(path)))
    source = states[-1].started.name if states[-1].started else run_dir.name
    groups = []
    for group in (group for state in states for group in state.groups.values()):
        wins, sampled = _by_people(group), group.sampled
        if wins is None or not wins.votes:
            continue
        prompt = tuple(Message(role, content) for role, content in sampled.messages)
        completions = tuple(c.text for c in sampled.completions)
        where = f"{run_dir.name}/{sampled.group_id}"
        groups.append(VotedGroup(prompt, completions, wins, source, where=where))
    if not groups:
        raise DataError(f"{run_dir}: nobody voted in this run, so there is nothing to train on")
    return groups


def _by_people(group: GroupState) -> WinMatrix | None:
    """All votes that people gave on a group, each once; None where they gave none."""
    if group.ranked is not None and group.ranked.by_people:
        known = [group.ranked.matrix().wins]  # of all items that had ended until then
    else:
        known = [np.array(ended.wins) for ended in group.ended if ended.wins is not None]
    known += [late.matrix().wins for late in group.late]
    return WinMatrix(sum(known[1:], known[0])) if known else None
