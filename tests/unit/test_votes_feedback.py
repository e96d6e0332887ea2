"""People's votes for groups: asked for once, whatever dies; never invented; never lost."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
import pytest
from flow_world import PLAIN, Clock, Faulty, World, group, until

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.feedback.abandon import abandon
from rlhf_cli.feedback.asking import SWEEP_S
from rlhf_cli.feedback.items import Shown
from rlhf_cli.feedback.votes import DRAIN_S, SLACK_S, VotesFeedback
from rlhf_cli.flow.base import Capabilities, FlowSpec, ItemState, Responses
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import (
    DatasetCreated,
    Event,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    GroupSubmitted,
    ItemDoubled,
    ItemEnded,
    ItemStopped,
    SnapshotContradicted,
    VotesLate,
)
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import GroupState, RunState, replay
from rlhf_cli.server.app import create_app
from rlhf_cli.server.store import Store
from rlhf_cli.types import Feedback, Group, RankedGroup, Unranked, WinMatrix

SPEC = FlowSpec("run", "Which?", Responses(2, 3, 3), ttl_s=60)
TEXTS = ["a", "bb", "ccc", "dddd"]
T = TypeVar("T")
SERVICES = pytest.mark.parametrize("capabilities", [None, PLAIN], ids=["with keys", "plain"])


class Asking:
    """A feedback, the journal it writes and what it decided."""

    def __init__(
        self, world: World, disk: list[Event], flow_id: str, capabilities: Capabilities | None = None, **options: object
    ) -> None:
        self.disk, self.flow_id = disk, flow_id
        self.notes: list[str] = []
        record: Callable[[Event], object] = options.pop("journal", disk.append)  # type: ignore[assignment]
        spec = options.pop("spec", SPEC)
        settings = {"run_id": "run", "poll_s": 0.005, "settle_s": 0.0, "note": self.notes.append, **options}
        self.feedback = VotesFeedback(
            lambda: world.client(capabilities),
            flow_id,
            spec,  # type: ignore[arg-type]
            record,
            **settings,  # type: ignore[arg-type]
        )
        self.decided: list[RankedGroup | Unranked] = []

    def submit(self, one: Group) -> None:
        self.disk.append(GroupSampled.of(one))
        self.feedback.submit(one)

    def has(self, count: int) -> bool:
        self.decided.extend(self.feedback.collect())
        return len(self.decided) >= count

    def has_later(self, ours: Clock, count: int) -> bool:
        """Time goes on at every look: an item counts as seen from a moment after the journal has it."""
        ours.advance(1)
        return self.has(count)

    def error(self) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            until(lambda: self.has(1000))
        return caught.value


@contextmanager
def asking(world: World, capabilities: Capabilities | None = None, **options: object) -> Iterator[Asking]:
    one = Asking(world, [], world.open_flow(options.get("spec", SPEC)), capabilities, **options)  # type: ignore[arg-type]
    yield one
    one.feedback.close()


def run_state(disk: list[Event]) -> RunState:
    return replay(Entry(seq, 0.0, event) for seq, event in enumerate(disk))


def state(disk: list[Event]) -> list[GroupState]:
    return list(run_state(disk).open_groups)


def events(asked: Asking, kind: type[T]) -> list[T]:
    return [event for event in asked.disk if isinstance(event, kind)]


def say(world: World, data: list[list[float]] | None = None, **told: object) -> None:
    """From now on, the service shows this matrix, and items with these members."""

    def before_or_after(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        body = response.json() if response.status_code == 200 and request.method == "GET" else {}
        if "index" in body and data is not None:
            body["data"] = data
        elif "state" in body or "items" in body:
            for item in body.get("items", [body]):
                item |= {"votes": None, **told}
        else:
            return None
        return httpx.Response(200, json=body)

    world.transport.after = before_or_after


def submitted(world: World, asked: Asking, count: int = 1) -> list[str]:
    until(lambda: sum(isinstance(event, GroupSubmitted) for event in asked.disk) == count)
    return [event.item_id for event in asked.disk if isinstance(event, GroupSubmitted)]


@SERVICES
def test_a_group_comes_back_with_the_votes_in_the_store(world: World, capabilities: Capabilities | None) -> None:
    with asking(world, capabilities) as asked:
        feedback: Feedback = asked.feedback
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        assert feedback.status()["flow/in_flight"] == 1
        world.vote(3)
        until(lambda: asked.has(1))

        (ranked,) = asked.decided
        assert isinstance(ranked, RankedGroup)
        assert ranked.wins == world.store.matrix(item_id)
        assert (ranked.source, ranked.complete) == (f"item:{item_id}", True)
        event = asked.disk[-1]
        assert isinstance(event, GroupRanked)  # in the journal before anybody could collect it
        assert event.matrix() == ranked.wins
        rows = feedback.status()
        assert rows["flow/in_flight"] == 0
        assert rows["flow/votes_total"] == 3
        assert rows["flow/latency_p50_s"] == pytest.approx(ranked.latency_s)
        assert (rows["flow/incomplete_frac"], rows["flow/set_aside_total"]) == (0, 0)


def test_the_rater_reads_the_prompt_and_each_different_text_once(world: World) -> None:
    with asking(world) as asked:
        asked.submit(group(0, ["same", "", "other", " same\n", "  ", "third"]))
        (item_id,) = submitted(world, asked)
        assert [c.text for c in world.store.candidates(item_id)] == ["same", "other", "third"]
        assert world.store.item(item_id).context == "Why?"
        world.vote(3)
        until(lambda: asked.has(1))
        (ranked,) = asked.decided
        assert isinstance(ranked, RankedGroup)
        shown = Shown("g0", (0, 2, 5), ("same", "other", "third"), 6, (0, 0, 0))
        assert ranked.wins == shown.over_all(world.store.matrix(item_id))
        assert ranked.wins.votes == 3
        assert not ranked.wins.wins[[1, 3, 4]].any()  # copies and empty ones have no votes
        assert not ranked.wins.wins[:, [1, 3, 4]].any()


@pytest.mark.parametrize("texts", [["same", "same "], ["", "only"], ["", " "]])
def test_a_group_with_nothing_to_compare_costs_nothing(world: World, texts: list[str]) -> None:
    with asking(world) as asked:
        asked.submit(group(0, texts))
        until(lambda: asked.has(1))
        (aside,) = asked.decided
        assert isinstance(aside, Unranked)
        assert "nothing to compare" in aside.reason
        assert asked.disk[-1] == GroupSetAside(group_id="g0", reason=aside.reason)
        assert world.transport.count("POST", "/dataset") == 0


@pytest.mark.parametrize(("policy", "count", "kept"), [("use", 1, True), ("drop", 1, False), ("drop", 2, True)])
def test_an_incomplete_item_follows_the_policy(world: World, clock: Clock, policy: str, count: int, kept: bool) -> None:
    with asking(world, incomplete=policy) as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        world.vote(count)
        clock.advance(61)
        until(lambda: asked.has(1))
        (decided,) = asked.decided
        assert isinstance(decided, RankedGroup) == kept
        if isinstance(decided, RankedGroup):
            assert decided.complete == (count >= SPEC.responses.min)
            assert decided.wins == world.store.matrix(item_id)
        else:
            assert decided.reason == f"only 1 of at least 2 votes on item {item_id}"
            until(lambda: isinstance(asked.disk[-1], GroupRanked))  # paid for, so kept
            (known,) = replay(Entry(seq, 0.0, event) for seq, event in enumerate(asked.disk)).groups.values()
            assert known.ranked is not None
            assert not known.ready  # and never trained on
        assert asked.feedback.status()["flow/incomplete_frac"] == (count < SPEC.responses.min)


def test_votes_that_the_policy_drops_are_on_disk_before_the_group_is_set_aside(world: World, clock: Clock) -> None:
    def journal(event: Event) -> None:
        if isinstance(event, GroupRanked):
            raise Killed
        asked.disk.append(event)

    with asking(world, incomplete="drop", journal=journal) as asked:
        asked.submit(group(0, TEXTS))
        submitted(world, asked)
        world.vote(1)
        clock.advance(61)
        until(lambda: events(asked, GroupSetAside))
    assert run_state(asked.disk).votes_total == 1
    assert not run_state(asked.disk).ready_groups


@pytest.mark.parametrize("policy", ["use", "drop"])
def test_an_item_without_votes_never_becomes_a_label(world: World, clock: Clock, policy: str) -> None:
    with asking(world, incomplete=policy) as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        clock.advance(61)
        until(lambda: asked.has(1))
        assert asked.decided == [Unranked(group(0, TEXTS), f"no votes on item {item_id}")]


def test_votes_on_running_items_are_in_the_figures(world: World) -> None:
    with asking(world, votes_before=100) as asked:
        for number in range(2):
            asked.submit(group(number, TEXTS))
        submitted(world, asked, 2)
        world.vote(4)  # three on the first, one on the second
        until(lambda: asked.has(1))
        until(lambda: asked.feedback.status()["flow/votes_total"] == 104)
        assert asked.feedback.status()["flow/in_flight"] == 1
        until(lambda: "flow/votes_per_min" in asked.feedback.status())


def test_closing_leaves_items_open_and_a_resume_picks_them_up(world: World) -> None:
    flow_id, disk = world.open_flow(SPEC), list[Event]()
    first = Asking(world, disk, flow_id)
    first.submit(group(0, TEXTS))
    (item_id,) = submitted(world, first)
    first.feedback.close()
    first.feedback.close()  # harmless
    world.vote(3)

    second = Asking(world, disk, flow_id)
    second.feedback.resume(state(disk))
    until(lambda: second.has(1))
    second.feedback.close()

    assert world.item_ids() == [item_id]
    assert isinstance(second.decided[0], RankedGroup)


# Whatever dies, one group is one item.


class Killed(Exception):
    """The process died here."""


class Death:
    """Kills at the n-th point; a dead process does nothing any more."""

    def __init__(self, at: int) -> None:
        self.left = at

    def point(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Killed


def fresh_world() -> World:
    clock = Clock()
    store = Store(":memory:", clock=clock, rng=random.Random(1))
    client_id, secret = store.tokens.add("client", "trainer")
    return World(store, clock, Faulty(create_app(store)), Credentials(client_id, secret))


def one_life(
    world: World,
    capabilities: Capabilities | None,
    disk: list[Event],
    flow_id: str,
    at: int,
    *,
    first: bool,
    twice: bool,
) -> bool:
    """Ask for votes on a group until they are there, or death at point `at`; True if it lived."""
    death = Death(at)

    def journal(event: Event) -> None:
        death.point()
        disk.append(event)
        death.point()

    world.transport.before = lambda request: death.point()
    world.transport.after = lambda request, response: death.point()
    asked = Asking(world, disk, flow_id, capabilities, journal=journal, incomplete="resubmit_once" if twice else "use")
    try:
        if first:
            asked.submit(group(0, TEXTS))
        else:
            asked.feedback.resume(run_state(disk).groups.values())
        end = time.monotonic() + 10
        while state(disk) and not asked.has(1):
            if not twice or len(world.item_ids()) == 2:
                world.vote(1)
            elif world.item_ids() and not world.raters:
                world.vote(1)
                world.clock.advance(61)
            time.sleep(0.001)
            assert time.monotonic() < end
        return death.left > 0
    except Killed:
        return False
    finally:
        asked.feedback.close()


def one_group(capabilities: Capabilities | None, deaths: tuple[int, ...], *, twice: bool = False) -> int:
    """Live through these deaths and then to the end; returns how many of them happened."""
    world = fresh_world()
    flow_id, disk = world.open_flow(SPEC), list[Event]()
    happened = 0
    for life, at in enumerate((*deaths, 10**9)):
        lived = one_life(world, capabilities, disk, flow_id, at, first=life == 0, twice=twice)
        happened += not lived
        if lived:
            break
    item_ids = world.item_ids()
    (ranked,) = [event for event in disk if isinstance(event, GroupRanked)]
    assert len(item_ids) == (2 if twice else 1)
    assert ranked.source == f"item:{'+'.join(item_ids)}"
    assert ranked.matrix() == WinMatrix(sum(world.store.matrix(item_id).wins for item_id in item_ids))
    assert ranked.matrix().votes == run_state(disk).votes_total == (4 if twice else 3)
    assert state(disk) == []
    world.store.close()
    return happened


@SERVICES
def test_death_at_any_point_leaves_one_item_for_the_group(capabilities: Capabilities | None) -> None:
    """Before and after each journal entry, before and after the effect of each request."""
    points = next(at for at in itertools.count(1) if one_group(capabilities, (at,)) == 0)
    assert points > 20


@SERVICES
def test_death_at_any_point_never_asks_a_third_time(capabilities: Capabilities | None) -> None:
    points = next(at for at in itertools.count(1) if one_group(capabilities, (at,), twice=True) == 0)
    assert points > 40


@pytest.mark.slow
@SERVICES
def test_death_at_any_two_points_leaves_one_item_for_the_group(capabilities: Capabilities | None) -> None:
    for first, second in itertools.product(range(1, 24), repeat=2):
        one_group(capabilities, (first, second))


@SERVICES
@pytest.mark.parametrize("fault", [httpx.Response(500), httpx.Response(504), httpx.ReadTimeout("lost"), b"<html>"])
def test_an_answer_lost_after_the_item_was_made_does_not_buy_another(
    world: World, capabilities: Capabilities | None, fault: httpx.Response | Exception | bytes
) -> None:
    lost = iter([fault])

    def after(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if request.method == "POST" and request.url.path.endswith("/item") and (one := next(lost, None)) is not None:
            if isinstance(one, Exception):
                raise one
            return httpx.Response(200, content=one) if isinstance(one, bytes) else one
        return None

    world.transport.after = after
    with asking(world, capabilities) as asked:
        asked.submit(group(0, TEXTS))
        if capabilities is None and fault == b"<html>":  # with keys a resume asks again; without, it looks now
            assert isinstance(asked.error(), FlowRefused)
        else:
            submitted(world, asked)
        assert len(world.item_ids()) == 1


@SERVICES
def test_a_creation_that_failed_without_effect_is_made_up_for(world: World, capabilities: Capabilities | None) -> None:
    faults = iter([httpx.Response(502)])

    def before(request: httpx.Request) -> httpx.Response | None:
        made = request.method == "POST" and request.url.path.endswith("/item")
        return next(faults, None) if made else None

    world.transport.before = before
    with asking(world, capabilities) as asked:
        asked.submit(group(0, TEXTS))
        assert submitted(world, asked) == world.item_ids()


def test_a_list_that_lags_is_waited_for(world: World) -> None:
    """Without keys, an item that does not show yet is not an item that was not made."""
    lag_s, made_at = 0.05, list[float]()

    def after(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if request.url.path.endswith("/item") and request.method == "POST":
            made_at.append(time.monotonic())
            raise httpx.ReadTimeout("lost")
        if request.url.path.endswith("/item") and time.monotonic() < made_at[-1] + lag_s:
            return httpx.Response(200, json={"total": 0, "page": 1, "pageSize": 100, "items": []})
        return None

    world.transport.after = after
    with asking(world, PLAIN, settle_s=0.1) as asked:
        asked.submit(group(0, TEXTS))
        assert submitted(world, asked) == world.item_ids()
        assert len(made_at) == 1


def test_a_half_filled_dataset_is_left_behind_without_keys(world: World) -> None:
    faults = iter([httpx.Response(500)])
    world.transport.before = lambda request: next(faults, None) if "datapoint" in request.url.path else None
    with asking(world, PLAIN) as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        assert [c.text for c in world.store.candidates(item_id)] == TEXTS
        assert world.transport.count("POST", "/dataset") == 2


# What a service may do to an item.


def test_a_matrix_about_other_candidates_is_set_aside_by_name(world: World) -> None:
    bad = {"index": ["x", "y"], "columns": ["x", "y"], "data": [[0, 1], [1, 0]]}
    world.transport.before = lambda r: httpx.Response(200, json=bad) if r.url.path.endswith("vote-matrix") else None
    with asking(world) as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        world.vote(3)
        until(lambda: asked.has(1))
        (aside,) = asked.decided
        assert isinstance(aside, Unranked)
        assert item_id in aside.reason
        for number in (1, 2):
            asked.submit(group(number, TEXTS))
            submitted(world, asked, number + 1)
            world.vote(3)
        assert isinstance(asked.error(), FlowRefused)  # three in a row is no accident: stop paying


def test_a_stuck_item_is_stopped_and_its_votes_are_used(world: World) -> None:
    ours = Clock()
    with asking(world, clock=ours) as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        world.vote(2)
        ours.advance(SPEC.ttl_s + DRAIN_S + 1)  # the service's clock stands still
        until(lambda: asked.has(1))
        assert world.store.item(item_id).state is ItemState.STOPPED
        assert isinstance(asked.decided[0], RankedGroup)
        assert asked.decided[0].wins.votes == 2


def test_an_item_that_cannot_be_stopped_is_given_up_with_a_reason(world: World) -> None:
    ours = Clock()
    world.transport.before = lambda r: httpx.Response(404) if r.url.path.endswith("/stop") else None
    with asking(world, clock=ours) as asked:
        asked.submit(group(0, TEXTS))
        submitted(world, asked)
        ours.advance(SPEC.ttl_s + DRAIN_S + 1)
        until(lambda: world.transport.count("POST", "/stop"))
        assert not asked.has(1)
        ours.advance(SLACK_S + 1)
        until(lambda: asked.has(1))
        assert isinstance(asked.decided[0], Unranked)
        assert "could not be stopped" in asked.decided[0].reason


def test_an_item_that_the_service_forgot_is_not_bought_again(world: World) -> None:
    ours = Clock()
    with asking(world, clock=ours, settle_s=5.0) as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        world.transport.before = lambda r: httpx.Response(404) if item_id in r.url.path else None
        until(lambda: asked.has_later(ours, 1))
        assert asked.decided == [Unranked(group(0, TEXTS), f"the service no longer knows item {item_id}")]
        assert world.item_ids() == [item_id]


def test_a_failed_item_is_set_aside_with_the_reason_of_the_service(world: World) -> None:
    def fail(request: httpx.Request) -> httpx.Response | None:
        if request.method == "GET" and "/item/" in request.url.path:
            if request.url.path.endswith("vote-matrix"):
                return httpx.Response(409)
            item = {"id": request.url.path.split("/")[-1], "datasetId": "d", "state": "Failed"}
            return httpx.Response(200, json={**item, "failureMessage": "no people today"})
        return None

    world.transport.before = fail
    with asking(world) as asked:
        asked.submit(group(0, TEXTS))
        until(lambda: asked.has(1))
        assert isinstance(asked.decided[0], Unranked)
        assert "no people today" in asked.decided[0].reason


@pytest.mark.parametrize("told", [{"state": "Failed", "failureMessage": "no people today", "votes": 2}])
def test_the_paid_part_of_a_failed_item_is_counted(world: World, told: dict[str, object]) -> None:
    def fail(request: httpx.Request, response: httpx.Response) -> httpx.Response | None:
        if request.url.path.endswith("vote-matrix"):
            return httpx.Response(409)
        if "/item/" in request.url.path and request.method == "GET":
            return httpx.Response(200, json=response.json() | told)
        return None

    world.transport.after = fail
    with asking(world) as asked:
        asked.submit(group(0, TEXTS))
        until(lambda: asked.has(1))
        (aside,) = asked.decided
        assert isinstance(aside, Unranked)
        assert "no people today" in aside.reason
        (ended,) = events(asked, ItemEnded)
        assert (ended.state, ended.votes, ended.wins) == ("Failed", 2, None)
        assert asked.feedback.status()["flow/votes_total"] == run_state(asked.disk).votes_total == 2


def test_one_answer_to_a_poll_that_makes_no_sense_is_asked_again_and_three_in_a_row_are_not(world: World) -> None:
    garbled = iter([b"<html>"])

    def garble(request: httpx.Request) -> httpx.Response | None:
        wrong = request.method == "GET" and "/item/" in request.url.path
        return httpx.Response(200, content=one) if wrong and (one := next(garbled, None)) else None

    with asking(world) as asked:
        asked.submit(group(0, TEXTS))
        submitted(world, asked)
        world.transport.before = garble
        until(lambda: asked.notes)
        world.vote(3)
        until(lambda: asked.has(1))
        assert isinstance(asked.decided[0], RankedGroup)
        garbled = itertools.repeat(b"<html>")  # type: ignore[assignment]
        asked.submit(group(1, TEXTS))
        assert isinstance(asked.error(), FlowRefused)


def test_results_come_out_once_each_to_its_own_group_in_any_order(world: World) -> None:
    with asking(world) as asked:
        for number in range(3):
            asked.submit(group(number, TEXTS))
        item_ids = submitted(world, asked, 3)
        of_item = {event.item_id: event.group_id for event in events(asked, GroupSubmitted)}
        world.store.stop(item_ids[1])  # without votes, before the others
        until(lambda: asked.has(1))
        world.vote(6)
        until(lambda: asked.has(3))
        assert asked.decided[0].group.id == of_item[item_ids[1]]
        assert sorted(one.group.id for one in asked.decided) == ["g0", "g1", "g2"]
        for ranked in asked.decided[1:]:
            assert isinstance(ranked, RankedGroup)
            item_id = ranked.source.removeprefix("item:")
            assert (of_item[item_id], world.store.matrix(item_id)) == (ranked.group.id, ranked.wins)


def test_a_terminal_state_that_reverts_is_written_down_and_the_group_is_decided_once(world: World) -> None:
    with asking(world) as asked:
        say(world, state="Completed")
        asked.submit(group(0, TEXTS))
        submitted(world, asked)
        until(lambda: world.transport.count("GET", "vote-matrix") > 1)  # 409: there is no snapshot yet
        say(world, state="Running")
        until(lambda: events(asked, SnapshotContradicted))
        world.vote(3)
        world.transport.after = lambda request, response: None
        until(lambda: asked.has(1))
        assert "was Completed and is Running again" in events(asked, SnapshotContradicted)[0].what
        assert len(events(asked, GroupRanked)) == 1
        assert asked.feedback.status()["flow/votes_total"] == 3


# Too few votes, and votes that come too late.


@SERVICES
@pytest.mark.parametrize("second", [0, 1, 3])
def test_a_group_below_the_minimum_is_asked_about_once_more_and_never_a_third_time(
    world: World, clock: Clock, capabilities: Capabilities | None, second: int
) -> None:
    with asking(world, capabilities, incomplete="resubmit_once") as asked:
        asked.submit(group(0, TEXTS))
        (first_id,) = submitted(world, asked)
        world.vote(1)
        clock.advance(61)
        second_id = submitted(world, asked, 2)[1]
        assert not asked.has(1)
        assert asked.feedback.status()["flow/in_flight"] == 1
        world.vote(second)
        clock.advance(61)
        until(lambda: asked.has(1))
        (ranked,) = asked.decided
        assert isinstance(ranked, RankedGroup)
        assert ranked.source == f"item:{first_id}+{second_id}"
        assert ranked.complete == (1 + second >= SPEC.responses.min)
        wins = world.store.matrix(first_id).wins + world.store.matrix(second_id).wins
        assert ranked.wins == WinMatrix(wins)
        assert world.item_ids() == [first_id, second_id]
        assert len({event.key for event in events(asked, GroupIntended)}) == 2
        ended = events(asked, ItemEnded)[0]  # in the journal before anybody is asked again: what was seen first counts
        assert (ended.item_id, ended.votes) == (first_id, 1)
        assert asked.disk.index(ended) < asked.disk.index(events(asked, GroupIntended)[1])
        assert asked.feedback.status()["flow/votes_total"] == run_state(asked.disk).votes_total == 1 + second


def test_an_item_that_is_only_out_of_sight_is_not_asked_about_again(world: World) -> None:
    ours = Clock()
    with asking(world, clock=ours, settle_s=5.0, incomplete="resubmit_once") as asked:
        asked.submit(group(0, TEXTS))
        (item_id,) = submitted(world, asked)
        world.transport.before = lambda r: httpx.Response(404) if item_id in r.url.path else None
        until(lambda: asked.has_later(ours, 1))
        assert asked.decided == [Unranked(group(0, TEXTS), f"the service no longer knows item {item_id}")]
        assert world.item_ids() == [item_id]


def decide_one(world: World, asked: Asking) -> tuple[str, RankedGroup, WinMatrix]:
    """A group that people have decided; its item, its votes, and a matrix with one vote more."""
    asked.submit(group(0, TEXTS))
    (item_id,) = submitted(world, asked)
    world.vote(3)
    until(lambda: asked.has(1))
    (ranked,) = asked.decided
    assert isinstance(ranked, RankedGroup)
    more = ranked.wins.wins.copy()
    more[3, 0] += 1
    return item_id, ranked, WinMatrix(more)


@SERVICES
@pytest.mark.parametrize("when", ["a drain time later", "at the end of the run", "after a restart"])
def test_votes_after_the_decision_are_kept_counted_and_never_trained(
    world: World, capabilities: Capabilities | None, when: str
) -> None:
    ours = Clock()
    with asking(world, capabilities, clock=ours) as asked:
        item_id, ranked, more = decide_one(world, asked)
        if when == "after a restart":
            asked.feedback.close()
        say(world, more.wins.tolist())
        if when == "a drain time later":
            ours.advance(DRAIN_S + 1)
            until(lambda: events(asked, VotesLate))
            until(lambda: asked.feedback.status()["flow/late_votes_total"] == 1)
            assert asked.feedback.status()["flow/votes_total"] == 4
        asked.feedback.close()
        if when == "after a restart":
            assert not events(asked, VotesLate)
            again = Asking(world, asked.disk, asked.flow_id, capabilities, votes_before=3, wall=lambda: 1.0)
            again.feedback.resume(run_state(asked.disk).groups.values())
            until(lambda: events(asked, VotesLate))
            again.feedback.close()
            assert not again.has(1)
        (late,) = events(asked, VotesLate)
        assert (late.group_id, late.item_id) == ("g0", item_id)
        assert late.matrix().wins[3, 0] == late.matrix().votes == 1
        known = run_state(asked.disk)
        assert known.votes_total == 4
        assert known.groups["g0"].ranked is not None
        assert known.groups["g0"].ranked.matrix() == ranked.wins
        assert not asked.has(2)


def test_votes_that_a_service_takes_back_stay_as_they_were_first_seen(world: World) -> None:
    ours = Clock()
    with asking(world, clock=ours) as asked:
        item_id, ranked, _ = decide_one(world, asked)
        say(world, [[0.0] * 4] * 4)
        ours.advance(DRAIN_S + 1)
        until(lambda: events(asked, SnapshotContradicted))
        (other,) = events(asked, SnapshotContradicted)
        assert (other.item_id, other.wins) == (item_id, ((0.0,) * 4,) * 4)
        until(lambda: any("What it said first counts" in note for note in asked.notes))
        assert run_state(asked.disk).votes_total == 3
        assert run_state(asked.disk).groups["g0"].ranked is not None
        assert not asked.has(2)
        assert ranked.wins.votes == 3


def test_nothing_late_is_nothing_written(world: World) -> None:
    ours = Clock()
    with asking(world, clock=ours) as asked:
        decide_one(world, asked)
        count = len(asked.disk)
        ours.advance(DRAIN_S + 1)
        asked.feedback.close()
        assert len(asked.disk) == count
        assert asked.notes == []


# Two items on one dataset.


@pytest.mark.parametrize("known_is_older", [True, False])
@pytest.mark.parametrize("restart", [False, True])
def test_two_items_on_one_dataset_are_pooled_and_the_younger_is_stopped(
    world: World, clock: Clock, known_is_older: bool, restart: bool
) -> None:
    ours, made = Clock(), list[str]()
    flow_id, disk = world.open_flow(SPEC), list[Event]()

    def another(request: httpx.Request) -> None:
        if request.method == "POST" and request.url.path.endswith("/item") and not made and not known_is_older:
            dataset_id = next(e.dataset_id for e in reversed(disk) if isinstance(e, DatasetCreated))
            made.append(world.store.create_item(flow_id, dataset_id, "Why?", 60))
            clock.advance(0.1)

    world.transport.before = another
    asked = Asking(world, disk, flow_id, PLAIN, clock=ours)
    asked.submit(group(0, TEXTS))
    (known,) = submitted(world, asked)
    if known_is_older:
        clock.advance(0.1)
        made.append(world.store.create_item(flow_id, events(asked, DatasetCreated)[0].dataset_id, "Why?", 60))
    older, younger = (known, made[0]) if known_is_older else (made[0], known)
    paid = world.vote(4)  # three on one; one on the other, unless that was stopped already
    first = asked
    if restart:
        asked.feedback.close()
        asked = Asking(world, disk, flow_id, PLAIN, clock=ours)
        asked.feedback.resume(run_state(disk).groups.values())
    else:
        ours.advance(SWEEP_S + 1)
    clock.advance(61)
    until(lambda: first.has(1) or asked.has(1))  # the last vote may be seen just before the restart
    until(lambda: events(asked, ItemDoubled))
    asked.feedback.close()

    (double,) = events(asked, ItemDoubled)
    assert double.item_ids == (older, younger)
    state = run_state(disk)
    assert state.votes_total == paid  # none lost, none counted twice
    assert len(events(asked, GroupRanked)) == 1
    assert sum("made 2 items" in note for note in asked.notes) <= 1


def test_votes_on_a_double_that_only_the_last_look_finds_are_kept(world: World, clock: Clock) -> None:
    with asking(world, PLAIN, clock=Clock()) as asked:
        decide_one(world, asked)
        until(lambda: not asked.feedback.status()["flow/in_flight"])
        time.sleep(0.05)  # the sweep of the first poll is over, the next is half a minute away
        clock.advance(0.1)
        younger = world.store.create_item(asked.flow_id, events(asked, DatasetCreated)[0].dataset_id, "Why?", 60)
        assert world.vote(1) == 1
        asked.feedback.close()
    assert [stop.item_id for stop in events(asked, ItemStopped)] == [younger]
    assert [(late.item_id, late.matrix().votes) for late in events(asked, VotesLate)] == [(younger, 1)]


def test_a_double_found_while_people_vote_is_stopped_and_both_items_votes_train(world: World, clock: Clock) -> None:
    ours = Clock()
    with asking(world, PLAIN, clock=ours) as asked:
        asked.submit(group(0, TEXTS))
        (older,) = submitted(world, asked)
        world.vote(1)
        clock.advance(0.1)
        younger = world.store.create_item(asked.flow_id, events(asked, DatasetCreated)[0].dataset_id, "Why?", 60)
        ours.advance(SWEEP_S + 1)
        until(lambda: events(asked, ItemStopped))
        assert [event.item_id for event in events(asked, ItemStopped)] == [younger]
        assert world.store.item(younger).state is ItemState.STOPPED
        world.vote(2)
        until(lambda: asked.has(1))
        (ranked,) = asked.decided
        assert isinstance(ranked, RankedGroup)
        assert ranked.source == f"item:{older}+{younger}"
        assert ranked.wins == world.store.matrix(older)
        status = asked.feedback.status()
        assert (status["flow/doubles_total"], status["flow/orphans_total"], status["flow/votes_total"]) == (1, 1, 3)
        (note,) = asked.notes  # once
        assert older in note
        assert younger in note


def test_an_item_found_after_the_decision_is_stopped_and_its_votes_are_late(world: World, clock: Clock) -> None:
    ours = Clock()
    with asking(world, PLAIN, clock=ours) as asked:
        decide_one(world, asked)
        clock.advance(0.1)
        dataset_id = events(asked, DatasetCreated)[0].dataset_id
        orphan = world.store.create_item(asked.flow_id, dataset_id, "Why?", 60)
        world.vote(2)
        ours.advance(SWEEP_S + 1)
        until(lambda: events(asked, ItemStopped))
        asked.feedback.close()
        assert [event.item_id for event in events(asked, ItemStopped)] == [orphan]
        (late,) = events(asked, VotesLate)
        assert (late.item_id, late.matrix()) == (orphan, world.store.matrix(orphan))
        assert run_state(asked.disk).votes_total == 5


def test_a_double_that_a_dead_process_had_found_and_not_stopped_is_stopped(world: World, clock: Clock) -> None:
    with asking(world, PLAIN) as asked:
        decide_one(world, asked)
        (dataset,) = events(asked, DatasetCreated)
        asked.feedback.close()
        clock.advance(0.1)
        double = world.store.create_item(asked.flow_id, dataset.dataset_id, "Why?", 60)
        (known,) = events(asked, GroupSubmitted)
        item_ids = (known.item_id, double)
        asked.disk.append(ItemDoubled(group_id="g0", dataset_id=dataset.dataset_id, item_ids=item_ids))
        again = Asking(world, asked.disk, asked.flow_id, PLAIN, wall=lambda: 1.0)
        again.feedback.resume(run_state(asked.disk).groups.values())
        until(lambda: events(asked, ItemStopped))
        again.feedback.close()
    assert [event.item_id for event in events(asked, ItemStopped)] == [double]
    assert world.store.item(double).state is ItemState.STOPPED


def test_items_of_other_runs_in_the_same_flow_are_left_alone(world: World) -> None:
    ours = Clock()
    with asking(world, PLAIN, clock=ours) as asked:
        theirs = world.store.create_dataset("another run's")
        for i, text in enumerate(TEXTS):
            world.store.add_datapoint(theirs, i, text)
        item_id = world.store.create_item(asked.flow_id, theirs, "Why?", 600)
        asked.submit(group(0, TEXTS))
        submitted(world, asked)
        lists = world.transport.count("GET", "/item")
        ours.advance(SWEEP_S + 1)
        until(lambda: world.transport.count("GET", "/item") > lists)
        asked.feedback.close()
        assert not world.store.item(item_id).state.terminal
        assert not events(asked, ItemDoubled)


# Enough votes before the last.


LONG = FlowSpec("run", "Which?", Responses(4, 40, 40), ttl_s=60)


def test_an_item_ends_early_once_its_votes_have_decided(world: World) -> None:
    with asking(world, spec=LONG, stop_when_decided=0.9) as asked:
        asked.submit(group(0, ["a", "bb"]))
        (item_id,) = submitted(world, asked)
        world.vote(3)
        until(lambda: asked.feedback.status()["flow/votes_total"] == 3)
        assert not asked.has(1)
        until(lambda: world.vote(1) == 0 or asked.has(1))
        until(lambda: asked.has(1))
        (ranked,) = asked.decided
        assert isinstance(ranked, RankedGroup)
        assert ranked.complete
        assert 4 <= ranked.wins.votes < 40
        assert world.store.item(item_id).state is ItemState.STOPPED
        assert asked.feedback.status()["flow/votes_saved_total"] == 40 - ranked.wins.votes
        assert events(asked, ItemStopped) == [
            ItemStopped(group_id="g0", item_id=item_id, reason="the ranking is decided")
        ]
        asked.feedback.close()
        again = Asking(world, asked.disk, asked.flow_id, spec=LONG, votes_before=ranked.wins.votes)
        again.feedback.resume(run_state(asked.disk).groups.values())
        until(lambda: again.feedback.status()["flow/votes_saved_total"] == 40 - ranked.wins.votes)
        assert again.feedback.status()["flow/votes_total"] == ranked.wins.votes
        again.feedback.close()


def test_partial_votes_are_asked_for_only_where_their_number_grew(world: World) -> None:
    with asking(world, spec=LONG, stop_when_decided=0.999) as asked:
        asked.submit(group(0, ["a", "bb"]))
        submitted(world, asked)
        world.vote(4)
        until(lambda: world.transport.count("GET", "vote-matrix"))
        polls = len(world.transport.requests)
        until(lambda: len(world.transport.requests) > polls + 5)
        assert world.transport.count("GET", "vote-matrix") == 1


def test_stopping_early_is_refused_before_anything_is_paid_where_votes_are_not_shown(world: World) -> None:
    with asking(world, PLAIN, stop_when_decided=0.9) as asked:
        asked.submit(group(0, TEXTS))
        error = asked.error()
        assert isinstance(error, FlowRefused)
        assert "flow.stop_when_decided" in str(error)
        assert world.transport.count("POST", "/dataset") == 0


# The trainer's side, and starting over.


def test_the_trainer_waits_for_no_disk(world: World) -> None:
    disk_is_slow, calls_done = threading.Event(), threading.Event()
    waited: list[bool] = []

    def journal(event: Event) -> None:
        disk_is_slow.set()
        waited.append(calls_done.wait(10))

    with asking(world, journal=journal) as asked:
        asked.submit(group(0, TEXTS))
        assert disk_is_slow.wait(10)
        asked.submit(group(1, TEXTS))
        status = asked.feedback.status()
        assert asked.feedback.collect() == []
        calls_done.set()
        assert (status["flow/in_flight"], status["flow/backlog"]) == (2, 2)
        until(lambda: len(world.item_ids()) == 2)
        until(lambda: asked.feedback.status()["flow/backlog"] == 0)
    assert waited[0]  # not the ten seconds: the calls came back while the disk was still at it


async def test_starting_over_ends_the_items_people_still_vote_on_and_keeps_what_was_paid(world: World) -> None:
    flow_id, disk = world.open_flow(SPEC), list[Event]()
    asked = Asking(world, disk, flow_id)
    for number in range(3):
        asked.submit(group(number, TEXTS))
    item_ids = submitted(world, asked, 3)
    asked.feedback.close()
    disk.remove(next(e for e in disk if isinstance(e, GroupSubmitted)))  # died before it was written down
    world.vote(2)

    client = world.client()
    ended = await abandon(client, flow_id, state(disk), disk.append)
    await client.close()

    assert ended == 3
    assert {world.store.item(item_id).state for item_id in item_ids} == {ItemState.STOPPED}
    assert state(disk) == []
    assert run_state(disk).votes_total == 2
    assert not run_state(disk).ready_groups


@SERVICES
async def test_starting_over_keeps_the_votes_of_items_that_had_ended_already_or_are_slow_to_end(
    world: World, clock: Clock, capabilities: Capabilities | None
) -> None:
    flow_id, disk = world.open_flow(SPEC), list[Event]()
    asked = Asking(world, disk, flow_id)
    asked.submit(group(0, TEXTS))
    (item_id,) = submitted(world, asked)
    asked.feedback.close()
    world.vote(3)  # nobody looked
    matrices = 0

    def refuses_and_lingers(request: httpx.Request) -> httpx.Response | None:
        nonlocal matrices
        matrices += request.url.path.endswith("/vote-matrix")
        if request.url.path.endswith("/stop"):
            return httpx.Response(409, json={"detail": "it has ended"})
        return httpx.Response(409) if matrices == 1 and request.url.path.endswith("/vote-matrix") else None

    world.transport.before = refuses_and_lingers
    client = world.client(capabilities)
    ended = await abandon(client, flow_id, state(disk), disk.append)
    await client.close()

    assert ended == 0
    (kept,) = [event for event in disk if isinstance(event, ItemEnded)]
    assert WinMatrix(kept.wins) == world.store.matrix(item_id)
    assert run_state(disk).votes_total == 3
    assert state(disk) == []


# What ends the asking.


def test_revoked_credentials_end_the_asking_after_what_was_decided(world: World) -> None:
    with asking(world) as asked:
        for number in range(2):
            asked.submit(group(number, TEXTS))
        submitted(world, asked, 2)
        world.vote(3)
        until(lambda: any(isinstance(event, GroupRanked) for event in asked.disk))
        world.store.tokens.revoke(world.credentials.client_id)
        assert isinstance(asked.error(), CredentialsError)
        assert [type(one) for one in asked.decided] == [RankedGroup]
        asked.feedback.submit(group(2, TEXTS))  # not asked, not lost: the journal has it as sampled
        with pytest.raises(CredentialsError):
            asked.feedback.collect()


def test_a_service_that_is_gone_past_the_deadline_ends_the_asking(world: World) -> None:
    with asking(world) as asked:
        asked.submit(group(0, TEXTS))
        submitted(world, asked)

        def gone(request: httpx.Request) -> None:
            raise httpx.ConnectError("refused")

        world.transport.before = gone
        assert isinstance(asked.error(), FlowUnavailable)
        assert asked.feedback.status()["flow/in_flight"] == 1


def test_a_journal_that_cannot_be_written_ends_the_asking(world: World) -> None:
    def full(event: Event) -> None:
        raise OSError(28, "No space left on device")

    with asking(world, journal=full) as asked:
        asked.submit(group(0, TEXTS))
        assert isinstance(asked.error(), OSError)
        assert world.item_ids() == []


def test_a_client_that_cannot_be_made_ends_the_asking() -> None:
    def connect() -> None:
        raise FlowRefused("no address")

    feedback = VotesFeedback(connect, "flow", SPEC, print, run_id="run")  # type: ignore[arg-type]
    feedback.submit(group(0, TEXTS))

    def failed() -> bool:
        try:
            return bool(feedback.collect())
        except FlowRefused:
            return True

    until(failed)
    feedback.close()


def test_what_is_shown_are_the_first_copies_in_order() -> None:
    shown = Shown.of("g0", ["b", "a", "b ", "", "c"])
    assert (shown.indices, shown.texts, shown.size) == ((0, 1, 4), ("b", "a", "c"), 5)
    wins = Shown.of("g0", ["x", "", "y"]).over_all(WinMatrix([[0, 1], [2, 0]]))
    assert wins.wins.tolist() == [[0, 0, 1], [0, 0, 0], [2, 0, 0]]
