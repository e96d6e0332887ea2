"""People's votes for groups: asked for once, whatever dies; never invented; never lost."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from flow_world import PLAIN, Clock, Faulty, World, group, until

from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.feedback.items import Shown
from rlhf_cli.feedback.votes import DRAIN_S, SLACK_S, VotesFeedback
from rlhf_cli.flow.base import Capabilities, FlowSpec, ItemState, Responses
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import Event, GroupRanked, GroupSampled, GroupSetAside, GroupSubmitted
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import GroupState, replay
from rlhf_cli.server.app import create_app
from rlhf_cli.server.store import Store
from rlhf_cli.types import Feedback, Group, RankedGroup, Unranked, WinMatrix

SPEC = FlowSpec("run", "Which?", Responses(2, 3, 3), ttl_s=60)
TEXTS = ["a", "bb", "ccc", "dddd"]
SERVICES = pytest.mark.parametrize("capabilities", [None, PLAIN], ids=["with keys", "plain"])


class Asking:
    """A feedback, the journal it writes and what it decided."""

    def __init__(
        self, world: World, disk: list[Event], flow_id: str, capabilities: Capabilities | None = None, **options: object
    ) -> None:
        self.disk = disk
        record: Callable[[Event], object] = options.pop("journal", disk.append)  # type: ignore[assignment]
        settings = {"run_id": "run", "poll_s": 0.005, "settle_s": 0.0, **options}
        self.feedback = VotesFeedback(
            lambda: world.client(capabilities),
            flow_id,
            SPEC,
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

    def error(self) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            until(lambda: self.has(1000))
        return caught.value


@contextmanager
def asking(world: World, capabilities: Capabilities | None = None, **options: object) -> Iterator[Asking]:
    one = Asking(world, [], world.open_flow(SPEC), capabilities, **options)
    yield one
    one.feedback.close()


def state(disk: list[Event]) -> list[GroupState]:
    return list(replay(Entry(seq, 0.0, event) for seq, event in enumerate(disk)).open_groups)


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
        shown = Shown("g0", (0, 2, 5), ("same", "other", "third"), 6)
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
    world: World, capabilities: Capabilities | None, disk: list[Event], flow_id: str, at: int, *, first: bool
) -> bool:
    """Ask for votes on a group until they are there, or death at point `at`; True if it lived."""
    death = Death(at)

    def journal(event: Event) -> None:
        death.point()
        disk.append(event)
        death.point()

    world.transport.before = lambda request: death.point()
    world.transport.after = lambda request, response: death.point()
    asked = Asking(world, disk, flow_id, capabilities, journal=journal)
    try:
        if first:
            asked.submit(group(0, TEXTS))
        else:
            asked.feedback.resume(state(disk))
        end = time.monotonic() + 10
        while state(disk) and not asked.has(1):
            world.vote(1)
            time.sleep(0.001)
            assert time.monotonic() < end
        return death.left > 0
    except Killed:
        return False
    finally:
        asked.feedback.close()


def one_group(capabilities: Capabilities | None, deaths: tuple[int, ...]) -> int:
    """Live through these deaths and then to the end; returns how many of them happened."""
    world = fresh_world()
    flow_id, disk = world.open_flow(SPEC), list[Event]()
    happened = 0
    for life, at in enumerate((*deaths, 10**9)):
        lived = one_life(world, capabilities, disk, flow_id, at, first=life == 0)
        happened += not lived
        if lived:
            break
    (item_id,) = world.item_ids()
    (ranked,) = [event for event in disk if isinstance(event, GroupRanked)]
    assert ranked.source == f"item:{item_id}"
    assert ranked.matrix() == world.store.matrix(item_id)
    assert ranked.matrix().votes == 3
    assert state(disk) == []
    world.store.close()
    return happened


@SERVICES
def test_death_at_any_point_leaves_one_item_for_the_group(capabilities: Capabilities | None) -> None:
    """Before and after each journal entry, before and after the effect of each request."""
    points = next(at for at in itertools.count(1) if one_group(capabilities, (at,)) == 0)
    assert points > 20


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
        ours.advance(6)
        until(lambda: asked.has(1))
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
