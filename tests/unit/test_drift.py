"""Where the reward model goes wrong: found in the right cluster, looked into, mended with fewer votes than blindly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drift_world import VOTES, Taste, World
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_world import Disk, Killed

from rlhf_cli.feedback.drift import DriftWatch, excess_disagreement
from rlhf_cli.journal.events import (
    DriftFound,
    GroupChosen,
    GroupRanked,
    RewardModelRefreshed,
    RoundEnded,
)
from rlhf_cli.recipe.online import Drift, Selection
from rlhf_cli.types import Completion, Group, Message, Prompt, WinMatrix

LOG3 = float(np.log(3))  # the log-odds of 3/4

# What disagreement is.


def test_disagreement_is_the_share_of_votes_against_the_model_less_what_it_expects() -> None:
    scores = np.array([LOG3, 0.0])  # a quarter of the votes should go against it
    assert excess_disagreement(scores, np.array([[0, 3], [1, 0]])) == pytest.approx(0.0)
    assert excess_disagreement(scores, np.array([[0, 4], [0, 0]])) == pytest.approx(-0.25)
    assert excess_disagreement(scores, np.array([[0, 1], [3, 0]])) == pytest.approx(0.5)


def test_where_the_model_has_no_side_nothing_that_people_say_is_against_it() -> None:
    assert excess_disagreement(np.zeros(2), np.array([[0, 5], [0, 0]])) == 0.0


@given(st.lists(st.floats(-4, 4), min_size=3, max_size=3), st.floats(-20, 20), st.integers(0, 999))
def test_disagreement_knows_neither_zero_point_nor_order(scores: list[float], shift: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    wins = draw.integers(0, 4, (3, 3)) * (1.0 - np.eye(3))
    wins[0, 1] += 1
    order, given_scores = draw.permutation(3), np.round(scores, 3)
    value = excess_disagreement(given_scores, wins)
    assert excess_disagreement(np.round(given_scores + np.round(shift), 3), wins) == pytest.approx(value)
    assert excess_disagreement(given_scores[order], wins[np.ix_(order, order)]) == pytest.approx(value)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 4), st.integers(0, 999))
def test_a_calibrated_model_is_not_disagreed_with_however_unsure_it_is(spread: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores = spread * draw.normal(size=4)
    wins = 1 / (1 + np.exp(scores[None, :] - scores[:, None])) * (1 - np.eye(4))  # what it expects of one vote a pair
    assert excess_disagreement(scores, wins) == pytest.approx(0.0, abs=1e-12)


# When a round begins and ends.


def group(index: int, cluster: int = 0, kl_nats: float = 0.5) -> Group:
    completion = Completion("x", (1,), (-1.0,), (-1.0 - kl_nats,), True)
    return Group(f"g{index}", index, Prompt(f"c{cluster}", (Message("user", "?"),)), (1,), (completion,) * 2, 0)


class Told:
    """A watch that is told of groups one by one; the model is always three to one for the first completion."""

    def __init__(self, drift: Drift) -> None:
        self.watch = DriftWatch(drift, lambda prompt: int(prompt.id[1:]), (said := list[str]()).append)
        self.said, self.index, self.version = said, 0, "v1"

    def sample(self, cluster: int = 0, kl_nats: float = 0.5) -> tuple[str, bool]:
        one = group(self.index, cluster, kl_nats)
        self.index += 1
        wanted = self.watch.wanted(one)
        self.watch.chosen(
            one,
            GroupChosen(
                group_id=one.id,
                people=True,
                why="round" if wanted else "uncertainty",
                version=self.version,
                scores=(LOG3, 0.0),
                cluster=cluster,
            ),
        )
        return one.id, wanted

    def decided(self, against: float, cluster: int = 0) -> list[DriftFound | RoundEnded]:
        """Eight votes on the next group, a share of them against the model."""
        group_id, _ = self.sample(cluster)
        return self.watch.decided(group_id, WinMatrix([[0, 8 * (1 - against)], [8 * against, 0]]))

    def until_found(self, cluster: int = 0) -> DriftFound:
        """People turn against the model, and say so until a round begins."""
        while not (events := self.decided(0.75, cluster)):
            assert self.index < 200
        (found,) = events
        assert isinstance(found, DriftFound)
        return found

    def usual(self, groups: int, cluster: int = 0) -> None:
        for n in range(groups):
            assert self.decided(0.125 if n % 2 else 0.375, cluster) == []


def test_a_round_begins_where_disagreement_rises_and_asks_about_that_cluster_alone() -> None:
    told = Told(Drift(window=16, round_groups=3))
    for cluster in (0, 1):
        told.usual(10, cluster)
    found = told.until_found(cluster=1)
    assert (found.cluster, found.groups) == (1, 3)
    assert found.before == pytest.approx(0.0, abs=0.03)
    assert found.now == pytest.approx(0.5, abs=0.1)
    assert found.z >= 3.5
    # What people said there before it rose; not what made it rise, and nothing of other clusters.
    assert set(found.outdated) == {f"g{n}" for n in range(10, 20)} == told.watch.outdated
    assert told.watch.wanted(group(99, cluster=1))
    assert not told.watch.wanted(group(99, cluster=0))
    assert "cluster 1" in told.said[0]


def test_the_round_ends_when_its_groups_are_decided_and_then_a_refit_is_due() -> None:
    told = Told(Drift(window=16, round_groups=3))
    told.usual(10)
    told.until_found()
    assert not told.watch.refit_due
    asked = [told.sample() for _ in range(5)]
    assert [wanted for _, wanted in asked] == [True, True, True, False, False]
    wins = WinMatrix([[0, 2], [6, 0]])
    assert told.watch.decided(asked[0][0], wins) == []
    assert told.watch.decided(asked[3][0], wins) == []  # not of the round
    assert told.watch.decided(asked[1][0], None) == []  # people gave it no votes
    assert told.watch.decided(asked[2][0], wins) == [RoundEnded(cluster=0)]
    assert told.watch.refit_due


def test_what_people_say_of_a_version_that_is_known_to_be_wrong_begins_no_second_round() -> None:
    told = Told(Drift(window=16, round_groups=2))
    told.usual(10)
    told.until_found()
    assert [told.decided(0.75) for _ in range(2)] == [[], [RoundEnded(cluster=0)]]
    assert not any(told.decided(0.75) for _ in range(20))
    told.version = "v2"
    told.usual(20)  # the refit has it right again
    assert told.watch.z(0) < 3.5
    told.until_found()  # and then taste turns once more
    assert set(told.watch.outdated) >= {f"g{n}" for n in range(40)}  # the turn before is outdated, too


def test_a_refit_that_did_not_help_is_followed_by_another_round_and_keeps_what_people_said_since() -> None:
    told = Told(Drift(window=32, round_groups=2))
    told.usual(10)
    told.until_found()
    first = set(told.watch.outdated)
    assert told.decided(0.75) + told.decided(0.75) == [RoundEnded(cluster=0)]
    told.version = "v2"
    told.until_found()
    assert told.watch.outdated == first


def test_few_groups_and_chance_begin_nothing() -> None:
    told = Told(Drift(window=16))
    told.usual(40)
    assert told.watch.z(0) < 3.5
    told = Told(Drift(window=16))
    told.usual(6)  # the fewest that there has to be before
    assert not any(told.decided(0.75) for _ in range(3))
    assert told.decided(0.75)


def test_a_rise_that_is_older_than_the_window_is_how_things_are() -> None:
    told = Told(Drift(window=8, z=1e9))
    told.usual(8)
    for _ in range(8):
        told.decided(0.75)
    assert told.watch.z(0) > 6.0
    for _ in range(80):
        told.decided(0.75)
    assert told.watch.z(0) < 1.0
    assert Told(Drift(window=8)).watch.z(0) == 0.0


def test_kl_and_disagreement_are_shown_for_every_cluster() -> None:
    told = Told(Drift(window=8))
    told.sample(cluster=0, kl_nats=1.0)
    told.sample(cluster=0, kl_nats=2.0)
    told.sample(cluster=3, kl_nats=7.0)
    told.decided(0.75, cluster=3)
    row = told.watch.status()
    assert row["drift/c0_kl_nats"] == pytest.approx(1.5)
    assert row["drift/c3_kl_nats"] == pytest.approx((7.0 + 0.5) / 2)
    assert row["drift/c3_disagreement"] == pytest.approx(0.5)
    assert "drift/c0_disagreement" not in row
    assert row["drift/rounds_total"] == 0.0


# With the real chooser, hybrid feedback, refit and clusters.

TURNS_AT, GROUPS, ENOUGH = 200, 800, 0.8


@pytest.mark.parametrize("seed", range(5))
def test_a_turn_of_taste_in_one_topic_is_found_there_and_mended_with_fewer_votes_than_blindly(
    seed: int, tmp_path: Path
) -> None:
    taste = Taste(seed, TURNS_AT)
    watched = World(taste, Disk(), tmp_path / "watched", selection=Selection(), drift=Drift(clusters=4))
    blind = World(taste, Disk(), tmp_path / "blind", selection=Selection(random_share=1.0))
    for world in (watched, blind):
        world.run(GROUPS, enough=ENOUGH)
        assert world.agreement[TURNS_AT - 1] > 0.9
        assert world.agreement[TURNS_AT] < 0.1  # nobody told the model
    assert [found.cluster for found in watched.found] == [watched.turned]
    assert watched.agreement[-1] >= ENOUGH
    assert watched.votes_since_the_turn < 0.75 * blind.votes_since_the_turn


def test_the_groups_of_a_round_are_all_of_the_turned_topic_and_as_many_as_the_recipe_says(tmp_path: Path) -> None:
    world = World(Taste(1, TURNS_AT), Disk(), tmp_path, drift=Drift(clusters=4, round_groups=7)).run(400)
    targeted = [event for event in world.disk.of(GroupChosen) if event.why == "round"]
    assert len(world.found) == len(world.disk.of(RoundEnded)) == 1
    assert len(targeted) == 7
    assert {event.cluster for event in targeted} == {world.turned}
    assert world.people.taste.votes(world.taste.group(0)).matrix().votes == VOTES


def test_wherever_the_process_dies_it_finds_asks_and_refits_as_a_run_that_did_not(tmp_path: Path) -> None:
    taste, selection, groups = Taste(2, 60), Selection(share=0.5), 170
    drift = Drift(clusters=4, round_groups=4)

    def world(disk: Disk, name: str) -> World:
        return World(taste, disk, tmp_path / name, selection=selection, drift=drift, delay=0)

    whole = world(Disk(), "whole").run(groups).disk
    for kind in (DriftFound, RoundEnded, RewardModelRefreshed):
        assert whole.of(kind)
    notable = [e.seq for e in whole.entries if isinstance(e.event, DriftFound | RoundEnded | RewardModelRefreshed)]
    for dies_at in sorted({n + k for n in notable for k in (-1, 0, 1)} | set(range(5, len(whole.entries), 160))):
        disk = Disk(dies_at=dies_at)
        with pytest.raises(Killed):
            world(disk, str(dies_at)).run(groups)
        disk.dies_at = None
        world(disk, str(dies_at)).run(groups)
        for kind in (GroupChosen, GroupRanked, DriftFound, RoundEnded, RewardModelRefreshed):
            assert disk.of(kind) == whole.of(kind), (dies_at, kind)
