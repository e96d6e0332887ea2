"""The guards: what they judge by, what they do, and that a roll-back is the same run whatever dies and whenever."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stream_world import PROMPTS, Disk, Killed, People, Writer, sampled, stream, train

from rlhf_cli.errors import Diverged, RunDamaged
from rlhf_cli.journal.events import CheckpointSaved, GroupSampled, GuardTripped, RolledBack, StepTrained
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.metrics import MetricsWriter, read_metrics
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.online import stream as module
from rlhf_cli.online.checkpoint import latest, partial_dir, publish
from rlhf_cli.online.guards import ENOUGH, Guards, RollBack, Trip
from rlhf_cli.online.lengths import correlation_within, slope_within
from rlhf_cli.online.rollback import check_lineage, clear_up, roll_back
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Completion, Group, RankedGroup, WinMatrix


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)


def recipe(**online: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "guards",
            "model": {"path": "none"},
            "data": {"prompts": "none.jsonl"},
            "flow": {
                "service": "embedded",
                "instruction": "Which?",
                "responses": {"min": 1, "desired": 3, "max": 3},
                "crowd": {},
            },
            "run_online": {
                "steps": 8,
                "prompts_per_step": 2,
                "group_size": 8,
                "max_in_flight": 2,
                "keep_checkpoints": 4,
                **online,
            },
        }
    )


class Drifting(Writer):
    """A policy that is `pace` nats further from its reference after every step, and writes `longer` more letters."""

    def __init__(self, pace: float = 0.0, longer: float = 0.0) -> None:
        super().__init__()
        self.pace, self.longer = pace, longer

    def sample_groups(self, prompts: Any, sampling: object, size: int, *, step: int, **given: Any) -> list[Group]:
        self.kl_nats = self.pace * step
        groups = super().sample_groups(prompts, sampling, size, step=step, **given)
        text = "x" * round(10 * (1 + self.longer * step))
        return [
            Group(
                g.id,
                g.index,
                g.prompt,
                g.prompt_ids,
                tuple(
                    Completion(text + "ab"[k % 2], c.token_ids, c.logps, c.ref_logps, c.ended)
                    for k, c in enumerate(g.completions)
                ),
                g.policy_step,
            )
            for g in groups
        ]


def process(run: RunDir, disk: Disk, plan: Recipe, pace: float, longer: float = 0.0) -> None:
    """What run-online does from its start or resume to its end, with a policy that beta holds back."""
    online = plan.run_online
    assert online is not None
    clear_up(run, disk.state())
    while True:
        state, checkpoint = disk.state(), latest(run)
        if checkpoint is not None:
            check_lineage(checkpoint, state)
        policy = Drifting(pace / state.beta_scale, longer / state.beta_scale)
        again = stream(plan, disk, People(disk), policy=policy)
        again.step = checkpoint.step if checkpoint else 0
        consumed = dict(checkpoint.consumed) if checkpoint else {}
        pull = iter(again)
        try:
            while again.step < online.steps:
                batch = next(pull)
                step = again.step + 1
                consumed[step] = tuple(g.group.id for g in batch.groups)
                disk.append(StepTrained(step=step, group_ids=consumed[step], beta=batch.beta))
                again.step = step
                if step % online.checkpoint_every == 0:
                    folder = partial_dir(run) / f"checkpoint-{step}"
                    folder.mkdir(parents=True)
                    (folder / "weights").write_text(f"{step} {state.beta_scale}")
                    publish(run, step, consumed, online.keep_checkpoints)
                    disk.append(CheckpointSaved(step=step, path="x"))
        except RollBack as rolled:
            disk.append(roll_back(run, disk.state(), rolled.trip, online.kl.rollback_beta))
            clear_up(run, disk.state())
        else:
            return


def told(disk: Disk, run: RunDir) -> dict[str, Any]:
    """Everything about a run that may not depend on when its processes died."""
    state = disk.state()
    index = {event.group_id: event.index for event in sampled(disk)}
    return {
        "steps": {s: ([index[g] for g in e.group_ids], e.beta) for s, e in state.steps.items()},
        "rollbacks": [(e.guard, e.value, e.from_step, e.to_step, e.beta_scale) for e in state.rollbacks],
        "sampled": [(e.index, e.policy_step) for e in sampled(disk)],
        "void": sorted(index[g.sampled.group_id] for g in state.groups.values() if g.void),
        "checkpoints": {path.name: (path / "weights").read_text() for path in run.checkpoints.glob("step-*")},
    }


def folder(path: Path) -> RunDir:
    run = RunDir(path)
    run.checkpoints.mkdir(parents=True)
    return run


PLANS = {
    "kl": (recipe(kl={"hard_nats": 10.0, "on_hard": "rollback"}, checkpoint_every=2), 4.0, 0.0),
    "from the start": (recipe(kl={"hard_nats": 10.0, "on_hard": "rollback"}, checkpoint_every=6, steps=6), 4.0, 0.0),
    "growth": (recipe(length={"max_growth": 2, "on_trip": "rollback"}, checkpoint_every=2, steps=6), 0.0, 0.3),
}


def test_beyond_the_hard_limit_the_run_goes_on_from_the_checkpoint_before_with_a_higher_beta(tmp_path: Path) -> None:
    plan, pace, _ = PLANS["kl"]
    disk, run = Disk(), folder(tmp_path)
    process(run, disk, plan, pace)
    state = disk.state()
    # 4 nats a step: 12 after three. Then 2 a step: 12 after six, whose own checkpoint is no good one.
    assert [(e.from_step, e.to_step, e.value, e.beta_scale) for e in state.rollbacks] == [
        (3, 2, 12.0, 2.0),
        (6, 4, 12.0, 4.0),
    ]
    assert sorted(state.steps) == list(range(1, 9))
    assert [state.steps[s].beta for s in (2, 3, 4, 5, 8)] == pytest.approx([0.1, 0.2, 0.2, 0.4, 0.4])
    trained = [group_id for event in state.steps.values() for group_id in event.group_ids]
    assert len(set(trained)) == len(trained) == 16
    assert all(not state.groups[group_id].void for group_id in trained)
    # The two groups of step 5 were sampled by step 4 and train again; those sampled after it are void, and what
    # tripped a guard was never written down, so that nobody was asked about it.
    assert [g.sampled.policy_step for g in state.groups.values() if g.void] == [5, 5]


@pytest.mark.parametrize("plan", PLANS)
def test_whatever_event_a_kill_comes_before_or_after_it_is_the_same_run(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # no power is lost here, and there are hundreds of deaths
    made, pace, longer = PLANS[plan]
    whole, run = Disk(), folder(tmp_path / "whole")
    process(run, whole, made, pace, longer)
    expected = told(whole, run)
    assert expected["rollbacks"]
    deaths = [{"dies_at": place} for place in range(len(whole.entries))]
    for place, entry in enumerate(whole.entries):  # files are written after these
        if isinstance(entry.event, StepTrained | RolledBack):
            deaths.append({"dies_after": place})
    for number, death in enumerate(deaths):
        disk, run = Disk(**death), folder(tmp_path / f"{number}")
        with pytest.raises(Killed):
            process(run, disk, made, pace, longer)
        disk.dies_at = disk.dies_after = None
        shutil.rmtree(partial_dir(run), ignore_errors=True)  # as a resume does
        process(run, disk, made, pace, longer)
        assert told(disk, run) == expected, death


def test_one_roll_back_more_than_allowed_ends_the_run(tmp_path: Path) -> None:
    disk, run = Disk(), folder(tmp_path)
    kl = {"hard_nats": 10.0, "on_hard": "rollback", "rollback_beta": 1.01, "max_rollbacks": 2}
    with pytest.raises(Diverged, match="after 2 roll-backs; the last checkpoint is kept"):
        process(run, disk, recipe(kl=kl, checkpoint_every=1), 4.0)
    assert [(e.from_step, e.to_step) for e in disk.of(RolledBack)] == [(3, 2), (3, 1)]  # the second one further back
    (tripped,) = disk.of(GuardTripped)
    assert (tripped.guard, tripped.action, tripped.step) == ("kl", "stop", 3)


def test_a_checkpoint_that_the_latest_roll_back_went_to_is_not_good_twice(tmp_path: Path) -> None:
    disk, run = Disk(), folder(tmp_path)
    process(run, disk, recipe(checkpoint_every=1, steps=4), 0.0)
    state = disk.state()
    trip = Trip("kl", 12.0, 10.0, "rollback", 4)
    first = roll_back(run, state, trip, 2.0)
    assert (first.to_step, first.checkpoint) == (3, "online/checkpoints/step-000003")
    disk.append(first)
    clear_up(run, disk.state())
    second = roll_back(run, disk.state(), trip, 2.0)
    assert (second.to_step, second.beta_scale) == (2, 4.0)


def test_a_checkpoint_of_another_run_is_not_rolled_back_to(tmp_path: Path) -> None:
    disk, run = Disk(), folder(tmp_path)
    process(run, disk, recipe(checkpoint_every=1, steps=4), 0.0)
    other = Disk()
    train(stream(recipe(steps=4, prompts_per_step=1, max_in_flight=1), other, People(other)), other)
    with pytest.raises(RunDamaged, match="other groups than the journal says"):
        roll_back(run, other.state(), Trip("kl", 12.0, 10.0, "rollback", 4), 2.0)


def test_metrics_of_steps_that_were_given_up_are_gone_for_readers(tmp_path: Path) -> None:
    rows = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        rows.append(step, {"reward/mean": float(step)})
    rows.void_after(1)
    assert [row["step"] for row in read_metrics(rows.path)] == [1]
    rows.append(2, {"reward/mean": 20.0})
    assert [row["reward/mean"] for row in read_metrics(rows.path)] == [1.0, 20.0]


def test_a_roll_back_survives_being_written(tmp_path: Path) -> None:
    event = RolledBack(guard="kl", value=12.5, limit=10, from_step=4, to_step=0, checkpoint=None, beta_scale=2.0)
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        assert journal.append(event).event == event


# What they judge by.


def group(index: int, texts: list[str], kl_nats: float = 0.0, step: int = 1) -> Group:
    completions = tuple(Completion(text, (3,), (kl_nats - 1.0,), (-1.0,), True) for text in texts)
    return Group(f"g{index}", index, PROMPTS[0], (1, 2), completions, step)


def guards(**online: Any) -> Guards:
    made = recipe(prompts_per_step=1, max_in_flight=1, group_size=2, **online).run_online
    assert made is not None
    return Guards(made, Disk().state())


def test_kl_is_judged_on_enough_completions_and_on_no_older_ones() -> None:
    judge = guards(kl={"hard_nats": 10.0})
    for k in range(ENOUGH // 2 - 1):
        judge.sampled([group(k, ["a", "b"], kl_nats=90.0)])
    assert judge.kl_nats is None  # two completions short of enough, however far they are
    assert judge.trips(1) == []
    judge.sampled([group(99, ["a", "b"], kl_nats=10.0)])
    assert judge.kl_nats == pytest.approx((14 * 90 + 2 * 10) / 16)
    for k in range(ENOUGH // 2):
        judge.sampled([group(k, ["a", "b"], kl_nats=10.0)])
    assert judge.kl_nats == pytest.approx(10.0)
    assert judge.trips(1) == []  # at the limit is not beyond it
    judge.sampled([group(99, ["a", "b"], kl_nats=10.1)])
    (trip,) = judge.trips(3)
    assert (trip.guard, trip.limit, trip.action, trip.step) == ("kl", 10.0, "stop", 3)


def test_growth_is_measured_against_what_the_untrained_policy_sampled() -> None:
    judge = guards(length={"max_growth": 2})
    for k in range(ENOUGH // 2):
        judge.sampled([group(k, ["aaaa", "aa"], step=0)])
    assert judge.growth == 1.0
    for k in range(ENOUGH // 2):
        judge.sampled([group(k, ["aaaaaaa", "aaaaaa"], step=5)])
    assert judge.growth == pytest.approx(6.5 / 3)
    (trip,) = judge.trips(5)
    assert (trip.guard, trip.action) == ("length_growth", "note")


def ranked(index: int, texts: list[str], scores: tuple[float, ...] | None) -> RankedGroup:
    return RankedGroup(group(index, texts), WinMatrix([[0, 2], [1, 0]]), "item:x", 1.0, True, scores=scores)


def test_the_correlation_with_length_is_of_what_the_learner_sees() -> None:
    given, derived = guards(length={"max_correlation": 0.5}), guards(length={"max_correlation": 0.5})
    for k in range(31):
        given.ranked(ranked(k, ["long text", "short"], (3.0, 1.0)))
        derived.ranked(ranked(k, ["short", "long text"], None))
    assert given.correlation is None  # 62 completions: not enough yet
    given.ranked(ranked(31, ["long text", "short"], (3.0, 1.0)))
    derived.ranked(ranked(31, ["short", "long text"], None))
    assert given.correlation == pytest.approx(1.0)
    assert derived.correlation == pytest.approx(-1.0)  # the shorter one won, two votes to one
    assert [trip.guard for trip in given.trips(1)] == ["length_correlation"]
    assert derived.trips(1) == []


def test_a_length_penalty_is_off_the_scores_of_a_ranking() -> None:
    penalised = guards(length={"penalty": 1.0, "max_correlation": 0.5})
    for k in range(32):
        penalised.ranked(ranked(k, ["long text", "short"], None))
    assert penalised.correlation == pytest.approx(-1.0)  # half a logit of votes against four characters


def test_a_length_penalty_that_a_reward_model_took_is_not_taken_again() -> None:
    once = guards(length={"penalty": 1.0, "max_correlation": 0.5})
    for k in range(32):  # a pairwise model gives no scores, and has taken the penalty off its votes
        longer_won = ranked(k, ["a long text", "short"], None)
        once.ranked(replace(longer_won, wins=WinMatrix([[0, 0.9], [0.1, 0]]), source="reward_model:v1"))
    assert once.correlation == pytest.approx(1.0)


def test_correlation_within_groups_by_hand() -> None:
    # Deviations (-1, 1) and (-2, 2) of scores against (-2, 2) and (1, -1) of lengths: (4 - 4) / ... = 0; between the
    # groups longer is better, which says nothing.
    assert correlation_within([([0, 2], [10, 14]), ([10, 14], [31, 29])]) == pytest.approx(0.0)
    assert correlation_within([([0, 2], [10, 14]), ([1, 3], [30, 31])]) == pytest.approx(
        (2 * 2 + 2 * 0.5) / math.sqrt(4 * (8 + 0.5))
    )
    assert correlation_within([([math.nan, 0, 2], [99, 10, 14])]) == pytest.approx(1.0)  # what has no score is left out
    assert correlation_within([([1, 1], [10, 14])]) is None
    assert correlation_within([]) is None


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 300)), min_size=2, max_size=6), min_size=1, max_size=6
    ),
    st.floats(-50, 50),
    st.integers(0, 500),
)
def test_what_all_completions_of_a_group_share_changes_nothing(
    drawn: list[list[tuple[float, int]]], score: float, chars: int
) -> None:
    groups = [([s for s, _ in g], [n for _, n in g]) for g in drawn]
    moved = [
        ([s + score * k for s in scores], [n + chars * k for n in lengths])
        for k, (scores, lengths) in enumerate(groups)
    ]
    assert slope_within(moved) == pytest.approx(slope_within(groups), abs=1e-6)


def test_reward_at_equal_length_takes_off_what_length_alone_brought() -> None:
    judge = guards()
    judge.sampled([group(k, ["x" * 30, "x" * 30], step=0) for k in range(3)])
    rng = np.random.default_rng(3)
    for k in range(32):  # a reward of 0.1 a character, whatever else
        lengths = rng.integers(20, 60, 2)
        judge.shown(group(k, ["x" * n for n in lengths]), [5.0 * k + 0.1 * n for n in lengths])
    assert judge.length_controlled(8.0, 40.0) == pytest.approx(8.0 - 0.1 * (40 - 30))


def test_reward_at_equal_length_is_not_guessed_where_nothing_is_that_long_any_more() -> None:
    judge = guards()
    judge.sampled([group(k, ["x" * 40, "x" * 40], step=0) for k in range(3)])
    assert judge.length_controlled(8.0, 40.0) is None  # nothing was scored yet
    for k in range(32):
        judge.shown(group(k, ["x" * 4, "x" * 6]), [0.0, 2.0])  # by its slope 40 characters would be worth 35 more
    assert judge.length_controlled(8.0, 5.0) is None
    judge.shown(group(32, ["x" * 4, "x" * 60]), [0.0, 1.0])
    assert judge.length_controlled(8.0, 5.0) is not None


def test_a_resumed_run_judges_as_the_one_before_would_have() -> None:
    disk = Disk()
    plan = recipe(kl={"soft_nats": 2.0}, length={"max_correlation": 0.9}, steps=6)
    first = stream(plan, disk, People(disk), policy=Drifting(1.0, 0.2))
    train(first, disk)
    again = stream(plan, disk, People(disk))
    assert (first.guards.kl_nats, first.guards.growth) == (5.0, 2.0 * 21 / 22)  # as 21 characters are to 11
    for figure in ("kl_nats", "kl_latest_nats", "growth", "correlation"):
        assert getattr(again.guards, figure) == getattr(first.guards, figure), figure


# What they do.


def test_a_note_is_written_once_and_the_run_goes_on() -> None:
    disk = Disk()
    plan = recipe(length={"max_growth": 1.5, "on_trip": "note"}, steps=8)
    train(stream(plan, disk, People(disk), policy=Drifting(0.0, 0.2)), disk)
    (tripped,) = disk.of(GuardTripped)
    assert (tripped.guard, tripped.action, tripped.limit) == ("length_growth", "note", 1.5)
    again = stream(plan, disk, People(disk), policy=Drifting(0.0, 0.2))
    assert [t.guard for t in again.guards.trips(8)] == ["length_growth"]
    again._heed_guards()  # as its first look at the feedback would
    assert len(disk.of(GuardTripped)) == 1


def test_a_stop_ends_the_run_before_anybody_is_asked() -> None:
    disk = Disk()
    people = People(disk)
    plan = recipe(length={"max_growth": 1.5, "on_trip": "stop"}, steps=8)
    with pytest.raises(Diverged, match=r"1\.\d+ times as long as those of the first step"):
        train(stream(plan, disk, people, policy=Drifting(0.0, 0.2)), disk)
    assert people.asked == [event.group_id for event in disk.of(GroupSampled)]
    assert disk.entries[-1].event == disk.of(GuardTripped)[0]


def test_with_no_step_taken_there_is_none_to_give_up() -> None:
    disk = Disk()
    kl = {"hard_nats": 10.0, "on_hard": "rollback"}
    far = Writer(kl_nats=50.0)  # of another precision than its reference, say
    run = stream(recipe(kl=kl, steps=3), disk, People(disk), policy=far)
    pull = iter(run)
    next(pull)
    run.step = 1
    with pytest.raises(RollBack, match=r"50\.0 nats a completion after step 1"):
        next(pull)
