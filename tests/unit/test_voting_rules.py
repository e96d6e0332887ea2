"""A rater's side: gold pairs, second thoughts, preloaded pairs, progress; each as a promise."""

from __future__ import annotations

import random
from typing import Any

import pytest
from flow_world import Clock, World
from test_server_store import open_item

from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.server import gold, voting
from rlhf_cli.server.problems import Problem

ANY = Responses(1, 9, 9)


class Always(random.Random):
    """Draws gold whenever there is some."""

    def random(self) -> float:
        return 0.0


def flow_of(world: World, item_id: str) -> str:
    return world.store.item(item_id).flow_id


def lease(world: World, rater_id: str, rng: random.Random | None = None) -> voting.Shown:
    shown = voting.lease(world.store, rater_id, rng or random.Random(1))
    assert shown is not None
    return shown


def cast(world: World, outcome: Any = "left", responses: Responses = ANY) -> tuple[str, str, voting.Shown]:
    item_id, rater_id = open_item(world, responses=responses), world.rater()
    shown = lease(world, rater_id)
    assert voting.vote(world.store, shown.pair.id, rater_id, outcome, 900)
    return item_id, rater_id, shown


def refused(status: int, what: Any, *arguments: Any) -> None:
    with pytest.raises(Problem) as refusal:
        what(*arguments)
    assert refusal.value.status == status


def test_undo_takes_the_vote_out_of_the_count_and_keeps_it_on_record(world: World) -> None:
    item_id, rater_id, shown = cast(world)
    again = voting.undo(world.store, shown.pair.id, rater_id)
    assert (again.pair.left, again.pair.right) == (shown.pair.left, shown.pair.right)
    assert again.pair.id != shown.pair.id
    (vote,) = world.store.votes(item_id)
    assert (vote.outcome, vote.undone, vote.counts) == ("left", True, False)
    assert (world.store.item(item_id).votes, world.store.matrix(item_id).votes) == (0, 0)
    with world.store.now() as (db, _):
        assert db.execute("SELECT COUNT(*) FROM undos").fetchone()[0] == 1

    voting.vote(world.store, again.pair.id, rater_id, "right", 900)

    assert [v.outcome for v in world.store.votes(item_id) if v.counts] == ["right"]
    assert world.store.item(item_id).votes == 1


def test_a_skipped_pair_can_be_had_again(world: World) -> None:
    item_id, rater_id, shown = cast(world, "skip")
    again = voting.undo(world.store, shown.pair.id, rater_id)
    assert voting.vote(world.store, again.pair.id, rater_id, "tie", 900)
    assert world.store.item(item_id).votes == 1


def test_a_vote_can_be_taken_back_for_a_minute(world: World, clock: Clock) -> None:
    _, rater_id, shown = cast(world)
    clock.advance(voting.UNDO_S + 1)
    refused(410, voting.undo, world.store, shown.pair.id, rater_id)


def test_a_vote_on_an_item_that_has_ended_stays(world: World) -> None:
    item_id, rater_id, shown = cast(world, responses=Responses(1, 1, 1))
    assert world.store.item(item_id).state is ItemState.COMPLETED
    refused(410, voting.undo, world.store, shown.pair.id, rater_id)
    assert world.store.item(item_id).votes == 1


def test_a_vote_is_taken_back_once_and_only_the_last_one_and_only_ones_own(world: World) -> None:
    item_id, rater_id, first = cast(world)
    second = lease(world, rater_id)
    refused(409, voting.undo, world.store, second.pair.id, rater_id)  # not answered yet
    voting.vote(world.store, second.pair.id, rater_id, "tie", 900)
    refused(409, voting.undo, world.store, first.pair.id, rater_id)
    refused(403, voting.undo, world.store, second.pair.id, world.rater())
    refused(404, voting.undo, world.store, "unknown", rater_id)
    voting.undo(world.store, second.pair.id, rater_id)
    refused(409, voting.undo, world.store, second.pair.id, rater_id)
    refused(409, voting.vote, world.store, second.pair.id, rater_id, "left", 900)  # a replay
    assert world.store.item(item_id).votes == 1


def test_undo_never_makes_room_for_more_votes_than_the_maximum(world: World) -> None:
    item_id, rater_id, shown = cast(world, "skip", Responses(1, 2, 2))
    others = [world.rater() for _ in range(2)]
    pairs = [lease(world, other) for other in others]  # both remaining answers are in other hands
    refused(410, voting.undo, world.store, shown.pair.id, rater_id)
    for other, pair in zip(others, pairs, strict=True):
        voting.vote(world.store, pair.pair.id, other, "left", 900)
    assert world.store.item(item_id).votes == 2


def test_what_is_on_the_screen_stays_leased_after_an_undo(world: World) -> None:
    item_id, rater_id = open_item(world, texts=6, responses=ANY), world.rater()
    first = lease(world, rater_id)
    current = lease(world, rater_id)
    voting.vote(world.store, first.pair.id, rater_id, "left", 900)
    preloaded = lease(world, rater_id)
    again = voting.undo(world.store, first.pair.id, rater_id)
    for shown in (again, current):
        assert voting.vote(world.store, shown.pair.id, rater_id, "left", 900)
    lease(world, rater_id)
    assert voting.vote(world.store, preloaded.pair.id, rater_id, "left", 900)
    assert world.store.item(item_id).votes == 3


def test_a_preloaded_pair_gets_its_full_time_when_it_is_shown_but_not_for_ever(world: World, clock: Clock) -> None:
    open_item(world)
    rater_id = world.rater()
    shown = lease(world, rater_id)
    clock.advance(80)
    assert voting.renew(world.store, shown.pair.id, rater_id) == 90
    clock.advance(80)
    assert voting.renew(world.store, shown.pair.id, rater_id) == 20  # 180 s in all
    clock.advance(21)
    refused(410, voting.renew, world.store, shown.pair.id, rater_id)
    refused(403, voting.renew, world.store, shown.pair.id, world.rater())


def test_gold_is_mixed_in_in_about_a_tenth_and_never_twice_to_the_same_rater(world: World) -> None:
    item_id = open_item(world, texts=16, responses=Responses(1, 9999, 9999))
    pairs = [gold.GoldPair(f"prompt {i}", "good", "bad") for i in range(400)]
    gold.set_pairs(world.store, flow_of(world, item_id), pairs)
    rng = random.Random(5)
    drawn = []
    for _ in range(8):
        rater_id = world.rater()
        prompts = []
        for _ in range(110):
            shown = lease(world, rater_id, rng)
            voting.vote(world.store, shown.pair.id, rater_id, "tie", 900)
            prompts.append(shown.pair.prompt)
        own = [prompt for prompt in prompts if prompt.startswith("prompt")]
        assert len(own) == len(set(own))
        drawn.append(len(own))
    assert 0.07 < sum(drawn) / 880 < 0.13


def test_answers_to_gold_are_kept_and_shown_and_never_reach_a_matrix(world: World) -> None:
    item_id, rater_id = open_item(world, responses=ANY), world.rater()
    pairs = [gold.GoldPair(f"prompt {i}", "good", "bad") for i in range(3)]
    gold.set_pairs(world.store, flow_of(world, item_id), pairs)
    for answer in ("good", "bad", "tie"):
        shown = lease(world, rater_id, Always())
        assert {shown.pair.left, shown.pair.right} == {"good", "bad"}
        outcome = "left" if shown.pair.left == answer else "right" if shown.pair.right == answer else "tie"
        assert voting.vote(world.store, shown.pair.id, rater_id, outcome, 900)
        refused(409, voting.vote, world.store, shown.pair.id, rater_id, outcome, 900)
        refused(403, voting.vote, world.store, shown.pair.id, world.rater(), outcome, 900)
    assert gold.accuracy(world.store) == {rater_id: (1, 3)}
    assert (world.store.item(item_id).votes, world.store.votes(item_id)) == (0, [])
    assert lease(world, rater_id, Always()).pair.prompt == "Why?"  # all gold pairs were seen


def test_a_gold_pair_only_takes_the_place_of_a_real_one(world: World) -> None:
    item_id = open_item(world)
    gold.set_pairs(world.store, flow_of(world, item_id), [gold.GoldPair("p", "good", "bad")])
    lease(world, world.rater(), Always())
    assert world.store.item(item_id).live == 0
    world.store.stop(item_id)
    assert voting.lease(world.store, world.rater(), Always()) is None


def test_an_answer_to_gold_can_be_taken_back_too(world: World) -> None:
    item_id, rater_id = open_item(world), world.rater()
    gold.set_pairs(world.store, flow_of(world, item_id), [gold.GoldPair("p", "good", "bad")])
    shown = lease(world, rater_id, Always())
    wrong: Any = "left" if shown.pair.left == "bad" else "right"
    voting.vote(world.store, shown.pair.id, rater_id, wrong, 900)
    again = voting.undo(world.store, shown.pair.id, rater_id)
    assert (again.pair.left, again.pair.right) == (shown.pair.left, shown.pair.right)
    voting.vote(world.store, again.pair.id, rater_id, "right" if wrong == "left" else "left", 900)
    assert gold.accuracy(world.store) == {rater_id: (1, 1)}


def test_gold_pairs_are_replaced_as_a_whole_and_earlier_answers_stay(world: World) -> None:
    item_id, rater_id = open_item(world), world.rater()
    flow_id, first, second = (
        flow_of(world, item_id),
        gold.GoldPair("1", "good", "bad"),
        gold.GoldPair("2", "good", "bad"),
    )
    gold.set_pairs(world.store, flow_id, [first])
    shown = lease(world, rater_id, Always())
    voting.vote(world.store, shown.pair.id, rater_id, "left", 900)
    gold.set_pairs(world.store, flow_id, [first, second, second])
    assert gold.pairs(world.store, flow_id) == [first, second]
    assert lease(world, rater_id, Always()).pair.prompt == "2"  # the first one keeps its answer
    gold.set_pairs(world.store, flow_id, [])
    assert gold.pairs(world.store, flow_id) == []
    assert gold.accuracy(world.store)[rater_id].total == 1
    refused(404, gold.set_pairs, world.store, "unknown", [first])


def test_progress_counts_own_votes_since_a_time_and_open_items(world: World, clock: Clock) -> None:
    item_id, rater_id, _ = cast(world)
    clock.advance(10)
    second = lease(world, rater_id)
    voting.vote(world.store, second.pair.id, rater_id, "skip", 900)
    assert voting.progress(world.store, rater_id, 0) == voting.Progress(1, 1)
    assert voting.progress(world.store, rater_id, clock.now) == voting.Progress(0, 1)
    assert voting.progress(world.store, world.rater(), 0) == voting.Progress(0, 1)
    world.store.stop(item_id)
    assert voting.progress(world.store, rater_id, 0).open_items == 0


def test_markdown_is_a_switch_of_the_flow(world: World) -> None:
    item_id, rater_id = open_item(world), world.rater()
    assert not lease(world, rater_id).markdown
    with world.store.now() as (db, _):
        db.execute(
            "UPDATE flows SET settings = ?",
            ('{"featureFlags": [{"key": "use_main_text_markdown", "value": "true"}]}',),
        )
    assert lease(world, rater_id).markdown
    assert world.store.item(item_id).live == 2
