"""A recorded run taken again, without a model: whatever people did in it, the replay does what the run did."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_world import PROMPTS, Answer, Disk, People, Writer, sampled, stream, train
from tiny_world import MakeRecipe

from rlhf_cli.errors import DataError
from rlhf_cli.feedback.recorded import Batch, RecordedFeedback, Recording
from rlhf_cli.journal.events import GroupRanked, GroupSampled, GroupSetAside, StepTrained
from rlhf_cli.online.recorded import RecordedStream
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.recipe.schema import Recipe

Steps = dict[int, list[int]]


def steps(disk: Disk) -> Steps:
    index = {event.group_id: event.index for event in sampled(disk)}
    return {event.step: [index[name] for name in event.group_ids] for event in disk.of(StepTrained)}


def replayed(recipe: Recipe, recording: Recording, policy: Writer | None = None) -> Disk:
    disk = Disk()
    again = RecordedStream(
        recording,
        policy=policy or Writer(),
        feedback=RecordedFeedback(recording, disk.append),
        journal=disk,
        state=disk.state(),
        prompts=PROMPTS,
        recipe=recipe,
        stop=StopRequest(),
    )
    train(again, disk)
    return disk


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    looks=st.lists(st.integers(0, 8), min_size=1, max_size=20),
    lost=st.sampled_from([1, 2, 3, 5]),
    per_step=st.integers(1, 3),
    min_ready=st.integers(1, 3),
    in_flight=st.integers(3, 9),
    stale=st.integers(0, 3),
)
def test_whatever_people_did_the_replay_takes_the_same_steps(
    recipe: MakeRecipe, looks: list[int], lost: int, per_step: int, min_ready: int, in_flight: int, stale: int
) -> None:
    """People answer late and out of order; of `lost` groups in a row one gets no votes, unless `lost` is 1."""
    online = {"steps": 5, "prompts_per_step": per_step, "max_in_flight": in_flight, "min_ready": min_ready}
    made = recipe(run_online={**online, "staleness": {"max_steps": stale}})
    disk = Disk()
    people = People(disk, lambda group: Answer(looks[group.index % len(looks)], float(lost == 1 or group.index % lost)))
    train(stream(made, disk, people), disk)
    again = replayed(made, Recording(Path("journal.jsonl"), disk.state()))

    assert steps(again) == steps(disk)
    last = max(event.index for event in sampled(again))
    assert [_asked(event) for event in sampled(again)] == [_asked(event) for event in sampled(disk)[: last + 1]]
    votes = {event.group_id: event.wins for event in disk.of(GroupRanked)}
    for event in again.of(GroupRanked):
        assert event.wins == votes[event.group_id]
        assert event.source == "recorded:None/item:i"


def _asked(event: GroupSampled) -> tuple[object, ...]:
    return event.index, event.batch, event.policy_step, event.messages, event.completions


def test_groups_without_a_verdict_in_the_recording_get_none(recipe: MakeRecipe) -> None:
    made, disk = recipe(run_online={"steps": 1, "max_in_flight": 2}), Disk()
    people = People(disk, lambda group: Answer(votes=float(group.index == 0)))
    train(stream(recipe(run_online={"steps": 1, "min_ready": 1, "max_in_flight": 2}), disk, people), disk)
    again = replayed(made, Recording(Path("journal.jsonl"), disk.state()))
    assert [event.reason for event in again.of(GroupSetAside)] == ["set aside in the recording: no votes"]
    assert steps(again) == {1: [0]}


def test_batches_are_as_they_were_and_an_old_recording_says_so(recipe: MakeRecipe) -> None:
    disk = Disk()
    train(stream(recipe(run_online={"steps": 2}), disk, People(disk)), disk)
    recording = Recording(Path("journal.jsonl"), disk.state())
    assert recording.batches == (Batch(0, 2, 0), Batch(2, 2, 1))
    old = Disk()
    for entry in disk.entries:
        event = entry.event
        old.append(event.model_copy(update={"batch": None}) if isinstance(event, GroupSampled) else event)
    with pytest.raises(DataError, match="too old to replay"):
        _ = Recording(Path("journal.jsonl"), old.state()).batches
