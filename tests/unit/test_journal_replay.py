"""Replaying a journal gives the state to go on from, or says where the journal contradicts itself."""

from __future__ import annotations

import pytest

from rlhf_cli.errors import RunDamaged
from rlhf_cli.journal.events import (
    CheckpointSaved,
    DatasetCreated,
    Event,
    FlowOpened,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    GroupSubmitted,
    ItemEnded,
    RolledBack,
    RunStarted,
    RunStopped,
    StageFinished,
    StageStarted,
    StepTrained,
    VotesLate,
)
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import Ask, RunState, replay


def run(*events: Event) -> RunState:
    return replay(Entry(seq, 100.0 + seq, event) for seq, event in enumerate(events))


def online(attempt: int = 1, resumed_from_step: int | None = None) -> StageStarted:
    return StageStarted(stage="run-online", fingerprint="f", attempt=attempt, resumed_from_step=resumed_from_step)


def sampled(group_id: str, index: int) -> GroupSampled:
    return GroupSampled(
        group_id=group_id, index=index, prompt_id="p", messages=(), prompt_ids=(), completions=(), policy_step=0
    )


def ranked(group_id: str, source: str = "item:x", votes: float = 3) -> GroupRanked:
    return GroupRanked(group_id=group_id, source=source, wins=((0, votes), (0, 0)), latency_s=1, complete=True)


def test_an_empty_journal_is_a_run_that_has_not_begun() -> None:
    state = replay([])

    assert (state.run_id, state.next_index, state.votes_total, state.attempt) == (None, 0, 0, 0)


def test_a_group_remembers_its_whole_life() -> None:
    state = run(
        online(),
        sampled("a", 0),
        GroupIntended(group_id="a", key="key-a"),
        DatasetCreated(group_id="a", dataset_id="d"),
        GroupSubmitted(group_id="a", dataset_id="d", item_id="i"),
        ranked("a"),
        StepTrained(step=1, group_ids=("a",)),
    )
    group = state.groups["a"]

    assert group.asks == (Ask("key-a", "d", "i", 104.0),)
    assert (group.item_id, group.decided_at, group.step, group.open, group.ready) == ("i", 105.0, 1, False, False)


def test_open_ready_and_next_index_are_what_a_resume_needs() -> None:
    state = run(
        online(),
        *(sampled(name, index) for index, name in enumerate("abcde")),
        ranked("d"),
        ranked("a"),
        ranked("b"),
        GroupSetAside(group_id="e", reason="no votes"),
        StepTrained(step=1, group_ids=("b",)),
        CheckpointSaved(step=1, path="online/checkpoints/step-000001"),
    )

    assert [g.sampled.group_id for g in state.ready_groups] == ["d", "a"]
    assert [g.sampled.group_id for g in state.open_groups] == ["c"]
    assert (state.next_index, state.steps) == (5, {1: StepTrained(step=1, group_ids=("b",))})
    assert state.groups["e"].set_aside == "no votes"
    assert state.checkpoint is not None
    assert state.checkpoint.step == 1


def test_a_fresh_attempt_starts_with_no_groups_but_keeps_the_votes_that_were_paid() -> None:
    state = run(
        online(), sampled("a", 0), ranked("a", votes=5), CheckpointSaved(step=1, path="x"), online(2), sampled("a", 0)
    )

    assert state.attempt == 2
    assert state.groups["a"].ranked is None
    assert (state.checkpoint, state.votes_total) == (None, 5)


def test_a_resume_keeps_the_groups_and_repeats_steps_with_the_same_ones() -> None:
    state = run(
        online(),
        sampled("a", 0),
        ranked("a"),
        StepTrained(step=1, group_ids=("a",)),
        online(resumed_from_step=0),
        StepTrained(step=1, group_ids=("a",)),
    )

    assert state.steps == {1: StepTrained(step=1, group_ids=("a",))}


def test_only_peoples_votes_are_counted_and_the_first_snapshot_stays() -> None:
    state = run(
        online(),
        sampled("a", 0),
        sampled("b", 1),
        ranked("a"),
        ranked("a", votes=9),
        ranked("b", source="reward_model:1"),
    )

    assert state.votes_total == 3
    assert state.groups["a"].ranked == ranked("a")


def test_a_group_that_is_asked_about_again_remembers_both_asks_and_counts_each_vote_once() -> None:
    few = ((0.0, 2.0), (0.0, 0.0))
    state = run(
        online(),
        sampled("a", 0),
        GroupIntended(group_id="a", key="first"),
        DatasetCreated(group_id="a", dataset_id="d1"),
        GroupSubmitted(group_id="a", dataset_id="d1", item_id="i1"),
        ItemEnded(group_id="a", item_id="i1", state="Incomplete", votes=2, wins=few),
        GroupIntended(group_id="a", key="second"),
        DatasetCreated(group_id="a", dataset_id="d2"),
        GroupSubmitted(group_id="a", dataset_id="d2", item_id="i2"),
        ranked("a", votes=7),  # of both items
        VotesLate(group_id="a", item_id="i2", wins=((0, 0), (1, 0))),
    )
    group = state.groups["a"]

    assert group.asks == (Ask("first", "d1", "i1", 104.0), Ask("second", "d2", "i2", 108.0))
    assert state.votes_total == 8
    assert group.ranked == ranked("a", votes=7)  # late votes are kept and change nothing


def test_votes_that_a_service_only_counted_are_not_paid_twice_when_it_shows_them_late() -> None:
    state = run(
        online(),
        sampled("a", 0),
        ItemEnded(group_id="a", item_id="i", state="Failed", votes=5),
        GroupSetAside(group_id="a", reason="failed"),
        VotesLate(group_id="a", item_id="i", wins=((0, 4), (3, 0))),
        VotesLate(group_id="a", item_id="i", wins=((0, 1), (0, 0))),
    )

    assert state.votes_total == 8
    assert not state.open_groups


def test_a_stage_is_done_until_it_is_started_again() -> None:
    done = StageFinished(stage="sft", fingerprint="f", seconds=2, summary={"loss": 1.5})
    state = run(RunStarted(run_id="r", name="n", seed=1, version="0"), done, RunStopped(exit_code=0, reason="done"))
    assert (state.stages["sft"].fingerprint, state.stages["sft"].summary) == ("f", {"loss": 1.5})
    assert state.stopped is not None
    assert state.current is None

    again = run(done, RunStopped(exit_code=0, reason="done"), StageStarted(stage="sft", fingerprint="g"))
    assert again.stages == {}
    assert again.current is not None
    assert again.stopped is None


def test_the_last_flow_opened_counts() -> None:
    flows = [
        FlowOpened(
            flow_id=i,
            service="embedded",
            fingerprint="f",
            instruction="?",
            min_votes=1,
            desired_votes=2,
            max_votes=3,
            ttl_s=9,
        )
        for i in ("one", "two")
    ]

    assert run(*flows).flow == flows[1]


A, B = (sampled("a", 0), ranked("a")), (sampled("b", 1), ranked("b"))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((*A, sampled("a", 0)), "line 4: group a is sampled a second time"),
        ((ranked("a"),), "line 2: group_ranked of group a, which was never sampled"),
        ((sampled("a", 0), StepTrained(step=1, group_ids=("a",))), "line 3: step 1 trained on group a, which has no"),
        ((StepTrained(step=1, group_ids=("zz",)),), "line 2: step 1 trained on group zz"),
        (
            (*A, StepTrained(step=1, group_ids=("a",)), StepTrained(step=2, group_ids=("a",))),
            "line 5: group a is trained in step 1 and again in step 2",
        ),
        (
            (*A, *B, StepTrained(step=1, group_ids=("a",)), StepTrained(step=1, group_ids=("b",))),
            "line 7: step 1 is trained again with other groups",
        ),
        ((*A, GroupSetAside(group_id="a", reason="old"), StepTrained(step=1, group_ids=("a",))), "no usable votes"),
        ((*A, StepTrained(step=1, group_ids=("a",)), GroupSetAside(group_id="a", reason="old")), "set aside after"),
    ],
)
def test_contradictions_are_refused_with_their_line(events: tuple[Event, ...], message: str) -> None:
    with pytest.raises(RunDamaged, match=message):
        run(online(), *events)


def test_a_journal_of_two_runs_is_refused() -> None:
    with pytest.raises(RunDamaged, match="run two starts in the journal of run one"):
        run(*(RunStarted(run_id=i, name="n", seed=1, version="0") for i in ("one", "two")))


def at_step(group_id: str, index: int, policy_step: int) -> GroupSampled:
    return sampled(group_id, index).model_copy(update={"policy_step": policy_step})


def back(to_step: int, from_step: int = 3, beta_scale: float = 2.0) -> RolledBack:
    checkpoint = f"online/checkpoints/step-{to_step:06d}" if to_step else None
    return RolledBack(
        guard="kl",
        value=21,
        limit=20,
        from_step=from_step,
        to_step=to_step,
        checkpoint=checkpoint,
        beta_scale=beta_scale,
    )


def three_steps() -> list[Event]:
    """A step on `a`, one on `b`, which was sampled before it, and one on `c`, sampled by the policy after two steps."""
    return [
        online(),
        at_step("a", 0, 0),
        at_step("b", 1, 0),
        ranked("a"),
        ranked("b"),
        StepTrained(step=1, group_ids=("a",)),
        CheckpointSaved(step=1, path="online/checkpoints/step-000001"),
        StepTrained(step=2, group_ids=("b",)),
        CheckpointSaved(step=2, path="online/checkpoints/step-000002"),
        at_step("c", 2, 2),
        at_step("d", 3, 2),
        ranked("c"),
        StepTrained(step=3, group_ids=("c",)),
    ]


def test_a_roll_back_makes_the_steps_after_it_void_and_what_their_policy_sampled() -> None:
    state = run(*three_steps(), back(1))

    assert list(state.steps) == [1]
    assert state.checkpoint == CheckpointSaved(step=1, path="online/checkpoints/step-000001")
    assert (state.beta_scale, state.next_index) == (2.0, 4)
    assert [g.sampled.group_id for g in state.ready_groups] == ["b"]  # sampled by the policy that is kept
    assert not state.open_groups
    for given_up in ("c", "d"):
        group = state.groups[given_up]
        assert (group.void, group.step) == (True, None)
        assert "rolled back to step 1" in (group.set_aside or "")
    assert state.votes_total == 9  # what was paid stays paid


def test_after_a_roll_back_the_step_is_taken_again_with_other_groups() -> None:
    state = run(
        *three_steps(),
        back(1),
        at_step("e", 4, 1),
        ranked("e"),
        StepTrained(step=2, group_ids=("e", "b")),
    )
    assert (state.groups["b"].step, state.groups["e"].step, list(state.steps)) == (2, 2, [1, 2])


def test_a_group_that_a_roll_back_gave_up_cannot_train() -> None:
    with pytest.raises(RunDamaged, match="no usable votes"):
        run(*three_steps(), back(1), StepTrained(step=2, group_ids=("c",)))


def test_a_roll_back_to_the_start_leaves_no_step_and_no_checkpoint() -> None:
    state = run(*three_steps(), back(0))
    assert (state.steps, state.checkpoint) == ({}, None)
    assert [g.sampled.group_id for g in state.ready_groups] == ["a", "b"]


def test_roll_backs_end_with_their_attempt() -> None:
    state = run(*three_steps(), back(1), online(attempt=2))
    assert (state.rollbacks, state.beta_scale) == ((), 1.0)


def test_a_roll_back_to_a_step_that_was_never_trained_is_found_out() -> None:
    with pytest.raises(RunDamaged, match="rolled back to step 9"):
        run(*three_steps(), back(9))
