"""Promises of policy/row_checks.py: rows that make figures meaningless are found, and good rows pass in silence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf_cli.errors import DataError
from rlhf_cli.policy.row_checks import (
    Example,
    check_rows,
    conversations,
    prompts_only,
    settle,
    shared_prompts,
    voted,
)
from rlhf_cli.recipe.votes import VotedGroup, rated_wins
from rlhf_cli.types import Message, Prompt, WinMatrix

GOOD = [
    ("What is a river?", "Water that flows to the sea.", "A wet thing."),
    ("Why is the sky blue?", "Air scatters blue light most.", "It is not."),
    ("How do I boil an egg?", "Seven minutes in boiling water.", "With fire"),
]


def pairs(rows: Sequence[tuple[str, str, str]], file: str = "pairs.jsonl") -> list[Example]:
    """Pairs as the reader gives them: the first completion was preferred to the second."""
    wins = WinMatrix([[0.0, 1.0], [0.0, 0.0]])
    return voted(
        [
            VotedGroup((Message("user", ask),), (chosen, rejected), wins, where=f"{file}:{line}")
            for line, (ask, chosen, rejected) in enumerate(rows, 1)
        ]
    )


def heldout(*rows: tuple[str, str, str]) -> list[Example]:
    return pairs(rows, "heldout.jsonl")


def found(train: list[Example], held: Sequence[Example] = ()) -> list[str]:
    """Warnings; a fatal finding raises."""
    return settle(check_rows(train, held))


NEW = ("Who wrote Faust?", "Goethe did, over sixty years.", "Nobody knows.")


def test_good_rows_pass_in_silence() -> None:
    assert found(pairs(GOOD), heldout(NEW)) == []


def test_a_held_out_row_known_from_training_is_an_error_that_names_both_lines() -> None:
    copied = ("what is a  RIVER?", "Water that flows\nto the sea.", "A WET THING.")  # case and white space hide nothing

    with pytest.raises(DataError) as caught:
        found(pairs(GOOD), heldout(NEW, copied))

    assert "heldout.jsonl:2: 1 row of 2 held-out ones (50.0%)" in str(caught.value)
    assert "pairs.jsonl:1" in str(caught.value)
    assert "heldout: 0.1" in str(caught.value)


def test_a_swapped_pair_is_known_from_training_too() -> None:
    ask, chosen, rejected = GOOD[0]

    with pytest.raises(DataError, match="held-out"):
        found(pairs(GOOD), heldout((ask, rejected, chosen)))


def test_one_known_row_in_hundreds_is_worth_a_line_and_no_more() -> None:
    many = [(f"Question {n}?", f"Answer {n}", f"Other {n * 11}") for n in range(300)]

    notes = found(pairs(GOOD), heldout(*many, GOOD[1]))

    assert len(notes) == 1
    assert notes[0].startswith("heldout.jsonl:301: 1 row of 301 held-out ones (0.3%)")


def test_a_held_out_prompt_with_new_completions_is_a_warning() -> None:
    notes = found(pairs(GOOD), heldout(NEW, ("What is a river?", "A stream.", "A wet thing.")))  # one of them is known

    assert len(notes) == 1
    assert "heldout.jsonl:2" in notes[0]
    assert "nothing about new prompts" in notes[0]


def test_one_prompt_for_all_rows_is_a_task_and_not_a_leak() -> None:
    train = [("Write a review.", good, bad) for _, good, bad in GOOD]

    assert found(pairs(train), heldout(("Write a review.", "Superb.", "Dull, I fear."))) == []


def test_rows_that_repeat_an_earlier_one_are_named() -> None:
    notes = found(pairs([*GOOD, GOOD[0], GOOD[0]]))

    assert len(notes) == 1
    assert notes[0].startswith("pairs.jsonl:4, pairs.jsonl:5: 2 rows of 5 repeat an earlier one word for word")
    assert "(the first one repeats pairs.jsonl:1)" in notes[0]


def test_pairs_judged_both_ways_are_named_with_each_other() -> None:
    ask, chosen, rejected = GOOD[1]

    notes = found(pairs([*GOOD, (ask, rejected, chosen)]))

    assert len(notes) == 1
    assert notes[0].startswith("pairs.jsonl:4: 1 pair is judged the other way elsewhere")
    assert "pairs.jsonl:2" in notes[0]


def test_a_pair_inside_larger_groups_is_compared_as_well() -> None:
    prompt = (Message("user", "Hi?"),)
    one = VotedGroup(prompt, ("a", "bb", "ccc"), WinMatrix([[0, 3, 0], [1, 0, 0], [0, 0, 0]]), where="f:1")
    other = VotedGroup(prompt, ("dddd", "bb", "a"), WinMatrix([[0, 0, 0], [0, 0, 2], [0, 1, 0]]), where="f:2")

    notes = found(voted([one, other]))

    assert [n.split(":")[:2] for n in notes] == [["f", "2"]]


def test_completions_preferred_to_their_own_copy_are_a_warning_and_an_error_once_they_are_most() -> None:
    same = ("What now?", "Nothing.", "Nothing.")

    assert found(pairs([*GOOD, same]))[0].startswith("pairs.jsonl:4: 1 row of 4 prefer")
    with pytest.raises(DataError, match="right columns"):
        found(pairs([GOOD[0], same, ("And now?", "Yes", "Yes")]))


def test_empty_completions_are_a_warning_and_an_error_once_they_are_in_most_rows() -> None:
    assert found(pairs([*GOOD, ("What now?", "Rest.", " \n")]))[0].startswith("pairs.jsonl:4: 1 row of 4 have an empty")
    with pytest.raises(DataError, match="a text was lost"):
        found(pairs([(ask, chosen, "") for ask, chosen, _ in GOOD]))


def test_completions_cut_at_one_length_are_noticed() -> None:
    cut = [(f"Question {n}?", f"answer {n} " * 5, f"other {n * 3} " * 5) for n in range(10, 30)]
    cut = [(ask, good[:30], bad[:30]) for ask, good, bad in cut]

    notes = found(pairs(cut))

    assert len(notes) == 1
    assert notes[0].startswith("pairs.jsonl: 40 of 40 completions have exactly 30 characters")


def test_completions_of_many_lengths_pass_in_silence() -> None:
    assert found(pairs([(f"Question {n}?", "good " * n, "bad " * (n + 1)) for n in range(1, 30)])) == []


def rated(file: str, *texts: str) -> list[Example]:
    """Texts that were rated one by one, as the reader groups them."""
    ratings = tuple((float(n), n + 1.0) for n in range(len(texts)))
    return voted([VotedGroup((), texts, rated_wins(ratings), "tweets", ratings=ratings, where=f"{file}:1")])


def test_rated_texts_are_compared_one_by_one_however_they_were_grouped() -> None:
    train = rated("rated.jsonl", "Superb.", "Dull, I fear.", "Not for me, thanks.")

    assert found(train, rated("new.jsonl", "A delight!", "Rather long.")) == []
    with pytest.raises(DataError, match=r"new\.jsonl: 'DULL, I fear\.': 1 row of 2 held-out ones"):
        found(train, rated("new.jsonl", "A delight!", "DULL, I fear."))
    assert found(rated("rated.jsonl", "Yes.", "No.", "Yes."))[0].startswith("rated.jsonl: 'Yes.': 1 row of 3 repeat")


def test_conversations_are_checked_by_their_last_turn_and_raw_texts_as_they_are() -> None:
    talk = (Message("user", "Hi?"), Message("assistant", "Hello."))
    rows = conversations([talk, talk, "Once upon a time."], ["s:1", "s:2", "s:3"])

    notes = found(rows)

    assert notes[0].startswith("s:2: 1 row of 3 repeat")
    assert rows[2] == Example("s:3", (), ("Once upon a time.",))


def test_prompts_of_eval_that_are_trained_on_are_named_by_id() -> None:
    asked = [Prompt(f"p{n}", (Message("user", f"Question {n}?"),)) for n in range(4)]
    again = Prompt("h1", (Message("user", "question  2?"),))
    new = Prompt("h2", (Message("user", "Question 9?"),))

    notes = settle(shared_prompts(prompts_only(asked), prompts_only([again, new])))

    assert len(notes) == 1
    assert "1 of 2 prompts are in data.prompts too ('h1')" in notes[0]
    assert settle(shared_prompts(prompts_only(asked), prompts_only([new]))) == []
