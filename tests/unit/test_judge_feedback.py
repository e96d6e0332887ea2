"""A language model as the judge: both orders or nothing, paid once, never beyond the budget."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint_world import QUICK, Asked, closed_port, fails, served
from flow_world import group, until
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response
from stream_world import Disk

from rlhf_cli.errors import BudgetReached, CredentialsError, FlowRefused, FlowUnavailable
from rlhf_cli.feedback.answers import Answer, Answers
from rlhf_cli.feedback.judge import JudgeFeedback, pairs_of, question
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import GroupRanked
from rlhf_cli.ranking.bradley_terry import components
from rlhf_cli.recipe.online import Judge
from rlhf_cli.types import Message, Prompt

TOKENS = 100
"""Of every answer; at 1,000 USD a million they cost 0.1 USD."""
PRICE = {"usd_per_1m_tokens": 1000.0}


def reply(text: str | None, tokens: int | None = TOKENS) -> Response:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": tokens - 1, "total_tokens": tokens}}
    return JSONResponse(
        {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], **usage}
    )


def shown(body: Any) -> tuple[str, str]:
    """The two answers in a request, as the template below puts them."""
    _, a, b = body["messages"][0]["content"].split("|")
    return a, b


async def longer(body: Any) -> Response:
    a, b = shown(body)
    return reply("A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie")


def always(text: str | None) -> Callable[[Any], Any]:
    async def answer(body: Any) -> Response:
        return reply(text)

    return answer


@contextmanager
def judged(
    url: str, folder: Path, disk: Disk | None = None, secret: str = "", budget_usd: float | None = None, **keys: Any
) -> Iterator[Asked]:
    disk = disk or Disk()
    settings = Judge.model_validate({"url": f"{url}/v1", "model": "m", "prompt": "{prompt}|{a}|{b}", **keys})
    credentials = Credentials(token=secret, origin="$KEY") if secret else None
    answers = Answers(folder / "judge" / "answers.jsonl")
    feedback = JudgeFeedback(settings, credentials, answers, disk.append, seed=7, budget_usd=budget_usd, patience=QUICK)
    yield Asked(disk, feedback)
    feedback.close()


def test_a_pair_is_one_vote_for_what_both_orders_name(tmp_path: Path) -> None:
    one = group(1, ["a", "ccc", "bb"])
    with served(longer) as endpoint, judged(endpoint.url, tmp_path, secret="s3cret", **PRICE) as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
        status = asked.feedback.status()
    assert ranked.wins.wins.tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert (ranked.source, ranked.complete, ranked.scores, ranked.votes_paid) == ("judge:m", True, None, 0.0)
    assert not asked.disk.of(GroupRanked)[0].by_people
    assert status["judge/requests_total"] == 6  # three pairs, both orders
    assert status["judge/usd"] == pytest.approx(0.6)
    assert status["judge/usd_per_group"] == pytest.approx(0.6)
    assert status["judge/position_bias"] == 0
    assert status["judge/inconsistent_frac"] == 0
    assert set(endpoint.paths) == {"/v1/chat/completions"}
    assert all(body["model"] == "m" and body["temperature"] == 0 for body in endpoint.bodies)
    assert all(headers["authorization"] == "Bearer s3cret" for headers in endpoint.headers)
    assert sorted(shown(body) for body in endpoint.bodies) == sorted(
        (a, b) for a in ("a", "bb", "ccc") for b in ("a", "bb", "ccc") if a != b
    )


@pytest.mark.parametrize(("text", "bias"), [("A", 0.5), ("B", -0.5)])
def test_a_judge_that_always_names_one_side_says_nothing_and_its_bias_is_shown(
    tmp_path: Path, text: str, bias: float
) -> None:
    one = group(1, ["a", "bb", "ccc"])
    with served(always(text)) as endpoint, judged(endpoint.url, tmp_path) as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
        status = asked.feedback.status()
    assert ranked.wins.wins.tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    assert status["judge/position_bias"] == bias
    assert status["judge/inconsistent_frac"] == 1


def test_the_bias_of_one_judge_is_not_mixed_with_that_of_another_in_the_same_run_folder(tmp_path: Path) -> None:
    one = group(1, ["a", "bb", "ccc"])
    for model, text, bias in (("first", "A", 0.5), ("second", "B", -0.5), ("first", "A", 0.5)):
        with served(always(text)) as endpoint, judged(endpoint.url, tmp_path, model=model) as asked:
            asked.submit(one)
            asked.ranked(one)
            assert asked.feedback.status()["judge/position_bias"] == bias


def test_a_tie_in_one_order_halves_that_order_alone(tmp_path: Path) -> None:
    async def answer(body: Any) -> Response:
        return reply("A" if shown(body) == ("a", "bb") else "tie")

    one = group(1, ["a", "bb"])
    with served(answer) as endpoint, judged(endpoint.url, tmp_path) as asked:
        asked.submit(one)
        assert asked.ranked(one).wins.wins.tolist() == [[0, 0.75], [0.25, 0]]


def test_a_pair_with_one_order_unanswered_has_no_vote(tmp_path: Path) -> None:
    async def answer(body: Any) -> Response:
        return reply("I cannot say.") if shown(body) == ("bb", "a") else await longer(body)

    one = group(1, ["a", "bb", "ccc"])
    with served(answer) as endpoint, judged(endpoint.url, tmp_path) as asked:
        asked.submit(one)
        ranked = asked.ranked(one)
        assert asked.feedback.status()["judge/unusable_frac"] == pytest.approx(1 / 6)
    assert ranked.wins.wins.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert not ranked.complete


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: reply("Both are fine."), "its last line is none of A, B, tie: 'Both are fine.'"),
        (lambda: reply(None), "its last line is none of A, B, tie: ''"),
        (lambda: fails(400), "answered 400"),
        (lambda: fails(500), "answered 500"),
        (lambda: JSONResponse({"choices": []}), "is not what was asked for (choices"),
        (lambda: Response(b"oops"), "is not what was asked for"),
    ],
)  # fmt: skip
def test_a_group_without_any_verdict_is_set_aside_with_the_reason(
    tmp_path: Path, answer: Callable[[], Response], said: str
) -> None:
    async def always_so(body: Any) -> Response:
        return answer()

    one = group(1, ["a", "bb"])
    with served(always_so) as endpoint, judged(endpoint.url, tmp_path) as asked:
        asked.submit(one)
        reason = asked.reason(one)
    assert "no usable answer to any pair" in reason
    assert said in reason


def test_what_raters_would_see_once_the_judge_sees_once_and_nothing_to_compare_is_not_paid(tmp_path: Path) -> None:
    double, same = group(1, ["a", "bb", "a ", ""]), group(2, ["a", " a"])
    with served(longer) as endpoint, judged(endpoint.url, tmp_path) as asked:
        asked.submit(double, same)
        assert asked.ranked(double).wins.wins.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert "nothing to compare" in asked.reason(same)
    assert len(endpoint.bodies) == 2


# --- what is paid is kept


def test_an_answer_is_paid_once_whatever_is_asked_again(tmp_path: Path) -> None:
    with served(longer) as endpoint:
        for n in range(3):  # three processes, two groups each that ask the same
            with judged(endpoint.url, tmp_path, **PRICE) as asked:
                asked.submit(group(2 * n, ["a", "bb", "ccc"]), group(2 * n + 1, ["a", "bb", "ccc"]))
                until(lambda asked=asked: asked.has(2))
                status = asked.feedback.status()
                assert asked.ranked(group(2 * n, [])).wins == asked.ranked(group(2 * n + 1, [])).wins
            assert len(endpoint.bodies) == 6
            assert status["judge/usd"] == pytest.approx(0.6)
            assert status["judge/position_bias"] == 0
    assert status["judge/cached_frac"] == 1
    assert status["judge/requests_total"] == 0


def test_only_the_answer_that_a_kill_tore_is_asked_for_again(tmp_path: Path) -> None:
    one, again = group(1, ["a", "bb", "ccc"]), group(2, ["a", "bb", "ccc"])
    file = tmp_path / "judge" / "answers.jsonl"
    with served(longer) as endpoint:
        with judged(endpoint.url, tmp_path) as asked:
            asked.submit(one)
            before = asked.ranked(one).wins
        file.write_bytes(file.read_bytes()[:-20])
        with judged(endpoint.url, tmp_path) as asked:
            asked.submit(again)
            assert asked.ranked(again).wins == before
        assert len(endpoint.bodies) == 7
    assert len(Answers(file)) == 6


def test_another_model_endpoint_or_template_is_another_question(tmp_path: Path) -> None:
    keys = {Answers.key(url, model, text) for url in ("u", "v") for model in ("m", "n") for text in ("p", "q")}
    assert len(keys) == 8


def test_what_is_under_way_at_the_end_is_waited_for_and_kept(tmp_path: Path) -> None:
    async def slow(body: Any) -> Response:
        await asyncio.sleep(0.3)
        return await longer(body)

    disk = Disk()
    with served(slow) as endpoint:
        with judged(endpoint.url, tmp_path, disk, at_once=2) as asked:
            asked.submit(group(1, ["a", "bb", "ccc"]))
            until(lambda: endpoint.now == 2)
        paid = len(endpoint.bodies)
        assert len(Answers(tmp_path / "judge" / "answers.jsonl")) == paid == 2
        assert disk.state().open_groups  # not decided: a resume asks for the rest
        with judged(endpoint.url, tmp_path, disk) as asked:
            asked.feedback.resume(disk.state().open_groups)
            until(lambda: asked.has(1))
        assert len(endpoint.bodies) == 6


# --- the budget


def test_the_budget_is_never_passed_and_a_larger_one_goes_on_without_paying_again(tmp_path: Path) -> None:
    one, disk = group(1, ["a", "bb", "ccc", "dddd"]), Disk()  # 12 answers of 0.1 USD
    with served(longer) as endpoint:
        with judged(endpoint.url, tmp_path, disk, budget_usd=0.55, **PRICE) as asked:
            asked.submit(one)
            error = asked.error()
        assert isinstance(error, BudgetReached)
        assert "budget.usd of 0.55" in str(error)
        assert len(endpoint.bodies) == len(Answers(tmp_path / "judge" / "answers.jsonl")) == 5
        with judged(endpoint.url, tmp_path, disk, budget_usd=1.2, **PRICE) as asked:
            asked.feedback.resume(disk.state().open_groups)
            asked.ranked(one)
            assert asked.feedback.status()["judge/usd"] == pytest.approx(1.2)
        assert len(endpoint.bodies) == 12


def test_before_the_first_price_is_known_one_request_goes_alone(tmp_path: Path) -> None:
    first = asyncio.Event()

    async def answer(body: Any) -> Response:
        if not first.is_set():
            await asyncio.sleep(0.2)
            alone.append(endpoint.now)
            first.set()
        return await longer(body)

    alone: list[int] = []
    with served(answer) as endpoint, judged(endpoint.url, tmp_path, budget_usd=100.0, **PRICE) as asked:
        asked.submit(group(1, ["a", "bb", "ccc", "dddd"]))
        until(lambda: asked.has(1))
    assert alone == [1]


def test_an_endpoint_that_does_not_count_tokens_cannot_be_counted_against_money(tmp_path: Path) -> None:
    async def uncounted(body: Any) -> Response:
        return reply("A", None)

    with served(uncounted) as endpoint:
        with judged(endpoint.url, tmp_path, at_once=1, **PRICE) as asked:
            asked.submit(group(1, ["a", "bb"]))
            error = asked.error()
        assert isinstance(error, FlowRefused)
        assert "usd_per_1m_tokens" in str(error)
        with judged(endpoint.url, tmp_path) as asked:  # nobody counts
            asked.submit(one := group(2, ["a", "bb"]))
            asked.ranked(one)
        assert len(endpoint.bodies) == 2


@pytest.mark.parametrize("usage", [{"total_tokens": TOKENS}, {"prompt_tokens": TOKENS - 1, "completion_tokens": 1}])
def test_tokens_are_counted_however_the_endpoint_tells_them(tmp_path: Path, usage: dict[str, int]) -> None:
    async def counted(body: Any) -> Response:
        return JSONResponse({"choices": [{"message": {"content": "A"}}], "usage": usage})

    with served(counted) as endpoint, judged(endpoint.url, tmp_path, **PRICE) as asked:
        asked.submit(one := group(1, ["a", "bb"]))
        asked.ranked(one)
        assert asked.feedback.status()["judge/usd"] == pytest.approx(2 * TOKENS / 1000)


# --- the endpoint


def test_so_many_requests_are_in_flight_and_no_more(tmp_path: Path) -> None:
    async def slow(body: Any) -> Response:
        await asyncio.sleep(0.02)
        return await longer(body)

    with served(slow) as endpoint, judged(endpoint.url, tmp_path, at_once=3) as asked:
        asked.submit(*(group(n, [f"{n}", f"{n}b", f"{n}cc"]) for n in range(4)))
        until(lambda: asked.has(4))
    assert endpoint.most == 3
    assert len(endpoint.bodies) == 24


@pytest.mark.parametrize("fault", [fails(429, Retry_After="0"), fails(503), fails(529)], ids=["429", "503", "529"])
def test_a_fault_that_passes_changes_nothing(tmp_path: Path, fault: Response) -> None:
    faults = [fault, fault]

    async def answer(body: Any) -> Response:
        return faults.pop() if faults else await longer(body)

    one = group(1, ["a", "bb"])
    with served(answer) as endpoint, judged(endpoint.url, tmp_path) as asked:
        asked.submit(one)
        assert asked.ranked(one).wins.wins.tolist() == [[0, 0], [1, 0]]
    assert len(endpoint.bodies) == 4


@pytest.mark.parametrize(("status", "error"), [(401, CredentialsError), (404, FlowRefused), (402, FlowRefused)])
def test_a_judge_that_will_never_answer_ends_the_run_and_the_key_is_in_no_message_and_no_file(
    tmp_path: Path, status: int, error: type[Exception]
) -> None:
    calls = 0

    async def answer(body: Any) -> Response:
        nonlocal calls
        calls += 1
        return await longer(body) if calls == 1 else JSONResponse({"error": "key s3cret"}, status)

    with served(answer) as endpoint, judged(endpoint.url, tmp_path, secret="s3cret", at_once=1) as asked:
        asked.submit(group(1, ["a", "bb"]))
        caught = asked.error()
    assert isinstance(caught, error)
    assert "s3cret" not in str(caught)
    assert "s3cret" not in "".join(file.read_text() for file in tmp_path.rglob("*.jsonl"))
    assert asked.disk.state().open_groups


def test_a_judge_that_is_not_there_ends_the_run_after_the_patience_and_the_group_stays_open(tmp_path: Path) -> None:
    with judged(closed_port(), tmp_path) as asked:
        asked.submit(group(1, ["a", "bb"]))
        assert isinstance(asked.error(), FlowUnavailable)
    assert asked.disk.state().open_groups


# --- words and pairs


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0), ("b", 0.0), ("**B**", 0.0), (" [[A]]\n", 1.0), ("Answer: B.", 0.0), ("Tie", 0.5),
        ("<think>A is long, B is short.</think>\n\nB", 0.0), ("A is better because B is rude.\nVerdict follows.", None),
        ("A or B", None), ("AB", None), ("C", None), ("", None), ("\n", None), ("A better answer is B", None),
    ],
)  # fmt: skip
def test_the_last_line_has_to_be_a_verdict_and_nothing_else(text: str, value: float | None) -> None:
    assert Answer(text, 1).for_first == value


def test_braces_inside_of_completions_stay_what_they_are() -> None:
    asked = Prompt("p", (Message("user", "What is {b}?"),))
    assert question("{prompt} [{a}] [{b}] {c}", asked, "{b} {prompt}", "two") == "What is {b}? [{b} {prompt}] [two] {c}"


def test_a_conversation_is_shown_whole() -> None:
    asked = Prompt("p", (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why?")))
    assert question("{prompt}{a}{b}", asked, "", "") == "user: Hi\n\nassistant: Yes?\n\nuser: Why?"


@given(size=st.integers(2, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_fewer_pairs_still_compare_every_completion_with_every_other_through_a_chain(
    size: int, share: float, seed: int
) -> None:
    most = size - 1 + round(share * (size * (size - 1) // 2 - size + 1))
    chosen = pairs_of(size, most, random.Random(seed))
    assert len(set(chosen)) == len(chosen) == most
    assert set(chosen) <= set(combinations(range(size), 2))
    met = np.zeros((size, size), dtype=bool)
    for i, j in chosen:
        met[i, j] = met[j, i] = True
    assert len(set(components(met).tolist())) == 1
    assert list(pairs_of(size, most, random.Random(seed))) == list(chosen)


@pytest.mark.parametrize(
    ("source", "people"),
    [
        ("item:7", True),
        ("recorded:abc/item:7", True),
        ("judge:item:7", False),
        ("judge:org/item:7", False),
        ("recorded:abc/judge:org/item:7", False),
    ],
)
def test_a_judge_is_not_people_whatever_its_model_is_called(source: str, people: bool) -> None:
    ranked = GroupRanked(group_id="g", source=source, wins=((0, 1), (0, 0)), latency_s=0, complete=True)
    assert ranked.by_people == people
