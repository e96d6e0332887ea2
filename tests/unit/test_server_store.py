"""The rules of an item and its votes, each as a promise; time is turned by hand."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from flow_world import SPEC, Clock, World, open_item, take

from rlhf_cli.errors import RunDamaged
from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.flow.wire import CastSegment
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.store import LEASE_S, Once, Store


def test_an_item_is_pending_until_somebody_looks_at_it(world: World) -> None:
    item_id = open_item(world)
    assert world.store.item(item_id).state is ItemState.PENDING
    take(world)
    assert world.store.item(item_id).state is ItemState.RUNNING


def test_an_item_is_complete_at_the_desired_votes_once_no_lease_is_live(world: World) -> None:
    item_id = open_item(world)  # 2, 4, 6
    pair, slow_rater = take(world)
    assert world.vote(4) == 4
    assert world.store.item(item_id).state is ItemState.RUNNING  # the slow rater may still answer

    world.store.vote(pair.id, slow_rater, "left")

    assert (world.store.item(item_id).state, world.store.item(item_id).votes) == (ItemState.COMPLETED, 5)


def test_nobody_new_is_asked_once_the_desired_votes_are_there(world: World) -> None:
    open_item(world)
    take(world)
    world.vote(4)
    assert world.store.lease(world.rater()) is None


def test_votes_and_live_leases_together_stay_within_the_maximum(world: World) -> None:
    item_id = open_item(world)
    taken = [take(world) for _ in range(6)]
    assert world.store.lease(world.rater()) is None

    for pair, rater_id in taken:
        assert world.store.vote(pair.id, rater_id, "right")

    assert (world.store.item(item_id).state, world.store.item(item_id).votes) == (ItemState.COMPLETED, 6)


def test_the_time_to_live_ends_an_item_by_its_minimum(world: World, clock: Clock) -> None:
    enough, too_few, none = (open_item(world, ttl_s=600) for _ in range(3))
    for item_id, count in ((enough, 2), (too_few, 1)):
        clock.advance(1)
        world.vote(4 if item_id == enough else count)
    clock.advance(600)
    assert world.store.item(enough).state is ItemState.COMPLETED
    assert world.store.item(too_few).state is ItemState.INCOMPLETE
    assert world.store.item(none).state is ItemState.INCOMPLETE
    assert world.store.item(none).ended_at == world.store.item(none).expires_at


def test_with_the_minimum_at_its_time_to_live_an_item_is_complete(world: World, clock: Clock) -> None:
    item_id = open_item(world, ttl_s=60)
    world.vote(2)
    clock.advance(60)
    assert (world.store.item(item_id).state, world.store.item(item_id).votes) == (ItemState.COMPLETED, 2)


def test_a_stopped_item_stays_stopped_and_keeps_its_votes(world: World, clock: Clock) -> None:
    item_id = open_item(world)
    world.vote(3)
    world.store.stop(item_id)
    clock.advance(10_000)
    world.store.stop(item_id)
    assert (world.store.item(item_id).state, world.store.matrix(item_id).votes) == (ItemState.STOPPED, 3)


def test_a_lease_returns_after_its_time_and_the_pair_goes_to_somebody_else(world: World, clock: Clock) -> None:
    item_id = open_item(world, texts=2, responses=Responses(1, 1, 1))
    pair, rater_id = take(world)
    assert world.store.lease(world.rater()) is None
    clock.advance(LEASE_S)
    take(world)
    assert not world.store.vote(pair.id, rater_id, "left")  # too late: kept, not counted
    assert world.store.item(item_id).votes == 0


def test_who_takes_two_more_pairs_has_left_the_first_one(world: World) -> None:
    open_item(world, texts=6, responses=Responses(1, 9, 9))
    rater_id = world.rater()
    first, second, third = (world.store.lease(rater_id) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert not world.store.vote(first.id, rater_id, "left")
    assert world.store.vote(second.id, rater_id, "left")
    assert world.store.vote(third.id, rater_id, "left")


@pytest.mark.parametrize("end", ["stop", "ttl", "max"])
def test_a_vote_after_the_end_is_kept_as_late_and_never_counted(world: World, clock: Clock, end: str) -> None:
    item_id = open_item(world, responses=Responses(1, 2, 2) if end == "max" else SPEC.responses, ttl_s=30)
    pair, rater_id = take(world)
    if end == "max":
        clock.advance(29)
        world.vote(1)
    if end == "stop":
        world.store.stop(item_id)
    clock.advance(1 if end == "max" else 30)
    before = world.store.matrix(item_id)

    assert not world.store.vote(pair.id, rater_id, "left")

    assert world.store.votes(item_id)[-1].late
    assert world.store.matrix(item_id) == before


def test_one_vote_per_lease(world: World) -> None:
    item_id = open_item(world)
    pair, rater_id = take(world)
    world.store.vote(pair.id, rater_id, "left")
    with pytest.raises(Problem) as caught:
        world.store.vote(pair.id, rater_id, "right")
    assert caught.value.status == 409
    assert len(world.store.votes(item_id)) == 1


def test_a_foreign_lease_cannot_be_voted_on(world: World) -> None:
    open_item(world)
    pair, _ = take(world)
    with pytest.raises(Problem) as caught:
        world.store.vote(pair.id, world.rater(), "left")
    assert caught.value.status == 403
    with pytest.raises(Problem) as caught:
        world.store.vote("no such lease", world.rater(), "left")
    assert caught.value.status == 404


def test_ties_and_two_bad_ones_are_half_a_vote_each_way_and_a_skip_is_none(world: World) -> None:
    item_id = open_item(world, texts=2, responses=Responses(1, 3, 3))
    for outcome in ("tie", "both_bad", "skip"):
        world.vote(1, outcome)
    assert world.store.item(item_id).votes == 2
    assert world.store.matrix(item_id).wins.tolist() == [[0, 1], [1, 0]]
    assert [vote.outcome for vote in world.store.votes(item_id)] == ["tie", "both_bad", "skip"]


def test_a_rater_never_gets_the_same_pair_of_an_item_twice(world: World) -> None:
    open_item(world, texts=3, responses=Responses(1, 50, 50))
    rater_id = world.rater()
    seen = set()
    while (pair := world.store.lease(rater_id)) is not None:
        seen.add(frozenset((pair.left, pair.right)))
        world.store.vote(pair.id, rater_id, "skip")
    assert len(seen) == 3
    assert sum(vote.rater_id == rater_id for vote in world.store.votes()) == 3


def test_the_oldest_item_is_served_first(world: World, clock: Clock) -> None:
    first = open_item(world)
    clock.advance(1)
    second = open_item(world)
    world.vote(4)
    assert (world.store.item(first).votes, world.store.item(second).votes) == (4, 0)


def test_sides_are_drawn_anew_for_every_lease(world: World) -> None:
    open_item(world, texts=2, responses=Responses(1, 60, 60))
    shown = [take(world)[0].left for _ in range(60)]
    assert 12 < shown.count("x") < 48


def test_a_lease_tells_nothing_but_the_texts(world: World) -> None:
    item_id = open_item(world)
    ids = {candidate.id for candidate in world.store.candidates(item_id)}
    leases = [take(world)[0] for _ in range(4)]
    assert not any(candidate_id in repr(lease) for candidate_id in ids for lease in leases)
    assert len({lease.id for lease in leases}) == 4


def test_everything_is_there_again_after_reopening_the_file(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "server.sqlite"
    first = World(Store(path, clock=clock), clock, None, None)  # type: ignore[arg-type]
    item_id = open_item(first)
    first.vote(3)
    votes, matrix = first.store.votes(), first.store.matrix(item_id)
    pair, rater_id = take(first)
    first.store.close()

    again = Store(path, clock=clock)
    assert (again.votes(), again.matrix(item_id)) == (votes, matrix)
    assert again.vote(pair.id, rater_id, "left")
    assert again.item(item_id).state is ItemState.COMPLETED
    again.close()


def test_a_file_that_is_no_store_or_too_new_is_refused_untouched(tmp_path: Path) -> None:
    junk = tmp_path / "junk.sqlite"
    junk.write_bytes(b"not a database, for sure" * 100)
    with pytest.raises(RunDamaged, match="junk"):
        Store(junk)
    assert junk.read_bytes() == b"not a database, for sure" * 100

    newer = tmp_path / "newer.sqlite"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RunDamaged, match="newer version"):
        Store(newer)


def test_the_votes_of_a_server_from_before_there_were_marks_stay_as_they_are(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "server.sqlite"
    old = Store(path, clock=clock)
    rater = old.tokens.add("rater", "ada")[0]
    flow_id, dataset_id = old.create_flow("f", "?", Responses(1, 2, 2)), old.create_dataset("d")
    for i, text in enumerate(("one", "two")):
        old.add_datapoint(dataset_id, i, text)
    item_id = old.create_item(flow_id, dataset_id, "Why?", 600)
    pair = old.lease(rater)
    assert pair is not None
    old.vote(pair.id, rater, "left", 700)
    before = old.votes(item_id)
    old.close()
    connection = sqlite3.connect(path)
    connection.executescript("DROP TABLE segments; PRAGMA user_version = 3;")
    connection.close()

    store = Store(path, clock=clock)
    assert store.votes(item_id) == before
    other = store.tokens.add("rater", "bo")[0]
    pair = store.lease(other)
    assert pair is not None
    assert store.vote(pair.id, other, "right", segments=[CastSegment(side="left", start=0, end=3, good=True)])
    assert [len(vote.segments) for vote in store.votes(item_id)] == [0, 1]
    store.close()


def test_a_failed_transaction_leaves_nothing_behind(world: World) -> None:
    item_id = open_item(world)
    pair, rater_id = take(world)
    with pytest.raises(sqlite3.IntegrityError):
        world.store.vote(pair.id, rater_id, None)  # type: ignore[arg-type]
    assert world.store.votes(item_id) == []
    assert world.store.vote(pair.id, rater_id, "left")


def test_a_creation_repeated_with_its_key_answers_the_same(world: World) -> None:
    make = world.store.create_flow
    first = make("a", "b", SPEC.responses, Once("key", b"body"))
    assert make("a", "b", SPEC.responses, Once("key", b"body")) == first
    assert make("a", "b", SPEC.responses, Once("other", b"body")) != first
    assert make("a", "b", SPEC.responses) != first
    with pytest.raises(Problem) as caught:
        make("a", "b", SPEC.responses, Once("key", b"another body"))
    assert caught.value.status == 422


def test_a_candidate_sent_again_is_the_same_one(world: World) -> None:
    dataset_id = world.store.create_dataset("dataset")
    first = world.store.add_datapoint(dataset_id, 0, "text")
    assert world.store.add_datapoint(dataset_id, 0, "text") == first
    with pytest.raises(Problem) as caught:
        world.store.add_datapoint(dataset_id, 0, "another text")
    assert caught.value.status == 409


def test_a_dataset_cannot_change_under_an_item(world: World) -> None:
    item_id = open_item(world)
    with pytest.raises(Problem, match="cannot grow"):
        world.store.add_datapoint(world.store.item(item_id).dataset_id, 9, "late")


def test_tokens_are_kept_as_hashes_and_die_with_their_client(world: World, clock: Clock, tmp_path: Path) -> None:
    tokens = world.store.tokens
    client_id, secret = tokens.add("client", "c")
    access = tokens.issue_access(client_id, secret)
    assert access is not None
    found = tokens.authenticate(access)
    assert found is not None
    assert (found.role, found.parent) == ("client", client_id)
    assert tokens.issue_access(client_id, "wrong") is None
    assert tokens.issue_access("nobody", secret) is None
    with world.store._database.transaction() as db:
        stored = repr([tuple(row) for row in db.execute("SELECT * FROM tokens")])
    assert secret not in stored
    assert access not in stored

    clock.advance(3600)
    assert tokens.authenticate(access) is None
    access = tokens.issue_access(client_id, secret)
    assert access is not None
    tokens.revoke(client_id)
    assert tokens.authenticate(access) is None
    assert tokens.issue_access(client_id, secret) is None


def test_a_rater_has_no_client_credentials(world: World) -> None:
    assert world.store.tokens.issue_access(*world.store.tokens.add("rater", "r")) is None


def test_many_raters_at_once_never_overshoot(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    crowd = World(store, Clock(), None, None)  # type: ignore[arg-type]
    item_id = open_item(crowd, texts=8, responses=Responses(5, 10, 12))
    threads = [threading.Thread(target=crowd.vote, args=(5,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    item = store.item(item_id)
    assert item.state is ItemState.COMPLETED
    assert 10 <= item.votes == store.matrix(item_id).votes <= 12
    store.close()
