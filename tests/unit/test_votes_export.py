"""Votes as rows for other tools: nothing lost, nothing invented, nothing that a terminal or a spreadsheet obeys."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import DataError
from rlhf_cli.flow.bodies import keep_bodies
from rlhf_cli.journal.events import (
    CompletionRecord,
    Event,
    GroupIntended,
    GroupRanked,
    GroupSampled,
    GroupSetAside,
    GroupSubmitted,
    ItemEnded,
    RunStarted,
    StageStarted,
    StepTrained,
    VotesLate,
)
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.data import read_voted_groups
from rlhf_cli.stages.votes_export import as_text, export

TEXTS = ("=HYPERLINK(1)", 'two "lines",\nand \x1b[31m\x7f', "@sum", "")
WINS = ((0.0, 3.0, 0.0, 0.0), (1.0, 0.0, 1.5, 0.0), (0.0, 1.5, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))


def sampled(name: str, index: int = 0, messages: tuple[tuple[str, str], ...] = (("user", "-1+1?"),)) -> GroupSampled:
    records = tuple(CompletionRecord(text=t, token_ids=(1,), logps="", ref_logps="", ended=True) for t in TEXTS)
    return GroupSampled(
        group_id=name,
        index=index,
        prompt_id=f"p{index}",
        messages=messages,
        prompt_ids=(1,),
        completions=records,
        policy_step=0,
    )


def ranked(name: str, source: str = "item:i") -> GroupRanked:
    return GroupRanked(group_id=name, source=source, wins=WINS, latency_s=2.0, complete=True)


def begun(attempt: int = 1) -> StageStarted:
    return StageStarted(stage="run-online", fingerprint="f", attempt=attempt)


def run_of(folder: Path, *events: Event) -> Path:
    with Journal.open(RunDir(folder).create().journal) as journal:
        journal.append(RunStarted(run_id="r", name="n", seed=1, version="0"))
        for event in events:
            journal.append(event)
    return folder


def test_a_matrix_says_where_its_votes_came_from_and_what_became_of_them(tmp_path: Path) -> None:
    late = VotesLate(group_id="b", item_id="i", wins=((0, 1, 0, 0), (0,) * 4, (0,) * 4, (0,) * 4))
    run = run_of(
        tmp_path,
        begun(),
        sampled("a"),
        ranked("a"),
        StepTrained(step=1, group_ids=("a",)),
        sampled("b", 1, (("system", "Be kind."), ("user", "Why?"))),
        ItemEnded(group_id="b", item_id="i", state="Incomplete", votes=7, wins=WINS),
        GroupSetAside(group_id="b", reason="only 7 of 8 votes"),
        late,
        sampled("c", 2),
        GroupSetAside(group_id="c", reason="no votes"),
    )
    a, b = export(run, "matrices")
    assert (a["group_id"], a["prompt"], a["completions"], a["wins"]) == ("a", "-1+1?", list(TEXTS), [*map(list, WINS)])
    assert (a["votes"], a["source"], a["complete"], a["trained_step"], a["set_aside"]) == (7, "item:i", True, 1, None)
    assert b["prompt"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    assert (b["votes"], b["complete"], b["trained_step"], b["set_aside"]) == (7, False, None, "only 7 of 8 votes")
    assert b["late_wins"][0] == [0, 1, 0, 0]


def test_preferences_have_a_majority_and_its_count(tmp_path: Path) -> None:
    run = run_of(tmp_path, begun(), sampled("a"), ranked("a"))
    (row,) = export(run, "preferences")  # the tie of 1 and 2 makes none, the pairs nobody saw make none
    assert row["prompt"] == [{"role": "user", "content": "-1+1?"}]
    assert row["chosen"] == [{"role": "assistant", "content": TEXTS[0]}]
    assert row["rejected"] == [{"role": "assistant", "content": TEXTS[1]}]
    assert (row["votes_chosen"], row["votes_rejected"]) == (3, 1)
    pairs = export(run, "pairs")
    assert [(p["i"], p["j"], p["wins_i"], p["wins_j"]) for p in pairs] == [(0, 1, 3, 1), (1, 2, 1.5, 1.5)]


def test_what_a_model_said_in_place_of_people_is_no_preference_of_theirs(tmp_path: Path) -> None:
    run = run_of(tmp_path, begun(), sampled("a"), ranked("a", "reward_model:train_rm"))
    assert export(run, "preferences") == export(run, "pairs") == []
    assert export(run, "matrices")[0]["source"] == "reward_model:train_rm"


@pytest.mark.parametrize("view", ["matrices", "preferences"])
def test_json_lines_train_a_reward_model_as_they_are(tmp_path: Path, view: Any) -> None:
    run = run_of(tmp_path / "run", begun(), sampled("a"), ranked("a"))
    file = tmp_path / "votes.jsonl"
    file.write_text(as_text(export(run, view), "jsonl"))
    (group,) = read_voted_groups(file)
    assert group.completions == (TEXTS if view == "matrices" else TEXTS[:2])


def test_json_lines_are_exact_and_hold_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    text = as_text(export(run_of(tmp_path, begun(), sampled("a"), ranked("a")), "matrices"), "jsonl")
    assert text.isascii()
    assert "\x1b" not in text
    assert "\x7f" not in text
    assert json.loads(text)["completions"] == list(TEXTS)


@pytest.mark.parametrize("view", ["matrices", "pairs", "preferences"])
def test_no_cell_of_a_csv_file_is_a_formula(tmp_path: Path, view: Any) -> None:
    rows = export(run_of(tmp_path, begun(), sampled("a"), ranked("a")), view)
    back = list(csv.DictReader(io.StringIO(as_text(rows, "csv"))))
    assert len(back) == len(rows)
    cells = [cell for row in back for cell in row.values()]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    assert not [cell for cell in cells if "\x1b" in cell or "\x7f" in cell]
    if view == "pairs":
        assert back[0]["completion_i"] == f"'{TEXTS[0]}"
        assert back[0]["prompt"] == "'-1+1?"


def test_votes_of_attempts_that_were_given_up_are_there_too(tmp_path: Path) -> None:
    run = run_of(tmp_path, begun(1), sampled("a"), ranked("a"), begun(2), sampled("b"), ranked("b"), sampled("c", 1))
    assert [(row["group_id"], row["attempt"]) for row in export(run, "matrices")] == [("a", 1), ("b", 2)]


def test_a_run_that_was_killed_in_the_middle_of_a_line_is_read_and_left_alone(tmp_path: Path) -> None:
    run = run_of(tmp_path, begun(), sampled("a"), ranked("a"))
    journal = RunDir(run).journal
    journal.write_bytes(journal.read_bytes() + b'{"crc":"0000')
    before = journal.read_bytes()
    assert len(export(run, "matrices")) == 1
    assert journal.read_bytes() == before


def test_raw_votes_of_another_server_come_from_what_it_said(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        begun(),
        sampled("a"),
        GroupIntended(group_id="a", key="k"),
        GroupSubmitted(group_id="a", dataset_id="d", item_id="i"),
        ranked("a"),
    )
    with pytest.raises(DataError, match="--as matrices"):
        export(run, "votes")
    vote = {"rater": "r1", "simulated": False, "left": 2, "right": 0, "outcome": "left", "responseMs": 900}
    page = {"total": 1, "page": 1, "pageSize": 1000, "items": [{**vote, "counts": True, "createdAt": "2026-01-01"}]}
    votes: list[Any] = page["items"]
    more = {**page, "items": [*votes, {**votes[0], "rater": "r2", "late": True}]}
    keep = keep_bodies(RunDir(run).flow_bodies)
    for said in (page, more):  # what came late shows when it is read again
        keep("votes", "i", json.dumps(said).encode())
    keep("vote-matrix", "i", b"<html>")
    row, late = export(run, "votes")
    assert (row["group_id"], row["item_id"], row["rater"], row["left"], row["right"]) == ("a", "i", "r1", 2, 0)
    assert (row["response_ms"], row["at"], row["late"]) == (900, "2026-01-01", False)
    assert (late["rater"], late["late"]) == ("r2", True)

    with RunDir(run).flow_bodies.open("a") as file:
        file.write('{"at"')  # killed in the middle of a line, then resumed
    keep("votes", "i", json.dumps(page).encode())
    assert export(run, "votes") == [row]


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "[]",
        '{"items": [{"=1+1": 1}]}',
        '{"items": [{"rater": "r", "left": 9, "right": 0, "outcome": "left", "counts": true, "createdAt": ""}]}',
        '{"items": [{"rater": "r", "left": -1, "right": 0, "outcome": "left", "counts": true, "createdAt": ""}]}',
    ],
)
def test_raw_votes_that_make_no_sense_are_no_votes(tmp_path: Path, body: str) -> None:
    run = run_of(
        tmp_path,
        begun(),
        sampled("a"),
        GroupIntended(group_id="a", key="k"),
        GroupSubmitted(group_id="a", dataset_id="d", item_id="i"),
        ranked("a"),
    )
    keep = keep_bodies(RunDir(run).flow_bodies)
    keep(
        "votes",
        "other",
        b'{"items": [{"rater": "r", "left": 0, "right": 1, "outcome": "left", "counts": true, "createdAt": ""}]}',
    )
    keep("votes", "i", body.encode())
    assert export(run, "votes") == []


def test_what_a_model_said_is_nobodys_vote_after_a_replay_either(tmp_path: Path) -> None:
    run = run_of(tmp_path, begun(), sampled("a"), ranked("a", "recorded:r/reward_model:train_rm"))
    assert export(run, "pairs") == export(run, "preferences") == []
    (row,) = export(run, "matrices")
    assert row["source"] == "recorded:r/reward_model:train_rm"


def test_a_folder_without_a_journal_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"journal\.jsonl"):
        export(tmp_path, "pairs")
