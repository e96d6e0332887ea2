"""What a recipe's numbers become at each service, and which are refused before anything is paid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.errors import FlowRefused
from rlhf_cli.flow.base import RAPIDATA, Capabilities, FlowSpec, Responses
from rlhf_cli.flow.bodies import MAX_BODY_BYTES, keep_bodies
from rlhf_cli.flow.mapping import Mapped, mapping
from rlhf_cli.flow.wire import OURS

SPEC = FlowSpec("run", "Which?", Responses(8, 12, 16), ttl_s=90.5)


def rows(capabilities: Capabilities, early: float | None = None) -> dict[str, Mapped]:
    return {row.key: row for row in mapping("service", capabilities, SPEC, 4, early)}


def test_every_number_of_the_recipe_is_accounted_for_at_every_service() -> None:
    keys = {
        "responses.min",
        "responses.desired",
        "responses.max",
        "ttl_s",
        "stop_when_decided",
        "group_size",
        "creation",
    }
    for capabilities in (RAPIDATA, OURS, Capabilities()):
        assert rows(capabilities).keys() == keys
        assert all(row.asked and row.sent and row.note for row in rows(capabilities).values())


def test_our_server_is_told_the_desired_votes_and_a_fraction_of_a_second() -> None:
    ours = rows(OURS, 0.9)
    assert ours["responses.desired"].sent == "serveResponses 12"
    assert ours["ttl_s"].sent == "timeToLiveInSeconds 90.5"
    assert ours["ttl_s"].note == "0 to 604800 s are possible"
    assert ours["stop_when_decided"].sent == "stop"
    assert ours["creation"].sent == "Idempotency-Key"


def test_the_vendor_is_said_to_know_no_desired_votes_no_early_stop_and_no_keys() -> None:
    theirs = rows(RAPIDATA)
    assert theirs["responses.desired"].sent == "nothing"
    assert "goes on to the maximum" in theirs["responses.desired"].note
    assert theirs["ttl_s"].sent == "timeToLiveInSeconds 91"
    assert "60 to 3600 s" in theirs["ttl_s"].note
    assert "rounded up" in theirs["ttl_s"].note
    assert "not possible" in theirs["stop_when_decided"].note
    assert "settle_s" in theirs["creation"].note


@pytest.mark.parametrize(
    ("change", "size", "early", "message"),
    [
        ({"ttl_s": 59}, 4, None, r"flow\.ttl_s is 59; an item may live for 60 to 3600 s here"),
        ({"ttl_s": 3601}, 4, None, r"flow\.ttl_s is 3601"),
        ({}, 9, None, "groups have 9 completions; an item may have 8 here"),
        ({}, 1, None, "groups have 1 completion; there is nothing to compare"),
        ({}, 4, 0.9, r"flow\.stop_when_decided is set, and votes are not shown before an item has ended"),
    ],
)
def test_what_a_service_cannot_do_is_refused_by_the_name_of_the_key(
    change: dict[str, float], size: int, early: float | None, message: str
) -> None:
    with pytest.raises(FlowRefused, match=f"^service: {message}"):
        mapping("service", replace(RAPIDATA, max_candidates=8), replace(SPEC, **change), size, early)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(FlowRefused) as caught:
        mapping("service", replace(RAPIDATA, max_candidates=8), replace(SPEC, ttl_s=1), 9, 0.9)
    assert len(str(caught.value).splitlines()) == 3


def test_a_body_that_is_too_long_is_cut_and_says_so(tmp_path: Path) -> None:
    keep = keep_bodies(tmp_path / "flow" / "bodies.jsonl")
    keep("vote-matrix", "fli_1", b"\xff[]")
    keep("results", "fli_1", b"x" * (MAX_BODY_BYTES + 1))
    first, second = (json.loads(line) for line in (tmp_path / "flow" / "bodies.jsonl").read_text().splitlines())
    assert first | {"at": ""} == {"at": "", "kind": "vote-matrix", "item_id": "fli_1", "body": "\ufffd[]"}
    assert (len(second["body"]), second["cut"]) == (MAX_BODY_BYTES, True)
