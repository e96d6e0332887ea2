"""The user's own scores: never waited for, never made up; a failure costs the group that it is about and no other."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint_world import QUICK, Asked, closed_port, cut_off, fails, served
from flow_world import group, until
from starlette.responses import JSONResponse, Response
from stream_world import Disk, Killed

from rlhf_cli.errors import CredentialsError, DataError, FlowRefused, FlowUnavailable
from rlhf_cli.feedback.function import HttpFeedback, PythonFeedback, load_function
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import GroupRanked, GroupSetAside
from rlhf_cli.learner.scores import group_scores
from rlhf_cli.types import Feedback

Scores = Callable[[list[dict[str, Any]]], Any]


@contextmanager
def python(score: Scores, disk: Disk | None = None, timeout_s: float = 20.0, **given: Any) -> Iterator[Asked]:
    disk = disk or Disk()
    feedback = PythonFeedback(score, "score", timeout_s, disk.append, **{"batch": 4, **given})
    yield Asked(disk, feedback)
    feedback.close()


@contextmanager
def http(url: str, secret: str = "", disk: Disk | None = None, **given: Any) -> Iterator[Asked]:
    disk = disk or Disk()
    credentials = Credentials(token=secret, origin="$KEY") if secret else None
    feedback = HttpFeedback(url, credentials, QUICK, disk.append, **{"batch": 4, **given})
    yield Asked(disk, feedback)
    feedback.close()


def lengths(groups: list[dict[str, Any]]) -> list[list[float]]:
    return [[len(text) for text in one["completions"]] for one in groups]


async def lengths_later(groups: list[dict[str, Any]]) -> list[list[float]]:
    await asyncio.sleep(0.001)
    return lengths(groups)


@pytest.mark.parametrize("score", [lengths, lengths_later], ids=["def", "async def"])
def test_the_higher_score_gets_the_vote_of_each_pair_and_equal_ones_half(score: Scores) -> None:
    one = group(1, ["aa", "b", "cc"])
    with python(score) as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
    assert ranked.scores == (2.0, 1.0, 2.0)
    assert ranked.wins.wins.tolist() == [[0, 1, 0.5], [0, 0, 0], [0.5, 1, 0]]
    assert (ranked.source, ranked.complete, ranked.votes_paid) == ("function:score", True, 0.0)
    (event,) = asked.disk.of(GroupRanked)
    assert event.scores == ranked.scores
    assert not event.by_people


def test_it_sees_the_question_the_whole_conversation_and_every_completion() -> None:
    seen: list[Any] = []
    with python(lambda groups: seen.extend(groups) or lengths(groups)) as asked:
        asked.submit(group(1, ["a", "a", ""]))
        until(lambda: asked.has(1))
    assert seen == [
        {"prompt": "Why?", "messages": [{"role": "user", "content": "Why?"}], "completions": ["a", "a", ""]}
    ]


def test_a_penalty_for_length_is_taken_from_the_scores_and_so_from_the_votes() -> None:
    one = group(1, ["aaaa", "b"])
    with python(lambda groups: [[1.0, 0.9] for _ in groups], penalty=0.1) as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
    assert ranked.scores == pytest.approx((0.6, 0.8))
    assert ranked.wins.wins.tolist() == [[0, 0], [1, 0]]


def test_a_completion_without_a_label_has_no_vote_and_the_others_are_ranked() -> None:
    one = group(1, ["a", "bb", "ccc"])
    with python(lambda groups: [[1, None, np.float32(0.5)] for _ in groups]) as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
        assert asked.feedback.status()["function/score_mean"] == 0.75  # of those that there are
    assert ranked.wins.wins.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert ranked.scores == (1, math.nan, 0.5)  # on the scale of the function, not on that of a ranking
    assert not ranked.complete


def test_what_a_function_gave_is_learned_from_on_its_own_scale_where_it_left_one_out() -> None:
    """Also after a restart, from the journal. A penalty for length is taken once."""
    one = group(1, ["aaaa", "bb", "cccccc"])
    with python(lambda groups: [[100, None, 300] for _ in groups], penalty=1.0) as asked:
        asked.submit(one)
        live = asked.ranked(one)
    (event,) = [entry.event for entry in asked.disk.entries if isinstance(entry.event, GroupRanked)]
    again = GroupRanked.model_validate_json(event.model_dump_json()).ranked(one)
    for ranked in (live, again):
        assert group_scores(ranked, per_char=1.0).tolist() == pytest.approx([96, math.nan, 294], nan_ok=True)


def test_a_learner_that_needs_every_score_gets_no_group_without_one() -> None:
    one = group(1, ["a", "bb", "ccc"])
    with python(lambda groups: [[1, None, 3] for _ in groups], all_scores=True) as asked:
        asked.submit(one)
        assert "needs all" in asked.reason(one)


def raises(groups: object) -> object:
    raise ValueError("out of words")


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda groups: [[None, None]] * len(groups), "a score for 0 of 2 completions"),
        (lambda groups: [[1.0, None]] * len(groups), "a score for 1 of 2 completions"),
        (lambda groups: [[1.0, math.nan]] * len(groups), "'nan' is not a finite number"),
        (lambda groups: [[1.0, math.inf]] * len(groups), "'inf' is not a finite number"),
        (lambda groups: [[1.0, 10**400]] * len(groups), "is not a finite number"),
        (lambda groups: [[1.0, "2"]] * len(groups), "'2' is not a finite number"),
        (lambda groups: [[1.0]] * len(groups), "1 values for 2 completions"),
        (lambda groups: [1.0] * len(groups), "float where a list for 2 completions"),
        (lambda groups: [], "0 values for 1 groups"),
        (lambda groups: None, "NoneType where a list for 1 groups"),
        (lambda groups: "ab", "str where a list for 1 groups"),
        (raises, "raised ValueError: out of words"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_label_sets_the_group_aside_with_the_reason(score: Scores, said: str) -> None:
    one = group(1, ["a", "bb"])
    with python(score) as asked:
        asked.submit(one)
        assert said in asked.reason(one)
    (event,) = asked.disk.of(GroupSetAside)
    assert said in event.reason
    assert not asked.disk.of(GroupRanked)


def test_one_group_that_fails_takes_no_other_of_its_batch_along() -> None:
    begun = threading.Event()
    batches: list[int] = []

    def picky(groups: list[dict[str, Any]]) -> list[list[float]]:
        batches.append(len(groups))
        if len(batches) == 1:
            begun.wait(10)  # until the others are there, so that they come together
        if any("poison" in one["completions"] for one in groups):
            raise ValueError("poison")
        return lengths(groups)

    first, *others = [group(n, ["poison" if n == 2 else "a", "bb"]) for n in range(5)]
    with python(picky) as asked:
        asked.submit(first)
        until(lambda: batches)
        asked.submit(*others)
        begun.set()
        assert "poison" in asked.reason(others[1])
        for one in (first, others[0], *others[2:]):
            assert asked.ranked(one).scores == (1.0, 2.0)
    assert batches == [1, 4, 1, 1, 1, 1]


def test_nobody_waits_for_a_function_and_what_it_decides_is_on_disk_first() -> None:
    answer = threading.Event()
    one = group(1, ["a", "bb"])
    with python(lambda groups: answer.wait(10) and lengths(groups)) as asked:
        asked.submit(one)
        assert asked.feedback.collect() == []
        assert asked.feedback.status()["flow/in_flight"] == 1
        answer.set()
        asked.ranked(one)
        assert asked.feedback.status()["flow/in_flight"] == 0


def test_what_cannot_be_journalled_is_never_handed_out() -> None:
    with python(lengths, Disk(dies_at=1)) as asked:
        asked.submit(group(1, ["a", "bb"]))
        assert isinstance(asked.error(), Killed)
    assert not asked.decided


def test_a_call_that_takes_too_long_sets_its_group_aside_and_one_that_never_ends_ends_the_run() -> None:
    never = threading.Event()
    slow, behind = group(1, ["a", "bb"]), group(2, ["a", "bb"])
    with python(lambda groups: never.wait(20), timeout_s=0.1) as asked:
        asked.submit(slow)
        assert "no answer within 0.1 s" in asked.reason(slow)
        asked.submit(behind)
        error = asked.error()
        assert isinstance(error, FlowUnavailable)
        assert "keeps all others waiting" in str(error)
        assert behind.id not in asked.decided  # open: a resume asks again
        never.set()


def test_an_async_function_that_takes_too_long_is_cancelled_and_the_next_call_goes_through() -> None:
    calls = 0

    async def once_slow(groups: list[dict[str, Any]]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(60)
        return lengths(groups)

    slow, next_one = group(1, ["a", "bb"]), group(2, ["a", "bb"])
    with python(once_slow, timeout_s=0.1) as asked:
        asked.submit(slow)
        assert "no answer within 0.1 s" in asked.reason(slow)
        asked.submit(next_one)
        assert asked.ranked(next_one).scores == (1.0, 2.0)


def test_groups_that_were_open_when_the_process_died_are_asked_about_again() -> None:
    disk, one = Disk(), group(1, ["a", "bb"])
    with python(lambda groups: threading.Event().wait(0.2), disk) as asked:
        asked.submit(one)
    with python(lengths, disk) as asked:
        asked.feedback.resume(disk.state().open_groups)
        asked.ranked(one)
    assert not disk.state().open_groups


def test_it_is_a_feedback() -> None:
    with python(lengths) as asked:
        feedback: Feedback = asked.feedback
        assert feedback.collect() == []


# --- the function of a file


def test_a_function_finds_what_lies_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "helper_of_score.py").write_text("FACTOR = 3\n")
    file = tmp_path / "own.py"
    file.write_text(
        "import helper_of_score\ndef score(groups):\n    return [[helper_of_score.FACTOR] for _ in groups]\n"
    )
    assert load_function(file, "score")([{}]) == [[3]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(groups): ...", "no function 'score'"),
        ("score = 3", "no function 'score'"),
        ("def score(", "cannot be loaded: SyntaxError"),
        ("import there_is_no_such_module", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_file_without_the_function_is_refused_with_what_python_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        load_function(file, "score")


# --- the endpoint


async def scored(body: Any) -> Response:
    return JSONResponse({"scores": lengths(body["groups"])})


def test_an_endpoint_gets_the_groups_as_json_with_the_token_and_its_scores_are_the_ranking() -> None:
    one = group(1, ["aa", "b"])
    with served(scored) as endpoint, http(f"{endpoint.url}/score", "s3cret") as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
    assert ranked.scores == (2.0, 1.0)
    assert ranked.source == "function:127.0.0.1"
    assert endpoint.paths == ["/score"]
    assert endpoint.bodies[0]["groups"][0]["completions"] == ["aa", "b"]
    assert endpoint.headers[0]["authorization"] == "Bearer s3cret"


def test_without_a_token_none_is_sent() -> None:
    one = group(1, ["aa", "b"])
    with served(scored) as endpoint, http(endpoint.url) as asked:
        asked.submit(one)
        asked.ranked(one)
    assert "authorization" not in endpoint.headers[0]


@pytest.mark.parametrize(
    "fault",
    [
        lambda: fails(503),
        lambda: fails(429, Retry_After="0"),
        lambda: fails(500),
        cut_off,
    ],
    ids=["503", "429", "500", "cut off"],
)
def test_a_fault_that_passes_costs_nothing(fault: Callable[[], Response]) -> None:
    faults = [fault(), fault()]

    async def answer(body: Any) -> Response:
        return faults.pop() if faults else await scored(body)

    one = group(1, ["aa", "b"])
    with served(answer) as endpoint, http(endpoint.url) as asked:
        asked.submit(one)
        assert asked.ranked(one).scores == (2.0, 1.0)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "said", "tries"),
    [
        (lambda: fails(500), "answered 500", 4),
        (cut_off, "RemoteProtocolError", 4),
        (lambda: Response(b"oops", headers={"Content-Encoding": "gzip"}), "DecodingError", 4),
        (lambda: fails(422), "answered 422", 1),
        (lambda: Response(b"<html>"), "is not what was asked for", 1),
        (lambda: JSONResponse({"score": [[1, 2]]}), "scores: Field required", 1),
        (lambda: JSONResponse({"scores": [[1]]}), "1 values for 2 completions", 1),
        (lambda: JSONResponse({"scores": [[1, None]]}), "a score for 1 of 2", 1),
        (lambda: Response(b'{"scores": [[1, NaN]]}'), "'nan' is not a finite number", 1),
        (lambda: Response(b" " * (9 << 20)), "more than 8 MiB", 1),
    ],
)  # fmt: skip
def test_a_fault_that_stays_sets_the_group_aside_with_the_reason(
    answer: Callable[[], Response], said: str, tries: int
) -> None:
    async def always(body: Any) -> Response:
        return answer()

    one = group(1, ["aa", "b"])
    with served(always) as endpoint, http(endpoint.url) as asked:
        asked.submit(one)
        assert said in asked.reason(one)
    assert len(endpoint.bodies) == tries


@pytest.mark.parametrize(("status", "error"), [(401, CredentialsError), (403, CredentialsError), (404, FlowRefused)])
def test_an_endpoint_that_will_never_answer_ends_the_run_and_the_token_is_not_shown(
    status: int, error: type[Exception]
) -> None:
    async def refuse(body: Any) -> Response:
        return JSONResponse({"error": "your token s3cret is bad\x1b[31m"}, status)

    with served(refuse) as endpoint, http(endpoint.url, "s3cret") as asked:
        asked.submit(group(1, ["aa", "b"]))
        caught = asked.error()
    assert isinstance(caught, error)
    assert "[redacted]" in str(caught)
    assert "s3cret" not in str(caught)
    assert "\x1b" not in str(caught)
    assert asked.disk.state().open_groups  # nothing was decided: a resume asks again


def test_an_endpoint_that_is_not_there_ends_the_run_after_the_patience_and_the_group_stays_open() -> None:
    with http(closed_port()) as asked:
        asked.submit(group(1, ["aa", "b"]))
        caught = asked.error()
    assert isinstance(caught, FlowUnavailable)
    assert "Gave up after 1 s" in str(caught)
    assert asked.disk.state().open_groups
