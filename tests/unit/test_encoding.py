"""What a reward model reads of a prompt and a completion, and what it loses where the two are too long."""

from __future__ import annotations

import pytest

from rlhf_cli.errors import DataError
from rlhf_cli.policy.encoding import encode_answer, encode_comparison, longest
from rlhf_cli.policy.load import load_tokenizer
from rlhf_cli.types import Message

ASKED = (Message("user", "what is a river?"),)


def test_an_encoder_reads_prompt_and_completion_as_its_own_tokenizer_pairs_them(tiny_encoder: str) -> None:
    tokenizer = load_tokenizer(tiny_encoder)
    encoded = encode_answer(tokenizer, ASKED, "water.", 64)
    pair = tokenizer("what is a river?", "water.")
    assert list(encoded.ids) == pair["input_ids"]
    assert encoded.types is not None
    assert list(encoded.types) == pair["token_type_ids"]
    assert encoded.cut == 0


def test_a_text_without_a_prompt_is_read_by_itself(tiny: str, tiny_encoder: str) -> None:
    encoder, decoder = load_tokenizer(tiny_encoder), load_tokenizer(tiny)
    for prompt in ((), (Message("user", " "),)):
        assert list(encode_answer(encoder, prompt, "water.", 64).ids) == encoder("water.")["input_ids"]
        alone = encode_answer(decoder, prompt, "water.", 64).ids
        assert decoder.decode(alone) == f"water.{decoder.eos_token}"


@pytest.mark.parametrize("room", [8, 12, 20])
def test_what_is_cut_is_the_start_of_the_prompt_then_that_of_the_completion(tiny_encoder: str, room: int) -> None:
    tokenizer = load_tokenizer(tiny_encoder)
    whole = encode_answer(tokenizer, ASKED, "water.", 64)
    encoded = encode_answer(tokenizer, ASKED, "water.", room)
    assert len(encoded.ids) == room
    assert encoded.cut == len(whole.ids) - room
    assert [encoded.ids[0], encoded.ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert encoded.ids.count(tokenizer.sep_token_id) == 2
    assert encoded.types is not None
    letters = [i for i in encoded.ids if i not in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    of_whole = [i for i in whole.ids if i not in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    assert letters == of_whole[-len(letters) :]
    assert encoded.types.count(1) == min(room - 2, whole.types.count(1) if whole.types else 0)


def test_a_conversation_that_is_too_long_keeps_its_end(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    whole, encoded = (encode_answer(tokenizer, ASKED, "Water that flows.", n) for n in (100, 12))
    assert encoded.ids == whole.ids[-12:]
    assert encoded.cut == len(whole.ids) - 12
    assert encoded.types is None


def test_both_completions_of_a_comparison_are_read_in_order(tiny: str, tiny_encoder: str) -> None:
    tokenizer = load_tokenizer(tiny)
    text = tokenizer.decode(encode_comparison(tokenizer, ASKED, "Water.", "Sand.", 200).ids)
    assert text.index("what is a river?") < text.index("Water.") < text.index("Sand.")
    assert text.endswith("<|assistant|>")
    encoder = load_tokenizer(tiny_encoder)
    encoded = encode_comparison(encoder, ASKED, "water.", "sand.", 64)
    framed = encoder("what is a river? [SEP] water.", "sand.")
    assert list(encoded.ids) == framed["input_ids"]
    assert encoded.types is not None
    assert list(encoded.types) == framed["token_type_ids"]


@pytest.mark.parametrize("kind", ["tiny", "tiny_encoder"])
def test_a_comparison_that_is_too_long_loses_its_prompt_first(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    asked = (Message("user", "why is the sky so blue?"),)
    answers = ("light.", "air.")

    def read(room: int) -> str:
        encoded = encode_comparison(tokenizer, asked, *answers, room)
        assert len(encoded.ids) <= room
        assert (encoded.cut > 0) == (room < whole)
        return str(tokenizer.decode(encoded.ids)).replace(" ", "").replace("##", "")

    whole = len(encode_comparison(tokenizer, asked, *answers, 1000).ids)
    bare = len(encode_comparison(tokenizer, (), *answers, 1000).ids)
    assert "whyisthesky" in read(whole)
    assert "why" not in read(whole - 4)
    assert all(text in read(whole - 4) for text in ("blue?", *answers))
    assert "light." not in read(bare - 2)
    assert all(text in read(bare - 2) for text in ("ht.", "ir."))


def test_a_comparison_that_can_never_fit_is_an_error(tiny: str) -> None:
    with pytest.raises(DataError, match="too short to compare"):
        encode_comparison(load_tokenizer(tiny), ASKED, "a", "b", 8)


def test_no_text_is_longer_than_the_encoder_has_positions(tiny: str, tiny_encoder: str) -> None:
    assert longest(load_tokenizer(tiny_encoder), 1024) == 64
    assert longest(load_tokenizer(tiny), 1024) == 1024
