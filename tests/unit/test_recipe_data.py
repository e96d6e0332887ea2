"""Data files: what they may hold, and how a mistake in one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_files import write_recipe, write_rows

from rlhf_cli.errors import DataError
from rlhf_cli.recipe.data import check_files, read_conversations, read_prompts, read_voted_groups
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.types import Message, Prompt, WinMatrix

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def complaint(read: Callable[[Path], object], *lines: str | bytes) -> str:
    path = Path("data.jsonl")
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def test_prompts_are_text_or_conversations_and_get_an_id_when_they_have_none() -> None:
    rows = [{"prompt": "Hi", "split": "train"}, {"prompt": [SYSTEM, USER, ANSWER, USER], "id": 7}]
    assert read_prompts(write_rows(Path("p.jsonl"), rows)) == [
        Prompt("p-1", (Message("user", "Hi"),)),
        Prompt("7", tuple(Message(m["role"], m["content"]) for m in (SYSTEM, USER, ANSWER, USER))),
    ]


def test_conversations_come_in_three_shapes() -> None:
    chats = write_rows(Path("c.jsonl"), [{"messages": [USER, ANSWER]}, {"prompt": "Hi", "completion": "Hello"}])
    assert read_conversations(chats)[0].rows == [(Message("user", "Hi"), Message("assistant", "Hello"))] * 2
    assert read_conversations(write_rows(Path("t.jsonl"), [{"text": "A story."}]))[0].rows == ["A story."]


def test_votes_come_as_pairs_or_as_a_matrix() -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": ""},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "What"}]},
        {"prompt": "Hi", "completions": ["a", "b", "c"], "wins": [[0, 2.5, 1], [0.5, 0, 0], [0, 1, 0]]},
    ]
    pair, messages, matrix = read_voted_groups(write_rows(Path("v.jsonl"), rows))
    assert (pair.completions, pair.wins) == (("Hello", ""), WinMatrix([[0, 1], [0, 0]]))
    assert messages.completions == ("Hello", "What")
    assert matrix.prompt == (Message("user", "Hi"),)
    assert matrix.wins.votes == 5


def test_blank_lines_windows_ends_and_a_byte_order_mark_are_fine() -> None:
    Path("p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    assert [p.id for p in read_prompts(Path("p.jsonl"))] == ["p-1", "p-4"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON: Expecting property name"),
        ("[1]", "expected a JSON object"),
        ('{"prompt": NaN}', "NaN is not JSON"),
        ('{"prompt": -Infinity}', "-Infinity is not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text"),
        (r'{"prompt": "\ud800"}', "'prompt' holds half of a character"),
        ("{}", "'prompt' is missing"),
        ('{"prompt": 3}', "'prompt' has to be text or a list of turns"),
        ('{"prompt": []}', "'prompt' has to be text or a list of turns"),
        ('{"prompt": "  "}', "'prompt' is empty"),
        ('{"prompt": ["Hi"]}', "turn 1 of 'prompt' has to be {"),
        ('{"prompt": [{"role": "robot", "content": "Hi"}]}', "turn 1 of 'prompt' has to be {"),
        ('{"prompt": [{"role": "user"}]}', "the content of turn 1 of 'prompt' has to be text"),
        (json.dumps({"prompt": [USER, SYSTEM]}), "turn 2 of 'prompt' is the system's"),
        (json.dumps({"prompt": [USER, ANSWER]}), "'prompt' has to end with the user's turn"),
        ('{"prompt": "Hi", "id": true}', "'id' has to be text"),
    ],
)
def test_a_mistake_in_a_prompt_is_named_with_its_line(line: str | bytes, said: str) -> None:
    assert complaint(read_prompts, '{"prompt": "fine"}', "", line).startswith(f"data.jsonl:3: {said}")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER]}, "'messages' has to end with the assistant's turn"),
        ({"messages": "Hi"}, "'messages' has to be a list of turns"),
        ({"prompt": "Hi"}, "'completion' is missing"),
        ({"prompt": "Hi", "completion": ""}, "'completion' is empty"),
        ({"text": "a", "messages": [USER, ANSWER]}, "expected one of"),
        ({"words": "a"}, "expected one of"),
        ({"text": "raw"}, "raw text and conversations in one file"),
    ],
)
def test_a_mistake_in_a_conversation_is_named_with_its_line(row: object, said: str) -> None:
    assert complaint(read_conversations, json.dumps({"messages": [USER, ANSWER]}), json.dumps(row)).startswith(
        f"data.jsonl:2: {said}"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
        ({"prompt": "Hi", "chosen": "a"}, "'rejected' is missing"),
        (
            {"prompt": "Hi", "chosen": [USER], "rejected": "b"},
            "'chosen' has to be text or a list of one assistant turn",
        ),
        ({"prompt": "Hi", "completions": ["a"], "wins": [[0]]}, "'completions' has to be a list of at least two texts"),
        ({"prompt": "Hi", "completions": ["a", 1], "wins": [[0, 1], [0, 0]]}, "completion 2 has to be text"),
        ({"prompt": "Hi", "completions": ["a", "b"]}, "'wins' has to be a square list"),
        ({"prompt": "Hi", "completions": ["a", "b"], "wins": [[0, 1]]}, "'wins' has to be a square list"),
        (
            {"prompt": "Hi", "completions": ["a", "b", "c"], "wins": [[0, 1], [0, 0]]},
            "'wins' is 2 x 2 for 3 completions",
        ),
        ({"prompt": "Hi", "completions": ["a", "b"], "wins": [[0, -1], [0, 0]]}, "'wins' holds counts of votes"),
        ({"prompt": "Hi", "completions": ["a", "b"], "wins": [[0, True], [0, 0]]}, "'wins' holds counts of votes"),
        (
            {"prompt": "Hi", "completions": ["a", "b"], "wins": [[1, 1], [0, 0]]},
            "a completion cannot win against itself",
        ),
        ({"prompt": "Hi", "completions": ["a", "b"], "wins": [[0, 0], [0, 0]]}, "'wins' holds no vote"),
    ],
)
def test_a_mistake_in_a_voted_group_is_named_with_its_line(row: object, said: str) -> None:
    assert complaint(read_voted_groups, json.dumps(row)).startswith(f"data.jsonl:1: {said}")


@pytest.mark.parametrize("read", [read_prompts, read_conversations, read_voted_groups])
def test_a_file_without_rows_is_refused(read: Callable[[Path], object]) -> None:
    assert complaint(read, "", "  ") == "data.jsonl: holds no rows"


def test_an_id_used_twice_is_named_with_both_lines() -> None:
    rows = [
        '{"prompt": "a", "id": "x"}',
        '{"prompt": "b"}',
        '{"prompt": "c", "id": "x"}',
        '{"prompt": "d", "id": "data-2"}',
    ]
    assert complaint(read_prompts, *rows).splitlines() == [
        "data.jsonl:3: id 'x' is used in line 1 already",
        "data.jsonl:4: id 'data-2' is used in line 2 already",
    ]


def test_ten_mistakes_are_shown_and_the_rest_counted() -> None:
    lines = complaint(read_prompts, *["{}"] * 13).splitlines()
    assert lines[0] == "data.jsonl:1: 'prompt' is missing"
    assert len(lines) == 11
    assert lines[-1] == "data.jsonl: ... and 3 more"


def test_every_file_of_a_recipe_is_checked_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    write_rows(tmp_path / "heldout.jsonl", [{"prompt": ""}])
    write_rows(tmp_path / "sft.jsonl", [{"text": 1}])
    write_rows(tmp_path / "votes.jsonl", [])
    assert [str(c) for c in check_files(load_recipe(recipe).recipe)] == [
        "heldout.jsonl:1: 'prompt' is empty",
        "sft.jsonl:1: 'text' has to be text",
        "votes.jsonl: holds no rows",
    ]


@given(st.binary(max_size=200))
def test_no_bytes_crash_a_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_voted_groups(path)
