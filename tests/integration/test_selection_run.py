"""A run whose people see a part of the groups, and a watch on clusters of its prompts: from the recipe to the store."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from cli_world import (
    QUICK,
    Process,
    Smoke,
    assert_every_label_has_its_votes,
    copy,
    count,
    events,
    stage,
    state,
    succeeded,
)

from rlhf_cli.feedback.selection import NOT_SELECTED
from rlhf_cli.journal.events import GroupChosen, GroupIntended, GroupSampled, PromptsCompared
from rlhf_cli.journal.metrics import read_metrics
from rlhf_cli.journal.run_dir import RunDir

DIVERSE = (*QUICK, "run_online.selection={by: diverse, share: 0.5}")
UNSURE = (*QUICK, "run_online.selection={share: 0.5}")
DRIFTING = (
    *QUICK,
    "run_online.feedback=hybrid",
    "run_online.selection={by: drifting, share: 0.5}",
    "run_online.refresh={every_groups: 4}",
    "run_online.drift={clusters: 3, window: 8}",
)


def check(folder: Path) -> None:
    """Every group was chosen once, before anything was bought; nothing was bought that was not chosen."""
    seen, known = events(folder), state(folder)
    chosen = {event.group_id: event for event in seen if isinstance(event, GroupChosen)}
    assert len(chosen) == count(GroupChosen, seen) == count(GroupSampled, seen)
    asked = {event.group_id for event in seen if isinstance(event, GroupIntended)}
    assert asked == {group_id for group_id, event in chosen.items() if event.people}
    assert 0 < len(asked) < len(chosen)
    assert all(known.groups[group_id].chosen == event for group_id, event in chosen.items())


@pytest.mark.parametrize("sets", [DIVERSE, UNSURE], ids=["diverse", "uncertainty"])
def test_with_votes_the_others_are_set_aside_and_every_step_still_gets_its_groups(
    sets: tuple[str, ...], smoke: Smoke, tmp_path: Path
) -> None:
    folder = copy(smoke.prepared, tmp_path)
    succeeded(stage("run-online", folder, sets=sets))
    check(folder)
    assert_every_label_has_its_votes(folder)
    known = state(folder)
    aside = {g.set_aside for g in known.groups.values() if g.chosen is not None and not g.chosen.people}
    assert aside == {NOT_SELECTED}
    assert {len(event.group_ids) for event in known.steps.values()} == {4}
    assert (known.compared is not None) == (sets is DIVERSE)


def test_a_drift_watch_sorts_prompts_once_and_a_killed_run_goes_on_with_it(smoke: Smoke, tmp_path: Path) -> None:
    folder = copy(smoke.prepared, tmp_path)
    process = Process("run-online", folder, sets=DRIFTING)
    process.send(signal.SIGKILL, lambda seen: count(GroupChosen, seen) > 12)
    assert process.ended().code == -signal.SIGKILL
    before = [event for event in events(folder) if isinstance(event, GroupChosen)]
    succeeded(stage("run-online", folder, "--resume", sets=DRIFTING))
    check(folder)
    seen = events(folder)
    assert [event for event in seen if isinstance(event, GroupChosen)][: len(before)] == before
    (compared,) = [event for event in seen if isinstance(event, PromptsCompared)]
    assert len(compared.clusters) == 3
    clusters = {event.cluster for event in seen if isinstance(event, GroupChosen)}
    assert clusters <= {0, 1, 2}
    row = read_metrics(RunDir(folder).metrics)[-1]
    assert {f"drift/c{cluster}_kl_nats" for cluster in clusters} <= set(row)
    assert row["drift/rounds_total"] == 0.0
    assert 0 < row["selection/people_frac"] < 1
