"""A model at once, people for some, a model that learns from them: nothing asked twice, no version made up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hybrid_world import Spelled, World, group, liked
from stream_world import Disk, Killed

from rlhf_cli.errors import RunDamaged
from rlhf_cli.feedback.drift import DriftWatch
from rlhf_cli.feedback.refresh import agreement
from rlhf_cli.journal.events import (
    DriftFound,
    GroupChosen,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    RewardModelRefreshed,
    RoundEnded,
)
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.policy.heads import HEADS, Heads, VotedFeatures
from rlhf_cli.recipe.online import Drift, Refresh, Selection
from rlhf_cli.types import Unranked

GROUPS = 40


def test_people_decide_what_the_chooser_picked_and_the_model_the_rest(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path, refresh=None)
    decided = world.run(GROUPS)
    assert sorted(d.group.index for d in decided) == list(range(GROUPS))
    chosen = {event.group_id: event.people for event in disk.of(GroupChosen)}
    assert 10 <= sum(chosen.values()) <= 30
    for ranked in disk.of(GroupRanked):
        assert ranked.by_people == chosen[ranked.group_id]
        if ranked.by_people:
            assert ranked.matrix() == liked(group(int(ranked.group_id[-6:])))
            assert ranked.scores is None
        else:
            assert ranked.source == "reward_model:v1"
            second = [float(c.text.split()[1]) for c in group(int(ranked.group_id[-6:])).completions]
            assert ranked.scores == pytest.approx(second, abs=1e-6)
            assert ranked.wins[0][1] == pytest.approx(1 / (1 + math.exp(second[1] - second[0])), abs=1e-6)


def test_the_model_answers_at_once_and_people_when_they_have_voted(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path, looks=1000)
    for index in range(10):
        disk.append(GroupSampled.of(group(index)))
        world.feedback.submit(group(index))
    by_model = {d.group.id for d in world.feedback.collect()}
    assert by_model == {event.group_id for event in disk.of(GroupChosen) if not event.people}
    assert world.feedback.with_people == 10 - len(by_model) > 0


def test_the_length_penalty_is_taken_from_the_models_word_and_not_from_what_it_is_compared_by(tmp_path: Path) -> None:
    disk = Disk()
    World(disk, tmp_path, refresh=None, penalty=0.5).run(8)
    ranked = next(event for event in disk.of(GroupRanked) if not event.by_people)
    said = next(event for event in disk.of(GroupChosen) if event.group_id == ranked.group_id)
    texts = [c.text for c in group(int(ranked.group_id[-6:])).completions]
    assert ranked.scores == pytest.approx([s - 0.5 * len(t) for s, t in zip(said.scores, texts, strict=True)])


def test_a_model_that_is_wrong_is_refitted_until_it_agrees_with_people(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path, looks=1)
    world.run(200)
    refits = disk.of(RewardModelRefreshed)
    versions = [event.version for event in refits if event.published]
    assert versions == list(range(2, 2 + len(versions)))
    assert world.feedback.status()["rm/version"] == versions[-1] >= 4
    assert world.feedback.status()["rm/agreement"] > 0.85
    assert world.feedback.status()["rm/heldout_accuracy"] > 0.85
    fresh = [VotedFeatures(n, world.live.features([group(n)])[0], liked(group(n))) for n in range(1000, 1100)]
    assert agreement(world.live.first, fresh) < 0.65
    assert agreement(world.live.heads, fresh) > 0.9
    sources = [event.source for event in disk.of(GroupRanked) if not event.by_people]
    assert sources[0] == "reward_model:v1"
    numbers = [int(source.removeprefix("reward_model:v")) for source in sources]
    assert numbers == sorted(numbers)
    assert numbers[-1] == versions[-1]
    assert any("is version 2 now" in note for note in world.notes)


def test_a_version_is_published_only_if_it_agrees_no_less_with_votes_that_neither_learned_from(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path)
    world.run(200)
    known, order = 0, [event.group_id for event in disk.of(GroupRanked) if event.by_people]
    for event in disk.of(RewardModelRefreshed):
        assert event.published == (event.accuracy_after >= event.accuracy_before)
        fresh = order[known : event.groups]
        assert set(event.heldout) <= set(fresh)
        assert len(fresh) >= 5
        assert len(event.heldout) == max(1, round(0.4 * len(fresh)))
        known = event.groups


def learned_from(world: World) -> list[str]:
    """Filled with the groups of every refit from here on."""
    assert world.refresher is not None
    refit, learned = world.refresher._refit, list[str]()

    def noted(first: Heads, voted: Sequence[VotedFeatures], temperature: float) -> Heads:
        learned[:] = [group(v.index).id for v in voted]
        return refit(first, voted, temperature)

    world.refresher._refit = noted
    return learned


def test_what_is_held_out_is_learned_from_only_when_it_is_no_longer_fresh(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path)
    learned, before = learned_from(world), set[str]()
    for upto in range(1, 60):
        world.run(upto)
        refits = disk.of(RewardModelRefreshed)
        if refits and set(refits[-1].heldout) != before:
            assert not set(refits[-1].heldout) & set(learned)
            assert before <= set(learned)
            before = set(refits[-1].heldout)
    assert len(disk.of(RewardModelRefreshed)) > 2


def test_a_refit_that_agrees_less_is_thrown_away(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path)
    assert world.refresher is not None
    world.refresher._refit = lambda first, voted, temperature: Heads(-first.weight, first.bias)
    world.live.first = world.live.heads = Heads(np.eye(4)[:1], np.zeros(1))  # what people like
    world.run(60)
    refits = disk.of(RewardModelRefreshed)
    assert refits
    assert not any(event.published for event in refits)
    assert all((event.accuracy_before, event.accuracy_after) == (1.0, 0.0) for event in refits)
    assert world.live.version == 1
    assert not RunDir(tmp_path).reward_model_versions.exists()
    assert world.feedback.status()["rm/heldout_accuracy"] == 1.0


def test_late_votes_reach_the_reward_model(tmp_path: Path) -> None:
    seen: list[float] = []
    for late in (0.0, 3.0):
        world = World(Disk(), tmp_path / str(late), late=late)
        assert world.refresher is not None
        world.run(30)
        world.refresher._take_note()
        seen.append(sum(float(wins.sum()) for wins in world.refresher._wins.values()))
    assert seen[1] == pytest.approx(seen[0] * (4 + 3) / 4)


def test_agreement_is_of_what_the_model_said_before_people_did(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path)
    world.run(GROUPS)
    said = {event.group_id: event.scores for event in disk.of(GroupChosen)}
    agreed = votes = 0.0
    for event in disk.of(GroupRanked):
        if event.by_people:
            scores = np.array(said[event.group_id])
            agreed += float((event.matrix().wins * (scores[:, None] > scores[None, :])).sum())
            votes += event.matrix().votes
    assert world.feedback.status()["rm/agreement"] == pytest.approx(agreed / votes)
    again = World(disk, tmp_path)
    assert again.feedback.status()["rm/agreement"] == pytest.approx(agreed / votes)


def test_agreement_on_groups_drawn_at_random_is_a_figure_of_its_own_also_after_a_kill(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path, selection=Selection(share=0.5, random_share=0.4))
    world.run(GROUPS)
    blind = {event.group_id: event.scores for event in disk.of(GroupChosen) if event.why == "random"}
    agreed = votes = 0.0
    for event in disk.of(GroupRanked):
        if event.by_people and event.group_id in blind:
            scores = np.array(blind[event.group_id])
            agreed += float((event.matrix().wins * (scores[:, None] > scores[None, :])).sum())
            votes += event.matrix().votes
    for known in (world, World(disk, tmp_path, selection=Selection(share=0.5, random_share=0.4))):
        status = known.feedback.status()
        assert status["rm/agreement_random"] == pytest.approx(agreed / votes)
        assert status["rm/agreement_random"] != pytest.approx(status["rm/agreement"])


def test_too_few_votes_that_the_policy_dropped_reach_the_model_and_no_figure_also_after_a_kill(tmp_path: Path) -> None:
    disk = Disk()
    World(disk, tmp_path).run(GROUPS)
    figures = [World(disk, tmp_path).feedback.status()]
    dropped = group(GROUPS)
    scores = (0.0, 1.0, 2.0)
    disk.append(GroupSampled.of(dropped))
    disk.append(GroupChosen(group_id=dropped.id, people=True, why="random", scores=scores))
    disk.append(GroupIntended(group_id=dropped.id, key="k"))
    disk.append(GroupSetAside(group_id=dropped.id, reason="only 1 of at least 4 votes on item i"))
    rows = ((0.0, 9.0, 9.0), (0.0, 0.0, 9.0), (0.0, 0.0, 0.0))  # all against the model
    disk.append(GroupRanked(group_id=dropped.id, source="item:i", wins=rows, latency_s=1.0, complete=False))
    figures.append(World(disk, tmp_path).feedback.status())
    assert figures[1]["rm/agreement"] == figures[0]["rm/agreement"]
    assert figures[1]["rm/replay_groups"] == figures[0]["rm/replay_groups"] + 1


def test_a_budget_that_is_spent_leaves_everything_to_the_model(tmp_path: Path) -> None:
    disk = Disk()
    most = 12.0  # of a group, where people give as many votes as they did here

    def affords(groups: int) -> bool:
        return world.people.votes + groups * most <= 40

    world = World(disk, tmp_path, looks=1, affords=lambda groups: affords(groups))
    decided = world.run(GROUPS)
    assert len(decided) == GROUPS
    assert len(disk.of(GroupIntended)) == 3
    assert world.people.votes == 36
    assert {event.why for event in disk.of(GroupChosen)} >= {"budget"}


def test_scores_that_are_no_numbers_are_no_labels_and_cost_nothing(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path)
    broken = group(0)
    broken = replace(broken, completions=(replace(broken.completions[0], text="nan 0 0 0"), *broken.completions[1:]))
    broken = replace(broken, completions=(replace(broken.completions[0], text="0 nan 0 0"), *broken.completions[1:]))
    disk.append(GroupSampled.of(broken))
    world.feedback.submit(broken)
    (unranked,) = world.feedback.collect()
    assert isinstance(unranked, Unranked)
    assert "not a number" in unranked.reason
    assert not disk.of(GroupIntended)
    assert not disk.state().open_groups


def final(world: World, disk: Disk) -> tuple[object, ...]:
    """What must not depend on whether the process died: choices, labels and versions."""
    state = disk.state()
    labels = {g.sampled.index: (g.ranked.source, g.ranked.wins) for g in state.groups.values() if g.ranked is not None}
    chosen = {g.sampled.index: g.chosen.why for g in state.groups.values() if g.chosen is not None}
    return labels, chosen, world.live.version, world.live.heads.to_bytes()


@pytest.mark.parametrize("late", [0.0, 2.0])
def test_whenever_the_process_dies_the_next_one_goes_on_with_the_same_choices_and_versions(
    tmp_path: Path, late: float
) -> None:
    whole = Disk()
    world = World(whole, tmp_path / "whole", looks=1, late=late)
    world.run(30)
    wanted = final(world, whole)
    assert world.live.version > 2
    for dies_at in range(1, len(whole.entries)):
        disk, folder = Disk(dies_at=dies_at), tmp_path / str(dies_at)
        with pytest.raises(Killed):
            World(disk, folder, looks=1, late=late).run(30)
        disk.dies_at = None
        before = {event.group_id: event for event in disk.of(GroupChosen)}
        world = World(disk, folder, looks=1, late=late)
        world.run(30)
        chosen = disk.of(GroupChosen)
        assert len({event.group_id for event in chosen}) == len(chosen) == 30
        assert all(event in chosen for event in before.values())
        intended = disk.of(GroupIntended)
        assert len({event.group_id for event in intended}) == len(intended)
        ranked = disk.of(GroupRanked)
        assert len({event.group_id for event in ranked}) == len(ranked) == 30
        for event in disk.of(RewardModelRefreshed):
            if event.published:
                data = (folder / event.path).read_bytes()
                assert hashlib.sha256(data).hexdigest() == event.sha256
        assert final(world, disk) == wanted


def test_a_version_that_was_damaged_is_not_used(tmp_path: Path) -> None:
    disk = Disk()
    World(disk, tmp_path).run(GROUPS)
    version = next(event.version for event in disk.of(RewardModelRefreshed) if event.published)
    path = RunDir(tmp_path).reward_model_versions / f"v{version}" / HEADS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunDamaged, match=f"not what was published as version {version}"):
        World(disk, tmp_path)
    path.unlink()
    with pytest.raises(RunDamaged, match="cannot be read"):
        World(disk, tmp_path)


def test_heads_are_calibrated_by_the_temperature_of_the_model(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path, refresh=None, model=Spelled(temperature=0.5), selection=Selection(share=0.01))
    disk.append(GroupSampled.of(group(1)))
    world.feedback.submit(group(1))
    (ranked,) = disk.of(GroupRanked)
    second = [float(c.text.split()[1]) for c in group(1).completions]
    assert ranked.scores == pytest.approx([2 * s for s in second], abs=1e-6)


def test_an_ensemble_is_refitted_head_by_head(tmp_path: Path) -> None:
    disk = Disk()
    world = World(disk, tmp_path, model=Spelled(heads=4), refresh=Refresh(every_groups=5))
    world.run(60)
    assert world.live.version > 1
    assert world.live.heads.weight.shape == (4, 4)
    assert world.live.heads.weight.std(0).min() > 0
    scored = world.live.score(group(99))
    assert scored.spread is not None
    assert (scored.spread > 0).all()


@pytest.mark.parametrize("refitted", [False, True])
def test_a_refit_that_a_targeted_round_asked_for_is_done_once_whatever_dies(tmp_path: Path, refitted: bool) -> None:
    disk = Disk()
    disk.append(DriftFound(cluster=0, z=4.0, before=0.1, now=0.4, groups=4, outdated=()))
    disk.append(RoundEnded(cluster=0))
    if refitted:
        disk.append(
            RewardModelRefreshed(
                version=1, published=False, groups=0, heldout=(), accuracy_before=0.5, accuracy_after=0.4
            )
        )
    watch = DriftWatch(Drift(), lambda prompt: 0)
    World(disk, tmp_path, watch=watch)
    assert watch.refit_due is not refitted


def test_a_round_that_ended_does_not_wait_for_as_many_groups_as_a_refit_else_needs(tmp_path: Path) -> None:
    disk, watch = Disk(), DriftWatch(Drift(), lambda prompt: 0)
    world = World(disk, tmp_path, looks=1, refresh=Refresh(every_groups=1000), watch=watch)
    world.run(12)
    assert not disk.of(RewardModelRefreshed)
    by_people = [event.group_id for event in disk.of(GroupRanked) if event.by_people]
    watch.outdated.add(by_people[0])
    watch.refit_due = True
    learned = learned_from(world)
    world.feedback.collect()
    (event,) = disk.of(RewardModelRefreshed)
    assert len(event.heldout) >= 1
    assert sorted([*learned, *event.heldout, by_people[0]]) == sorted(by_people)
    assert not watch.refit_due
    world.feedback.collect()
    assert len(disk.of(RewardModelRefreshed)) == 1
