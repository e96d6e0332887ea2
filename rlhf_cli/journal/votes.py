"""The votes of a run, as data to train a reward model on."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import DataError
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.types import Message


def read_run_votes(run_dir: Path) -> list[VotedGroup]:
    """Every group of the run that people ranked; votes that came too late are not among them.

    Groups that a model ranked in people's place are left out: a reward model would learn from itself.

    Raises:
        DataError: There is no journal, or nobody voted in it.
        RunDamaged: As `journal.read`.
    """
    path = RunDir(run_dir).journal
    if not path.exists():
        raise DataError(f"{run_dir}: no run folder, it has no journal.jsonl")
    state = replay(read(path))
    source = state.started.name if state.started else run_dir.name
    groups = []
    for group in state.groups.values():
        ranked, sampled = group.ranked, group.sampled
        if ranked is None or not ranked.by_people or not ranked.matrix().votes:
            continue
        prompt = tuple(Message(role, content) for role, content in sampled.messages)
        completions = tuple(c.text for c in sampled.completions)
        where = f"{run_dir.name}/{sampled.group_id}"
        groups.append(VotedGroup(prompt, completions, ranked.matrix(), source, where=where))
    if not groups:
        raise DataError(f"{run_dir}: nobody voted in this run, so there is nothing to train on")
    return groups
