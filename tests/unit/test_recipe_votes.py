"""Votes in every shape become the same groups, and a run's own votes are data too."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_files import write_rows
from synthetic_run import make_run

from rlhf_cli.errors import DataError
from rlhf_cli.journal.events import (
    CompletionRecord,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    ItemEnded,
    RunStarted,
    StageStarted,
    VotesLate,
)
from rlhf_cli.journal.journal import Journal, read
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.journal.votes import read_run_votes
from rlhf_cli.recipe.data import read_voted_groups
from rlhf_cli.recipe.rows import Wrong
from rlhf_cli.recipe.votes import VotedGroup, rated_wins, voted_row
from rlhf_cli.types import WinMatrix

ABC = {"prompt": "p", "completions": ["a", "b", "c"]}


def read_rows(tmp_path: Path, *rows: object) -> list[VotedGroup]:
    return read_voted_groups(write_rows(tmp_path / "votes.jsonl", rows))


def test_votes_one_by_one_are_the_matrix_they_add_up_to(tmp_path: Path) -> None:
    votes = [
        {"rater": "ann", "better": 0, "worse": 1},
        {"rater": "bob", "better": 0, "worse": 1},
        {"rater": "ann", "tie": [2, 1]},
        {"better": 2, "worse": 0},
    ]
    one, other = read_rows(
        tmp_path, {**ABC, "votes": votes}, {**ABC, "wins": [[0, 2, 0], [0, 0, 0.5], [1, 0.5, 0]], "source": "forum"}
    )
    assert one.wins == other.wins
    assert (one.source, other.source) == ("votes", "forum")
    assert one.rater_wins == (
        WinMatrix([[0, 1, 0], [0, 0, 0.5], [0, 0.5, 0]]),
        WinMatrix([[0, 1, 0], [0, 0, 0], [0, 0, 0]]),
        WinMatrix([[0, 0, 0], [0, 0, 0], [1, 0, 0]]),
    )
    assert other.rater_wins == ()
    assert (one.where, other.where) == ("votes.jsonl:1", "votes.jsonl:2")


def test_the_shape_of_pandalm_is_taken_as_it_is(tmp_path: Path) -> None:
    cast = [{"annotator": f"annotator{n}", "choice": choice} for n, choice in enumerate(["1", 1, "2", "tie"])]
    (group,) = read_rows(tmp_path, {"prompt": "p", "response_1": "yes", "response_2": True, "votes": cast})
    assert (group.completions, group.wins) == (("yes", "true"), WinMatrix([[0, 2.5], [1.5, 0]]))
    assert len(group.rater_wins) == 4


def test_whole_conversations_that_part_at_their_last_turn_are_a_pair_with_its_prompt(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    ask, good, bad = (
        {"role": r, "content": c} for r, c in [("user", "Why?"), ("assistant", "So."), ("assistant", "No")]
    )

    (group,) = read_rows(tmp_path, {"chosen": [*talk, ask, good], "rejected": [*talk, ask, bad]})

    assert [m.content for m in group.prompt] == ["Hi.", "Hello.", "Why?"]
    assert group.completions == ("So.", "No")
    with pytest.raises(DataError, match="do not part at their last turn alone"):
        read_rows(tmp_path, {"chosen": [*talk, ask, good], "rejected": [ask, bad]})


def test_ratings_become_votes_by_hand() -> None:
    # Of the pairs of a rating of the first and one of the second, 2 v 1, 2 v 2, 2 v 3, 0 v 1, 0 v 2, 0 v 3: one is a
    # win, one a tie, four are lost. 1.5 / 6 of two votes, because only two people rated the first.
    assert rated_wins([[2, 0], [1, 2, 3]]) == WinMatrix([[0, 0.5], [1.5, 0]])


@given(st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=9), min_size=2, max_size=5))
def test_ratings_give_each_pair_as_many_votes_as_the_smaller_crowd(ratings: list[list[int]]) -> None:
    wins = rated_wins(ratings).wins
    raters = np.array([len(row) for row in ratings])
    expected = np.minimum.outer(raters, raters) * (1 - np.eye(len(ratings)))
    assert np.allclose(wins + wins.T, expected)


def snippets(number: int, domain: str = "films") -> list[dict[str, Any]]:
    return [{"text": f"{domain} {n}", "ratings": [n, n + 1], "domain": domain, "mean": n} for n in range(number)]


@pytest.mark.parametrize(("number", "sizes"), [(2, [2]), (8, [8]), (9, [9]), (10, [8, 2]), (17, [8, 9]), (24, [8] * 3)])
def test_rated_texts_are_compared_in_groups_of_eight(tmp_path: Path, number: int, sizes: list[int]) -> None:
    groups = read_rows(tmp_path, *snippets(number))
    assert [len(g.completions) for g in groups] == sizes
    assert sorted(text for g in groups for text in g.completions) == sorted(row["text"] for row in snippets(number))


def test_rated_texts_stay_within_their_domain_and_their_order_does_not_matter(tmp_path: Path) -> None:
    rows = snippets(20) + snippets(11, "books")
    groups = read_rows(tmp_path, *rows)
    random.Random(0).shuffle(rows)
    assert {g.source for g in groups} == {"films", "books"}
    for group in groups:
        assert all(text.startswith(group.source) for text in group.completions)
        assert group.ratings == tuple((float(t.split()[1]), float(t.split()[1]) + 1) for t in group.completions)
        assert group.prompt == ()
    again = read_rows(tmp_path, *rows)
    assert sorted(g.key for g in again) == sorted(g.key for g in groups)
    assert len({g.key for g in groups}) == len(groups)


def test_groups_of_one_prompt_have_one_key(tmp_path: Path) -> None:
    pair = {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": "p", **pair}, {"prompt": "p", "chosen": "c", "rejected": "d"}, {"prompt": "q", **pair}]
    one, same, other = (g.key for g in read_rows(tmp_path, *rows))
    assert one == same != other


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ABC, "votes": []}, "'votes' holds no vote"),
        ({**ABC, "votes": {"better": 0, "worse": 1}}, "'votes' has to be a list"),
        ({**ABC, "votes": [{"rater": "x", "better": 0}]}, "vote 1 has to name two completions by their number, 0 to 2"),
        (
            {**ABC, "votes": [{"better": 0, "worse": 1}, {"better": 0, "worse": 3}]},
            "vote 2 has to name two completions",
        ),
        ({**ABC, "votes": [{"better": True, "worse": 0}]}, "vote 1 has to name two completions"),
        ({**ABC, "votes": [{"better": 1, "worse": 1}]}, "vote 1 compares completion 1 with itself"),
        ({**ABC, "votes": [{"tie": [1]}]}, "vote 1 has to be {"),
        ({**ABC, "votes": [{"tie": [0, 1], "better": 0}]}, "vote 1 has to be {"),
        ({**ABC, "votes": ["ann"]}, "vote 1 has to be {"),
        ({**ABC, "votes": [{"rater": 1.5, "better": 0, "worse": 1}]}, "'rater' of vote 1 has to be text"),
        ({"prompt": "p", "response_1": "a", "response_2": "b"}, "'votes' is missing"),
        ({"prompt": "p", "response_1": "a", "votes": [{"choice": "1"}]}, "'response_2' is missing"),
        ({"prompt": "p", "response_1": "a", "response_2": "b", "votes": [{"choice": "3"}]}, "vote 1 has to be {"),
        ({"text": "a", "ratings": []}, "'ratings' holds no rating"),
        ({"text": "a", "ratings": [1, "2"]}, "'ratings' holds numbers, one per rater"),
        ({"text": "a", "ratings": [1, True]}, "'ratings' holds numbers, one per rater"),
        ({"ratings": [1]}, "'text' is missing"),
        ({"text": "", "ratings": [1]}, "'text' is empty"),
        ({"text": "a", "ratings": [1], "domain": 3}, "'domain' has to be text"),
        ({**ABC, "wins": "[[0, 1"}, "'wins' is not valid JSON"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "source": 1}, "'source' has to be text"),
    ],
)
def test_a_mistake_in_a_row_of_votes_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(Wrong) as caught:
        voted_row(row)
    assert str(caught.value).startswith(said)


def test_a_text_without_company_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"votes\.jsonl:3: is the only text of its domain and prompt"):
        read_rows(tmp_path, *snippets(2), *snippets(1, "books"))


def test_a_table_may_hold_lists_as_text_and_empty_cells(tmp_path: Path) -> None:
    lists = {"completions": ["a", "b"], "wins": [[0, 1], [2, 0]]}
    as_text = {key: json.dumps(value) for key, value in lists.items()}
    empty = {"chosen": None, "rejected": None, "votes": None, "ratings": None, "source": None}
    plain, table = read_rows(tmp_path, {"prompt": "p", **lists}, {"prompt": "p", **as_text, **empty})
    assert plain == table


def test_what_votes_export_wrote_has_one_source(tmp_path: Path) -> None:
    rows = [{**ABC, "wins": [[0, 1, 0]] + [[0] * 3] * 2, "votes": 1.0, "source": f"item:{n}"} for n in range(2)]
    assert {g.source for g in read_rows(tmp_path, *rows)} == {"votes"}


def test_every_group_that_people_voted_on_in_a_run_comes_back_with_all_their_votes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    voted = [g for g in replay(read(run.journal)).groups.values() if g.ranked is not None or g.late or g.ended]
    groups = read_run_votes(run.path)

    assert len(voted) > 10
    assert [g.completions for g in groups] == [tuple(c.text for c in g.sampled.completions) for g in voted]
    for group, known in zip(groups, voted, strict=True):
        late = sum(event.matrix().votes for event in known.late)
        assert group.wins.votes == (known.ranked.matrix().votes if known.ranked else 0) + late
    assert {g.source for g in groups} == {"kind-everyday"}
    assert groups[0].where == f"run/{voted[0].sampled.group_id}"


def test_votes_that_no_step_could_use_are_still_data_for_a_reward_model(tmp_path: Path) -> None:
    """Each once: `late` comes after the decision, `dropped` was set aside, `model` was decided in people's place."""
    first, more = ((0.0, 2.0), (1.0, 0.0)), ((0.0, 0.0), (3.0, 0.0))
    records = tuple(CompletionRecord(text=t, token_ids=(1,), logps="", ref_logps="", ended=True) for t in "ab")

    def sampled(name: str, index: int) -> GroupSampled:
        return GroupSampled(
            group_id=name,
            index=index,
            prompt_id=name,
            messages=(("user", name),),
            prompt_ids=(1,),
            completions=records,
            policy_step=0,
        )

    def ranked(name: str, source: str) -> GroupRanked:
        return GroupRanked(group_id=name, source=source, wins=first, latency_s=1.0, complete=True)

    with Journal.open(RunDir(tmp_path).create().journal) as journal:
        for event in (
            RunStarted(run_id="r", name="n", seed=1, version="0"),
            StageStarted(stage="run-online", fingerprint="f", attempt=1),
            *(sampled(name, n) for n, name in enumerate(["late", "dropped", "model", "twice", "none"])),
            ranked("late", "item:1"),
            VotesLate(group_id="late", item_id="1", wins=more),
            ItemEnded(group_id="dropped", item_id="2", state="Incomplete", votes=3, wins=first),
            GroupSetAside(group_id="dropped", reason="3 of 8 votes"),
            VotesLate(group_id="dropped", item_id="2", wins=more),
            ranked("model", "reward_model:v1"),
            ItemEnded(group_id="twice", item_id="4", state="Incomplete", votes=3, wins=first),
            ranked("twice", "item:4+5"),  # of both items, the one before among them
            GroupSetAside(group_id="none", reason="degenerate: all completions are empty"),
            StageStarted(stage="run-online", fingerprint="f", attempt=2),  # --fresh
            sampled("fresh", 0),
            ranked("fresh", "item:6"),
        ):
            journal.append(event)
    both = [[0.0, 2.0], [4.0, 0.0]]
    assert {g.prompt[0].content: g.wins.wins.tolist() for g in read_run_votes(tmp_path)} == {
        "late": both,
        "dropped": both,
        "twice": [list(row) for row in first],
        "fresh": [list(row) for row in first],
    }


def test_a_run_without_votes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run folder, it has no journal\.jsonl"):
        read_run_votes(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(DataError, match="nobody voted in this run"):
        read_run_votes(tmp_path)
