"""Sources of rows: formats, mixtures, held-out shares, and what `rlhf validate` says about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from recipe_files import RECIPE, write_recipe, write_rows

from rlhf_cli.errors import DataError, RecipeError
from rlhf_cli.recipe.data import check_files, read_conversations, read_prompts, read_votes
from rlhf_cli.recipe.fingerprint import stage_fingerprint
from rlhf_cli.recipe.load import LoadedRecipe, load_recipe
from rlhf_cli.recipe.schema import Part
from rlhf_cli.recipe.sources import draw, is_held_out, mixture
from rlhf_cli.types import Message

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
HELLO = (Message("user", "Hi"), Message("assistant", "Hello"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pairs(name: str, count: int, said: str = "Why") -> Path:
    return write_rows(Path(name), [{"prompt": f"{said} {n}?", "completion": f"{n}."} for n in range(count)])


def sft(*lines: str) -> LoadedRecipe:
    recipe = write_recipe(Path("."), RECIPE.replace("  dataset: sft.jsonl\n", "".join(f"  {line}\n" for line in lines)))
    return load_recipe(recipe)


def refused(*lines: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        sft(*lines)
    return str(caught.value).splitlines()


def test_a_table_reads_as_the_same_rows_as_lines_do() -> None:
    rows: list[Any] = [
        {"prompt": 'Say "a,b"\nplease', "completion": "a,b"},
        {"prompt": "[not a list]", "completion": "1"},
    ]
    write_rows(Path("r.jsonl"), rows)
    Path("r.csv").write_text('\ufeffprompt,completion\n"Say ""a,b""\nplease","a,b"\n[not a list],1\n', "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "id": None} for row in rows]), "r.parquet")
    expected = read_conversations(Path("r.jsonl"))[0]
    for file, wheres in (("r.csv", ["r.csv:2", "r.csv:4"]), ("r.parquet", ["r.parquet:1", "r.parquet:2"])):
        read = read_conversations(Path(file))[0]
        assert read.rows == expected.rows
        assert read.wheres == wheres


def test_turns_votes_and_prompts_come_from_tables_too() -> None:
    Path("m.csv").write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""Hi""}, {""role"": ""assistant"", ""content"": ""Hello""}]"\n'
    )
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": TURNS}]), "m.parquet")
    assert read_conversations(Path("m.csv"))[0].rows == read_conversations(Path("m.parquet"))[0].rows == [HELLO]
    Path("v.csv").write_text('prompt,completions,wins\nHi,"[""a"", ""b""]","[[0, 2], [1, 0]]"\n')
    (group,) = read_votes(Path("v.csv"))[0]
    assert (group.completions, group.wins.votes) == (("a", "b"), 3)
    Path("p.csv").write_text("id,prompt\n,Hi\n7,Ho\n")
    assert [p.id for p in read_prompts(Path("p.csv"))] == ["p-2", "7"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"prompt,completion\na,b\nonly one\n", "d.csv:3: has more or fewer cells"),
        (b"prompt,completion\na,b,c\n", "d.csv:2: has more or fewer cells"),
        (b"prompt,completion\na,\n", "d.csv:2: 'completion' is missing"),
        (b"prompt,completion\n\xff,b\n", "d.csv: is not UTF-8 text"),
        (b'prompt,completion\n"a"x,b\n', "d.csv: not valid CSV after line"),
        (b"prompt,completion\n", "d.csv: holds no rows"),
        (b"", "d.csv: holds no rows"),
    ],
)
def test_a_mistake_in_a_csv_file_is_named_with_its_line(text: bytes, said: str) -> None:
    Path("d.csv").write_bytes(text)
    with pytest.raises(DataError) as caught:
        read_conversations(Path("d.csv"))
    assert str(caught.value).startswith(said)


def test_a_file_that_only_says_it_is_parquet_is_refused_when_it_is_loaded() -> None:
    Path("d.parquet").write_bytes(b"prompt,completion\n")
    with pytest.raises(DataError, match=r"^d\.parquet: not a Parquet file"):
        read_conversations(Path("d.parquet"))
    assert check_files(sft("dataset: d.parquet").recipe) == []


def test_rows_of_the_hub_are_checked_like_any_others() -> None:
    def hub(source: str) -> Iterable[dict[str, Any]]:
        assert source == "org/name:test"
        return [{"messages": TURNS, "id": None}, {"messages": TURNS[:1]}]

    with pytest.raises(DataError, match=r"^org/name:test:2: 'messages' has to end with the assistant's turn"):
        read_conversations("org/name:test", hub=hub)


def test_a_dataset_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    from rlhf_cli.policy.hub import hub_rows

    with pytest.raises(DataError, match=r"^the dataset nobody/nothing-7f3a:test could not be loaded from the hub"):
        read_conversations("nobody/nothing-7f3a:test", hub=hub_rows)


def test_a_mixture_is_the_largest_with_its_shares() -> None:
    assert mixture([100, 100], [3, 1]) == [100, 33]
    assert mixture([10, 1000], [1, 1]) == [10, 10]
    assert mixture([7], [0.2]) == [7]
    big, small = pairs("big.jsonl", 40, "How"), pairs("small.jsonl", 10)
    parts = [Part(source=big, weight=0.5), Part(source=small, weight=0.25)]
    train = read_conversations(parts, seed=3)[0]
    assert [where.split(":")[0] for where in train.wheres] == ["big.jsonl"] * 20 + ["small.jsonl"] * 10
    assert len(set(train.wheres)) == 30
    assert read_conversations(parts, seed=3)[0].wheres == train.wheres
    assert read_conversations(parts, seed=4)[0].wheres != train.wheres


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_a_mixture_repeats_nothing_and_uses_one_part_up(parts: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    counts = mixture(sizes, weights)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    exact = min(size / weight for size, weight in parts)
    assert all(abs(count - exact * weight) <= 0.5 + 1e-9 for count, weight in zip(counts, weights, strict=True))
    for n, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        drawn = draw(size, count, f"0/{n}")
        assert len(set(drawn)) == count
        assert drawn == sorted(drawn)


@given(st.text(max_size=50), st.floats(0.01, 0.5), st.floats(0.5, 0.99))
def test_what_is_held_out_stays_held_out_when_the_share_grows(key: str, less: float, more: float) -> None:
    assert not is_held_out(key, 0.0)
    assert is_held_out(key, more) or not is_held_out(key, less)


def test_a_held_out_share_takes_prompts_whole_and_whatever_the_order() -> None:
    rows: list[Any] = [{"prompt": f"{n}?", "completion": f"{answer}."} for n in range(200) for answer in (1, 2)]
    train, heldout = read_conversations(write_rows(Path("a.jsonl"), rows), 0.2)
    again = read_conversations(write_rows(Path("b.jsonl"), rows[::-1]), 0.2)[1]
    asked = [{row[0].content for row in part.rows if not isinstance(row, str)} for part in (train, heldout, again)]
    assert not asked[0] & asked[1]
    assert asked[1] == asked[2]
    assert len(train) + len(heldout) == 400
    assert 25 <= len(asked[1]) <= 55
    with pytest.raises(DataError, match="leaves no row to measure on"):
        read_conversations(pairs("one.jsonl", 1), 0.001)


def test_texts_and_conversations_are_not_mixed() -> None:
    texts = write_rows(Path("t.jsonl"), [{"text": "A story."}])
    with pytest.raises(DataError, match=r"^t\.jsonl:1: raw text and conversations together \(the first row is c"):
        read_conversations([Part(source=pairs("c.jsonl", 1)), Part(source=texts)])
    with pytest.raises(DataError, match=r"^t\.jsonl:1: raw text and conversations together"):
        read_conversations(pairs("c.jsonl", 1), texts)


def test_a_recipe_names_sources_in_three_ways() -> None:
    pairs("a.jsonl", 3)
    Path("b.csv").write_text("prompt,completion\na,b\n")
    here = Path.cwd()
    assert sft("dataset: a.jsonl", "heldout: 0.2").recipe.sft.dataset == here / "a.jsonl"  # type: ignore[union-attr]
    assert sft("dataset: org/name:train[:5%]", "heldout: org/name").recipe.sft.heldout == "org/name"  # type: ignore[union-attr]
    mixed = sft("dataset: [{source: a.jsonl, weight: 2}, {source: b.csv}, {source: org/name}]")
    section = mixed.recipe.sft
    assert section is not None
    assert section.dataset == [
        Part(source=here / "a.jsonl", weight=2.0),
        Part(source=here / "b.csv"),
        Part(source="org/name"),
    ]
    before = stage_fingerprint(mixed, "sft")
    Path("b.csv").write_text("prompt,completion\na,c\n")
    assert stage_fingerprint(mixed, "sft") != before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dataset: nothing.jsonl", "recipe.yaml:10:3: sft.dataset: no such file: "),
        ("dataset: sft.txt", "recipe.yaml:10:3: sft.dataset: expected a .jsonl, .csv, .parquet file or a hub id"),
        ("dataset: sft", "recipe.yaml:10:3: sft.dataset: expected a .jsonl, .csv, .parquet file or a hub id"),
        ("dataset: 3", "recipe.yaml:10:3: sft.dataset: expected "),
        ("dataset: []", "recipe.yaml:10:3: sft.dataset: an empty list: name at least one source"),
        ("dataset: [{source: no.csv}]", "recipe.yaml:10:14: sft.dataset.0.source: no such file: "),
        ("dataset: [{source: sft.jsonl, weight: 0}]", "recipe.yaml:10:33: sft.dataset.0.weight: must be more than 0"),
        ("dataset: [{source: sft.jsonl, wieght: 1}]", "recipe.yaml:10:33: sft.dataset.0.wieght: unknown key; did you"),
        ("dataset: [{weight: 1}]", "recipe.yaml:10:13: sft.dataset.0.source: missing key"),
    ],
)
def test_a_mistake_in_a_source_is_named_where_it_was_typed(line: str, said: str) -> None:
    (problem,) = refused(line)
    assert problem.startswith(said)


@pytest.mark.parametrize("share", ["0", "1", "1.5"])
def test_a_held_out_share_is_a_part_of_the_whole(share: str) -> None:
    (problem,) = refused("dataset: sft.jsonl", f"heldout: {share}")
    assert problem.startswith("recipe.yaml:11:3: sft.heldout: ")
    assert "than" in problem


def test_an_early_stop_needs_something_to_look_at() -> None:
    (problem,) = refused("dataset: sft.jsonl", "stop_early: {every: 5}")
    assert problem == "recipe.yaml:11:3: sft.stop_early: stop_early needs `heldout`: texts that were not trained on"


def test_every_file_of_a_mixture_is_checked_once() -> None:
    Path("a.jsonl").write_text('{"prompt": "a"}\n')
    Path("b.csv").write_text("text\n \n")
    found = check_files(sft("dataset: [{source: a.jsonl}, {source: a.jsonl}, {source: b.csv}]").recipe)
    assert [str(complaint) for complaint in found] == [
        "a.jsonl:1: 'completion' is missing",
        "b.csv:2: 'text' is empty",
    ]


def test_only_what_asks_prompts_needs_them() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            write_recipe(
                Path("."), RECIPE.replace("data:\n  prompts: prompts.jsonl\n  heldout_prompts: heldout.jsonl\n", "")
            )
        )
    assert "recipe.yaml" in str(caught.value)
    assert "run_online: needs a `data` section: the prompts that the policy answers" in str(caught.value)
    alone = load_recipe(write_recipe(Path("."), "name: a\nmodel: {path: smollm2-135m}\nsft: {dataset: sft.jsonl}\n"))
    assert alone.recipe.data is None
