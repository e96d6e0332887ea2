"""Which groups people see: a share of them, the ones worth it, some blindly, and the same again after a kill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_world import Answer, Disk, Killed, People

from rlhf_cli.feedback.drift import DriftWatch
from rlhf_cli.feedback.reward_model import NOT_FINITE
from rlhf_cli.feedback.scores import Scored, by_rewards
from rlhf_cli.feedback.selection import NOT_SELECTED, Chooser, SelectedVotes, uncertainty
from rlhf_cli.journal.events import DriftFound, GroupChosen, GroupRanked, GroupSampled, GroupSetAside
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.recipe.online import Drift, Selection
from rlhf_cli.types import Completion, Group, Message, Prompt


def group(index: int, prompt: str = "hi") -> Group:
    completions = tuple(Completion(f"{index}/{k}", (1,), (-1.0,), (-1.0,), True) for k in range(3))
    return Group(f"g{index}", index, Prompt(prompt, (Message("user", prompt),)), (1,), completions, 0)


def scored(*heads: list[float]) -> Scored:
    return by_rewards("v1", np.array(heads).T, 1.0)


def odds(p: float) -> float:
    return float(np.log(p / (1 - p)))


def unsure(value: float) -> Scored:
    """A head by which the second best beats the best with probability `value / 2`."""
    return scored([odds(1 - max(value, 1e-9) / 2), 0.0, -9.0])


# What a group is compared by.


def test_without_an_ensemble_uncertainty_is_how_close_the_best_two_are() -> None:
    assert uncertainty(scored([0.0, 0.0, -5.0])) == pytest.approx(1.0)
    assert uncertainty(scored([-5.0, odds(0.9), 0.0])) == pytest.approx(0.2)
    assert uncertainty(scored([3.0, 3.0 + odds(0.9), -2.0])) == pytest.approx(0.2)


def test_with_an_ensemble_it_is_how_far_the_heads_are_apart_on_pairs() -> None:
    # One pair; heads say 0.9 and 0.5: a standard deviation of 0.2.
    assert uncertainty(scored([odds(0.9), 0.0], [7.0, 7.0])) == pytest.approx(0.4)


def test_what_all_heads_hold_to_be_even_is_nothing_that_votes_could_teach() -> None:
    assert uncertainty(scored([1.0, 1.0], [4.0, 4.0])) == 0.0


@given(st.lists(st.lists(st.floats(-6, 6), min_size=4, max_size=4), min_size=1, max_size=4), st.floats(-50, 50))
def test_uncertainty_is_a_share_and_knows_no_zero_point(heads: list[list[float]], shift: float) -> None:
    value = uncertainty(scored(*heads))
    assert 0 <= value <= 1
    moved = [[x + shift * (k + 1) for x in head] for k, head in enumerate(heads)]
    assert uncertainty(scored(*moved)) == pytest.approx(value, abs=1e-9)


# How many.


def choose(selection: Selection, values: list[float], seed: int = 0) -> list[GroupChosen]:
    chooser = Chooser(selection, seed)
    return [chooser.choose(group(n), unsure(value)) for n, value in enumerate(values)]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    st.integers(0, 1000),
    st.sampled_from(["noise", "rising", "falling", "equal", "waves"]),
)
def test_the_share_holds_whatever_the_values_do(share: float, seed: int, shape: str) -> None:
    number = 400
    steps = np.arange(number) / number
    values = {
        "noise": np.random.default_rng(seed).random(number),
        "rising": steps,
        "falling": 1 - steps,
        "equal": np.full(number, 0.5),
        "waves": (np.arange(number) // 50 % 2) * 0.9 + 0.05,
    }[shape]
    people = sum(event.people for event in choose(Selection(share=share, random_share=0.0), values.tolist(), seed))
    assert abs(people - share * number) <= 17  # what it may be behind or ahead is made good within sixteen groups


def test_the_most_uncertain_groups_are_those_that_people_see() -> None:
    values = np.random.default_rng(5).random(2000).tolist()
    events = choose(Selection(share=0.25, random_share=0.0), values)
    seen = [value for event, value in zip(events, values, strict=True) if event.people]
    assert {event.why for event in events} == {"uncertainty", "not selected"}
    assert np.mean(seen) > 0.8  # a quarter of uniform values: 0.875 at best, 0.5 if it were blind


def test_a_part_of_the_share_is_drawn_blindly() -> None:
    values = np.random.default_rng(6).random(4000).tolist()
    events = choose(Selection(share=0.25, random_share=0.4), values)
    drawn = [value for event, value in zip(events, values, strict=True) if event.why == "random"]
    assert len(drawn) / 4000 == pytest.approx(0.1, abs=0.02)
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
    assert sum(event.people for event in events) / 4000 == pytest.approx(0.25, abs=0.02)


def test_what_is_drawn_blindly_does_not_depend_on_what_the_model_says() -> None:
    draw = np.random.default_rng(7)
    one, other = (choose(Selection(random_share=0.5), draw.random(300).tolist(), seed=4) for _ in range(2))
    assert [e.group_id for e in one if e.why == "random"] == [e.group_id for e in other if e.why == "random"]


def test_a_targeted_round_takes_nothing_of_what_is_drawn_blindly() -> None:
    watch = DriftWatch(Drift(round_groups=200), lambda prompt: 0)
    selection, values = Selection(share=0.5, random_share=0.4), [0.5] * 200
    watch._begin(DriftFound(cluster=0, z=4.0, before=0.1, now=0.6, groups=200, outdated=()))
    chooser = Chooser(selection, 0, watch=watch)
    during = [chooser.choose(group(n), unsure(value)) for n, value in enumerate(values)]
    assert {event.why for event in during} == {"round", "random"}
    usual = choose(selection, values)
    assert [e.group_id for e in during if e.why == "random"] == [e.group_id for e in usual if e.why == "random"]


def test_diverse_takes_the_prompt_that_is_least_like_those_that_people_saw() -> None:
    corners = {name: np.eye(3)[n] for n, name in enumerate(["river", "bread", "star"])}
    chooser = Chooser(Selection(by="diverse", share=0.5, random_share=0.0), 0, embed=lambda p: corners[p.text])
    shown = [chooser.choose(group(n, "river")) for n in range(20)]
    first = next(n for n, event in enumerate(shown) if event.people)
    assert {event.value for event in shown[: first + 1]} == {2.0}  # nothing to compare with yet
    assert {event.value for event in shown[first + 1 :]} == {0.0}
    other = chooser.choose(group(20, "bread"))
    assert (other.people, other.why) == (True, "diverse")
    assert other.value == pytest.approx(np.sqrt(2))


def test_where_the_budget_ends_nobody_is_asked() -> None:
    chooser = Chooser(Selection(share=0.9, random_share=0.5), 0)
    events = [chooser.choose(group(n), unsure(0.5), affordable=False) for n in range(50)]
    assert not any(event.people for event in events)
    assert {event.why for event in events} == {"budget", "not selected"}


# After a kill.


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.sampled_from(["uncertainty", "diverse"]), st.integers(0, 99))
def test_a_chooser_that_goes_on_chooses_as_if_it_had_never_stopped(killed_after: int, by: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values, names = draw.random(60), draw.choice(["river", "bread", "star", "song"], 60)
    corners = {name: np.eye(4)[n] for n, name in enumerate(["river", "bread", "star", "song"])}

    def fresh() -> Chooser:
        selection = Selection.model_validate({"by": by, "share": 0.3})
        return Chooser(selection, seed, embed=lambda prompt: corners[prompt.text])

    def look(chooser: Chooser, n: int) -> GroupChosen:
        return chooser.choose(group(n, str(names[n])), unsure(values[n]))

    whole = fresh()
    wanted = [look(whole, n) for n in range(60)]
    second = fresh()
    second.resume(GroupState(GroupSampled.of(group(n, str(names[n]))), chosen=wanted[n]) for n in range(killed_after))
    assert [look(second, n) for n in range(killed_after, 60)] == wanted[killed_after:]
    assert second.status() == whole.status()


class Again(People):
    """People who can be asked again about what is open."""

    def resume(self, groups: Any) -> None:
        for state in groups:
            if state.open:
                self.submit(state.sampled.group())


def votes(disk: Disk, **given: Any) -> tuple[SelectedVotes, Again]:
    people = Again(disk, answer=lambda group: Answer(looks=1))
    chooser = Chooser(Selection(share=0.4), 3)
    return SelectedVotes(
        people, chooser, disk.append, score=lambda g: unsure(0.01 + g.index * 7 % 90 / 100), **given
    ), people


def go(disk: Disk, feedback: SelectedVotes, groups: int) -> None:
    feedback.resume(disk.state().groups.values())
    for index in range(disk.state().next_index, groups):
        disk.append(GroupSampled.of(group(index)))
        feedback.submit(group(index))
        feedback.collect()
    while disk.state().open_groups:
        feedback.collect()


def test_groups_that_people_do_not_see_are_set_aside_before_anything_is_bought() -> None:
    disk = Disk()
    feedback, people = votes(disk)
    go(disk, feedback, 40)
    seen = {event.group_id for event in disk.of(GroupChosen) if event.people}
    assert 8 <= len(seen) <= 24
    assert set(people.asked) == seen == {event.group_id for event in disk.of(GroupRanked)}
    aside = {event.group_id: event.reason for event in disk.of(GroupSetAside)}
    assert set(aside) == {f"g{n}" for n in range(40)} - seen
    assert set(aside.values()) == {NOT_SELECTED}
    assert feedback.status()["selection/people_total"] == len(seen)


def test_wherever_the_process_dies_the_choices_are_those_of_a_run_that_did_not() -> None:
    whole = Disk()
    go(whole, votes(whole)[0], 12)
    for dies_at in range(1, len(whole.entries)):
        disk = Disk(dies_at=dies_at)
        with pytest.raises(Killed):
            go(disk, votes(disk)[0], 12)
        disk.dies_at = None
        go(disk, votes(disk)[0], 12)
        assert disk.of(GroupChosen) == whole.of(GroupChosen)
        ranked: Callable[[Disk], set[str]] = lambda d: {event.group_id for event in d.of(GroupRanked)}  # noqa: E731
        assert ranked(disk) == ranked(whole)
        assert len(disk.of(GroupSetAside)) == len(whole.of(GroupSetAside))


def test_the_votes_that_groups_in_flight_may_still_take_count_before_one_more_is_asked_about() -> None:
    disk = Disk()
    feedback, people = votes(disk, affords=lambda groups: groups <= 2)
    people.answer = lambda group: Answer(looks=1000)
    for index in range(40):
        feedback.submit(group(index))
        feedback.collect()
    assert len(people.asked) == 2


def test_a_score_that_is_not_a_number_sets_the_group_aside_and_chooses_nothing() -> None:
    disk = Disk()
    people = Again(disk)
    broken = scored([float("nan"), 0.0, 1.0])
    feedback = SelectedVotes(people, Chooser(Selection(), 3), disk.append, score=lambda group: broken)
    feedback.submit(group(0))
    assert [event.reason for event in disk.of(GroupSetAside)] == [NOT_FINITE]
    assert not disk.of(GroupChosen)
    assert not people.asked
