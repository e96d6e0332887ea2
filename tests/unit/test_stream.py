"""The stream: what is sampled when, what waits, what trains, and what a restart makes of it."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stream_world import PROMPTS, Answer, Disk, Killed, People, Writer, sampled, stream, train

from rlhf_cli.errors import BudgetReached, Diverged, Stopped
from rlhf_cli.journal.events import GroupSetAside, GuardTripped, StepTrained
from rlhf_cli.online import stream as module
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Group


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)


def recipe(budget: dict[str, Any] | None = None, **online: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "stream",
            "model": {"path": "none"},
            "data": {"prompts": "none.jsonl"},
            "flow": {
                "service": "embedded",
                "instruction": "Which?",
                "responses": {"min": 1, "desired": 3, "max": 3},
                "crowd": {},
            },
            "run_online": {"steps": 6, "prompts_per_step": 2, "group_size": 2, "max_in_flight": 8, **online},
            "budget": budget or {},
        }
    )


def latencies(looks: list[int], unanswered: list[bool] = [False]) -> Any:  # noqa: B006
    """Answers by the index of a group, round and round."""
    return lambda group: Answer(
        looks[group.index % len(looks)], 0.0 if unanswered[group.index % len(unanswered)] else 3.0
    )


def test_answers_without_delay_train_the_policy_that_was_sampled() -> None:
    disk = Disk()
    batches = train(stream(recipe(), disk, People(disk)), disk)
    for step, batch in enumerate(batches):
        assert [g.group.policy_step for g in batch.groups] == [step, step]
    assert len(sampled(disk)) == 6 * 2


def test_slow_answers_are_overlapped_up_to_max_in_flight() -> None:
    disk, most = Disk(), [0]
    people = People(disk, latencies([40]))
    people.on_submit = lambda: most.append(len(people.waiting))
    train(stream(recipe(), disk, people), disk)
    assert max(most) == 8


answers = st.lists(st.integers(0, 30), min_size=1, max_size=6)
shape = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 6),
        "prompts_per_step": st.integers(1, 4),
        "max_in_flight": st.integers(4, 12),
        "min_ready": st.none() | st.integers(1, 4),
        "staleness": st.fixed_dictionaries({"max_steps": st.integers(0, 8)}),
    }
)


@given(shape, answers)
@settings(deadline=None)
def test_nothing_is_lost_and_nothing_is_bought_for_nothing(online: dict[str, Any], looks: list[int]) -> None:
    disk = Disk()
    people = People(disk, latencies(looks))

    def check() -> None:
        assert len(people.waiting) <= online["max_in_flight"]

    people.on_submit = check
    batches = train(stream(recipe(**online), disk, people), disk)

    state = disk.state()  # also proves that no group trained twice
    assert len(batches) == len(state.steps) == online["steps"]
    assert people.asked == [event.group_id for event in sampled(disk)]
    trained = [g.group for batch in batches for g in batch.groups]
    for step, batch in enumerate(batches):
        assert 1 <= len(batch.groups) <= online["prompts_per_step"]
        for g in batch.groups:
            assert step - g.group.policy_step <= online["staleness"]["max_steps"]
    aside = disk.of(GroupSetAside)
    assert all(event.reason.startswith("stale: ") for event in aside)
    if len(set(looks)) == 1:  # answers in the order of the questions
        assert not aside
    if online["min_ready"] is None or online["min_ready"] >= online["prompts_per_step"]:
        assert len(trained) == online["steps"] * online["prompts_per_step"]
        assert len(sampled(disk)) == len(trained) + len(aside)


def test_a_restart_between_sampling_and_its_step_samples_no_second_time() -> None:
    disk = Disk()
    train(stream(recipe(steps=2), disk, People(disk)), disk)
    before = stream(recipe(), disk, People(disk))
    before.step = 2
    pulled = next(iter(before))  # sampled and ranked; the process ends before the step is taken
    after = stream(recipe(), disk, People(disk))
    after.step = 2
    assert next(iter(after)).groups == pulled.groups
    assert [event.index for event in sampled(disk)] == [0, 1, 2, 3, 4, 5]


@given(shape, answers, st.lists(st.booleans(), min_size=2, max_size=7).filter(lambda lost: not all(lost)))
@settings(deadline=None)
def test_groups_without_votes_are_replaced_and_no_more(
    online: dict[str, Any], looks: list[int], lost: list[bool]
) -> None:
    disk = Disk()
    online = {**online, "min_ready": None}
    batches = train(stream(recipe(**online), disk, People(disk, latencies(looks, lost))), disk)
    assert sum(len(batch.groups) for batch in batches) == online["steps"] * online["prompts_per_step"]
    state = disk.state()
    assert not state.open_groups
    assert not state.ready_groups
    assert all(g.step is not None or g.set_aside is not None for g in state.groups.values())


@given(answers, st.integers(1, 60), st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_budget_of_votes_is_never_exceeded_even_if_all_that_is_asked_is_answered_in_full(
    looks: list[int], budget: int, votes: list[int]
) -> None:
    disk = Disk()
    people = People(disk, lambda group: Answer(looks[group.index % len(looks)], votes[group.index % len(votes)]))

    def check() -> None:
        assert people.votes + 3 * len(people.waiting) <= budget

    people.on_submit = check
    with suppress(BudgetReached):
        train(stream(recipe({"votes": budget}), disk, people), disk)
    state = disk.state()
    assert not state.open_groups  # what was paid for was waited for
    assert not state.ready_groups  # and learned from


def test_a_budget_counts_a_second_ask_in_advance() -> None:
    once, twice = Disk(), Disk()
    for disk, policy in ((once, "use"), (twice, "resubmit_once")):
        terms = recipe({"votes": 24}, incomplete=policy)
        assert terms.flow is not None
        votes = terms.flow.responses.model_copy(update={"min": 3})
        terms = terms.model_copy(update={"flow": terms.flow.model_copy(update={"responses": votes})})
        with pytest.raises(BudgetReached):
            train(stream(terms, disk, People(disk)), disk)
    # At most 3 votes for a group asked once; 2 more where it first got fewer than 3 of them. Groups come in twos.
    assert len(sampled(once)) == 8
    assert len(sampled(twice)) == 6


def test_a_budget_of_money_counts_by_the_price_of_votes() -> None:
    disk = Disk()
    with pytest.raises(BudgetReached):
        train(stream(recipe({"usd": 0.012, "usd_per_1k_votes": 1.0}), disk, People(disk)), disk)
    assert len(sampled(disk)) == 4


def test_after_the_budget_is_raised_the_run_goes_on_and_earlier_votes_count() -> None:
    disk = Disk()
    with pytest.raises(BudgetReached):
        train(stream(recipe({"votes": 12}), disk, People(disk)), disk)
    done = len(disk.of(StepTrained))
    again = stream(recipe({"votes": 36}), disk, People(disk, votes=disk.state().votes_total))
    assert len(train(again, disk, from_step=done)) == 6 - done
    assert disk.state().votes_total == 36


def test_every_prompt_is_asked_once_a_round_each_round_in_its_own_order() -> None:
    disk = Disk()
    train(stream(recipe(steps=10), disk, People(disk, latencies([3, 0, 7]))), disk)
    asked_for = [event.prompt_id for event in sampled(disk)]
    rounds = [asked_for[start : start + 5] for start in range(0, 20, 5)]
    for asked in rounds:
        assert sorted(asked) == [p.id for p in PROMPTS]
    assert len({tuple(asked) for asked in rounds}) > 1


@pytest.mark.parametrize("max_steps", [0, 2, 8])
def test_steps_that_a_model_answers_wait_before_what_people_look_at_grows_too_old(max_steps: int) -> None:
    hybrid = recipe(steps=30, prompts_per_step=4, max_in_flight=48, staleness={"max_steps": max_steps})
    assert hybrid.run_online is not None
    hybrid = hybrid.model_copy(update={"run_online": hybrid.run_online.model_copy(update={"feedback": "hybrid"})})
    disk = Disk()
    slow = People(disk, lambda group: Answer(50 if group.index % 4 == 0 else 0))  # the others a model answers at once
    batches = train(stream(hybrid, disk, slow), disk)
    assert not disk.of(GroupSetAside)
    assert len(sampled(disk)) == 30 * 4
    ages = [step - g.group.policy_step for step, batch in enumerate(batches) for g in batch.groups]
    assert max(ages) == max_steps  # pacing, and no more of it than it takes


def test_a_group_that_grew_too_old_is_set_aside_with_its_age() -> None:
    disk = Disk()

    def slow_first(group: Group) -> Answer:
        return Answer(30 if group.index == 0 else 0)

    train(stream(recipe(staleness={"max_steps": 1}, steps=60, max_in_flight=8), disk, People(disk, slow_first)), disk)
    (aside,) = disk.of(GroupSetAside)
    assert aside.group_id.endswith("-000000")
    assert "staleness.max_steps is 1" in aside.reason
    assert disk.state().groups[aside.group_id].step is None


def test_a_run_of_which_nothing_can_be_learned_ends() -> None:
    disk = Disk()
    with pytest.raises(Diverged, match="no votes"):
        train(stream(recipe(), disk, People(disk, lambda group: Answer(0, 0.0))), disk)
    assert not disk.of(StepTrained)


def test_the_deadline_ends_the_run_and_a_resume_has_a_new_one() -> None:
    disk, now = Disk(), [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    with pytest.raises(BudgetReached, match="deadline"):
        train(stream(recipe({"deadline": "4s"}), disk, People(disk), clock=clock), disk)
    done = len(disk.of(StepTrained))
    assert 0 < done < 6
    with pytest.raises(BudgetReached, match="deadline"):
        train(stream(recipe({"deadline": "4s"}), disk, People(disk), clock=clock), disk, from_step=done)
    assert len(disk.of(StepTrained)) > done


def test_a_request_to_stop_ends_the_run_before_the_next_step() -> None:
    disk, stop = Disk(), StopRequest()
    pull = iter(stream(recipe(), disk, People(disk), stop=stop))
    next(pull)
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        before = len(disk.entries)
        with pytest.raises(Stopped) as stopped:
            next(pull)
    assert stopped.value.exit_code == 143
    assert len(disk.entries) == before


def test_a_second_request_interrupts_at_once() -> None:
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_beta_rises_with_the_square_of_drift_beyond_the_soft_limit() -> None:
    disk, writer = Disk(), Writer(kl_nats=4.0)
    run = stream(
        recipe(kl={"soft_nats": 8.0}, learner={"algorithm": "dpo", "beta": 0.1}), disk, People(disk), policy=writer
    )
    pull = iter(run)
    assert next(pull).beta == pytest.approx(0.1)
    writer.kl_nats, run.step = 16.0, 1
    assert next(pull).beta == pytest.approx(0.4)
    writer.kl_nats, run.step = 8.0, 2
    assert next(pull).beta == pytest.approx(0.1)


def test_beyond_the_hard_limit_of_drift_the_run_ends() -> None:
    disk = Disk()
    run = stream(recipe(kl={"hard_nats": 20.0}), disk, People(disk), policy=Writer(kl_nats=20.5))
    with pytest.raises(Diverged, match=r"20\.5 nats.*hard_nats is 20"):
        train(run, disk)
    # Four completions a step: the fourth sampling makes it enough to judge by, and nobody is asked about that one.
    assert (len(disk.of(StepTrained)), len(sampled(disk))) == (3, 6)
    (tripped,) = disk.of(GuardTripped)
    assert (tripped.guard, tripped.step, tripped.value, tripped.limit, tripped.action) == ("kl", 3, 20.5, 20.0, "stop")


def test_the_weights_are_synced_before_every_sampling() -> None:
    disk, writer = Disk(), Writer()
    train(stream(recipe(), disk, People(disk), policy=writer), disk)
    assert writer.syncs == 6


@pytest.mark.parametrize("checkpoint_every", [1, 3, 100])
def test_whatever_event_a_crash_comes_before_every_step_is_taken_once(checkpoint_every: int) -> None:
    """All crash positions of a run, each with a restart from its last checkpoint."""
    plan = recipe(steps=4, staleness={"max_steps": 8})
    answer = latencies([5, 0, 2], [False, False, False, True])
    whole = Disk()
    train(stream(plan, whole, People(whole, answer)), whole)
    for dies_at in range(len(whole.entries)):
        disk = Disk(dies_at=dies_at)
        with pytest.raises(Killed):
            train(stream(plan, disk, People(disk, answer)), disk)
        recorded = {event.step: event for event in disk.of(StepTrained)}
        checkpoint = len(recorded) // checkpoint_every * checkpoint_every

        disk.dies_at = None
        batches = train(stream(plan, disk, People(disk, answer)), disk, from_step=checkpoint)

        state = disk.state()
        assert sorted(state.steps) == [1, 2, 3, 4]
        assert not state.open_groups
        assert not state.ready_groups
        for batch, step in zip(batches, range(checkpoint + 1, 5), strict=True):
            if step in recorded:
                assert tuple(g.group.id for g in batch.groups) == recorded[step].group_ids
                assert batch.beta == recorded[step].beta
        assert sum(g.step is not None for g in state.groups.values()) == 8


def test_a_repeated_step_has_the_very_same_groups_and_beta() -> None:
    disk, writer = Disk(), Writer(kl_nats=16.0)
    plan = recipe(steps=3, kl={"soft_nats": 8.0})
    first = train(stream(plan, disk, People(disk, latencies([2, 0])), policy=writer), disk)
    again = train(stream(plan, disk, People(disk)), disk, from_step=1)
    assert again == first[1:]
    assert [b.beta for b in again] == [pytest.approx(0.4)] * 2


# --- groups that nobody could learn from


class Parrot(Writer):
    """Says the same in every completion of some groups."""

    def __init__(self, same: list[bool]) -> None:
        super().__init__()
        self.same = same

    def sample_groups(self, *given: Any, **named: Any) -> list[Group]:
        made = super().sample_groups(*given, **named)
        return [
            replace(g, completions=tuple(replace(c, text="Yes.") for c in g.completions))
            if self.same[g.index % len(self.same)]
            else g
            for g in made
        ]


@given(shape, answers, st.lists(st.booleans(), min_size=2, max_size=7).filter(lambda same: not all(same)))
@example(  # ten degenerate ones before the first answer, with one among them that people are looking at
    {"steps": 2, "prompts_per_step": 1, "max_in_flight": 4, "staleness": {"max_steps": 1}}, [5], [True] * 5 + [False]
)
@settings(deadline=None)
def test_nobody_is_asked_about_a_group_that_says_one_thing_and_another_takes_its_place(
    online: dict[str, Any], looks: list[int], same: list[bool]
) -> None:
    disk, online = Disk(), {**online, "min_ready": None}
    people = People(disk, latencies(looks))
    running = stream(recipe(**online), disk, people, policy=Parrot(same))
    batches = train(running, disk)
    parroted = {event.group_id for event in sampled(disk) if same[event.index % len(same)]}
    assert not parroted & set(people.asked)
    assert {e.group_id for e in disk.of(GroupSetAside) if not e.reason.startswith("stale: ")} == parroted
    assert running.unasked == len(parroted)
    assert sum(len(batch.groups) for batch in batches) == online["steps"] * online["prompts_per_step"]
    assert stream(recipe(**online), disk, People(disk)).unasked == len(parroted)  # a restart knows them


def test_what_takes_the_place_of_a_degenerate_group_makes_no_later_step_train_on_an_older_policy() -> None:
    disk = Disk()
    for step, batch in enumerate(
        train(stream(recipe(), disk, People(disk), policy=Parrot([False, True, False])), disk)
    ):
        assert [g.group.policy_step for g in batch.groups] == [step, step]


def test_a_policy_that_only_ever_says_one_thing_ends_the_run_unasked() -> None:
    disk = Disk()
    people = People(disk)
    with pytest.raises(Diverged, match=r"the last 20 groups all had to be set aside.*all completions say the same"):
        train(stream(recipe(), disk, people, policy=Parrot([True])), disk)
    assert people.asked == []
