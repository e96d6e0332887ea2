"""A language model compares completions two by two, each pair in both orders, since many prefer what they read first.

A pair is one vote: where both orders name the same completion it gets the whole vote, where they contradict each other
each gets half. A pair of which one order has no usable answer has no vote.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from pydantic import BaseModel, Field

from rlhf_cli.errors import BudgetReached, FlowRefused
from rlhf_cli.feedback.answers import Answer, Answers
from rlhf_cli.feedback.background import InBackground, Waiting
from rlhf_cli.feedback.endpoint import Endpoint, Patience, Unanswerable
from rlhf_cli.feedback.items import Shown
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import Event
from rlhf_cli.ranking.pairs import Pair, choose_pair
from rlhf_cli.recipe.online import Judge
from rlhf_cli.types import Group, Prompt, WinMatrix

CLOSING_S = 10.0
"""How long requests that are under way at the end may take: their answers are paid for, and kept for a resume."""
_PLACE = re.compile(r"\{(prompt|a|b)\}")


class JudgeFeedback(InBackground):
    """`Feedback` by a language model at an OpenAI-compatible endpoint.

    Args:
        credentials: Hold the key; None asks without one.
        answers: Those that are known already.
        seed: Chooses the pairs, where the recipe says not to compare all.
        budget_usd: What may be spent in this run folder, at the recipe's price of tokens; reaching it ends the asking.
        patience: For tests.
    """

    def __init__(
        self,
        judge: Judge,
        credentials: Credentials | None,
        answers: Answers,
        journal: Callable[[Event], object],
        *,
        seed: int = 0,
        budget_usd: float | None = None,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(journal)
        self._judge, self._answers, self._seed, self._budget_usd = judge, answers, seed, budget_usd
        url = judge.url.rstrip("/") + "/chat/completions"
        self._endpoint = Endpoint(url, credentials, patience or Patience(judge.timeout_s))
        self._slots = asyncio.Semaphore(judge.at_once)
        self._under_way: dict[str, asyncio.Task[Answer]] = {}
        self._questions = self._cached = self._unusable = self._pairs = self._inconsistent = self._groups = 0
        self._clear = self._first = 0
        """Verdicts that name one side, and those for what was shown first."""

    def status(self) -> dict[str, float]:
        row = {
            **super().status(),
            "judge/requests_total": float(self._endpoint.requests),
            "judge/usd": self._usd(self._answers.tokens),
        }
        if self._clear:
            row["judge/position_bias"] = self._first / self._clear - 0.5
        if self._questions:
            row["judge/cached_frac"] = self._cached / self._questions
            row["judge/unusable_frac"] = self._unusable / self._questions
        if self._pairs:
            row["judge/inconsistent_frac"] = self._inconsistent / self._pairs
        if self._groups and len(self._answers):
            each = self._usd(self._answers.tokens) / len(self._answers)
            row["judge/usd_per_group"] = each * self._questions / self._groups
        return row

    async def _serve(self) -> None:
        async with self._endpoint:
            try:
                async with asyncio.TaskGroup() as tasks:
                    while True:
                        tasks.create_task(self._compare(await self._inbox.get()))
            finally:
                if last := list(self._under_way.values()):
                    _, late = await asyncio.wait(last, timeout=CLOSING_S)
                    for task in late:
                        task.cancel()
                    await asyncio.gather(*last, return_exceptions=True)

    async def _compare(self, waiting: Waiting) -> None:
        group = waiting.group
        shown = Shown.of(group.id, [c.text for c in group.completions])
        if len(shown.texts) < 2:
            why = "fewer than two different completions that are not empty: nothing to compare"
            self._set_aside(waiting, why)
            return
        chosen = pairs_of(len(shown.texts), self._judge.comparisons, random.Random(f"{self._seed}/{group.index}"))
        reasons: list[str] = []
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._share(group, shown.texts[i], shown.texts[j], reasons)) for i, j in chosen]
        shares = [task.result() for task in asked]
        self._groups += 1
        wins_GG = np.zeros((len(shown.texts), len(shown.texts)))
        for (i, j), share in zip(chosen, shares, strict=True):
            if share is not None:
                wins_GG[i, j], wins_GG[j, i] = share, 1 - share
        if not wins_GG.any():
            self._set_aside(waiting, f"the judge has no usable answer to any pair, the latest: {reasons[-1]}")
            return
        wins = shown.over_all(WinMatrix(wins_GG)).wins
        self._rank(waiting, f"judge:{self._judge.model}", wins, complete=None not in shares)

    async def _share(self, group: Group, first: str, second: str, reasons: list[str]) -> float | None:
        """The share of a vote that `first` gets against `second`; None where one order has no usable answer."""
        async with asyncio.TaskGroup() as tasks:
            orders = [
                tasks.create_task(self._verdict(question(self._judge.prompt, group.prompt, a, b), reasons))
                for a, b in ((first, second), (second, first))
            ]
        forward, backward = (task.result() for task in orders)
        if forward is None or backward is None:
            return None
        self._pairs += 1
        self._inconsistent += forward != 1 - backward
        return (forward + 1 - backward) / 2

    async def _verdict(self, asked: str, reasons: list[str]) -> float | None:
        try:
            answer = await self._answer(asked)
        except Unanswerable as error:
            verdict = None
            reasons.append(str(error))
        else:
            verdict = answer.for_first
            if verdict is None:
                reasons.append(f"its last line is none of A, B, tie: {answer.text.strip()[-80:]!r}")
        self._questions += 1
        self._unusable += verdict is None
        self._clear += verdict in (0, 1)
        self._first += verdict == 1
        return verdict

    async def _answer(self, asked: str) -> Answer:
        """From disk, else bought, once however many groups ask the same at the same time."""
        key = Answers.key(self._judge.url, self._judge.model, asked)
        async with self._slots:
            if self._budget_usd is not None:
                await self._first_price()
            if key not in self._under_way:
                if (known := self._answers.get(key)) is not None:
                    self._cached += 1
                    return known
                self._check_budget()
                buying = asyncio.create_task(self._bought(key, asked))
                self._under_way[key] = buying
                buying.add_done_callback(lambda _: self._under_way.pop(key))
            # What is under way is paid for: it ends, and is kept, even where this group is given up.
            return await asyncio.shield(self._under_way[key])

    async def _bought(self, key: str, asked: str) -> Answer:
        body = {"model": self._judge.model, "messages": [{"role": "user", "content": asked}], "temperature": 0}
        said = await self._endpoint.ask(body, _Reply)
        answer = Answer(said.choices[0].message.content or "", said.usage.total if said.usage else None)
        self._answers.put(key, answer)
        if answer.tokens is None and self._judge.usd_per_1m_tokens:
            raise FlowRefused(
                f"{self._judge.url} does not say how many tokens an answer took, so judge.usd_per_1m_tokens cannot be "
                "counted. Set it to 0 to go on without counting money."
            )
        return answer

    async def _first_price(self) -> None:
        """Let one request go first: before it is answered nobody knows what one costs."""
        while not self._answers.dearest and self._under_way:
            await asyncio.wait(self._under_way.values(), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # it leaves `_under_way` in a callback

    def _check_budget(self) -> None:
        """Raise where one more request may not fit, each under way taken to be as dear as the dearest yet."""
        most = self._answers.tokens + (len(self._under_way) + 1) * self._answers.dearest
        if self._budget_usd is not None and self._usd(most) > self._budget_usd:
            raise BudgetReached(
                f"the judge has cost {self._usd(self._answers.tokens):.2f} USD, and one more answer may go beyond "
                f"budget.usd of {self._budget_usd:g}; raise it and --resume"
            )

    def _usd(self, tokens: int) -> float:
        return tokens * self._judge.usd_per_1m_tokens / 1e6


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    """Some endpoints leave out the total, others all but the total."""

    total_tokens: int | None = Field(None, ge=0)
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)

    @property
    def total(self) -> int | None:
        return self.total_tokens or (self.prompt_tokens + self.completion_tokens) or None


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def pairs_of(size: int, most: int | None, rng: random.Random) -> Sequence[Pair]:
    """Pairs of a group to compare: all, or so many that connect it first and then show every completion equally."""
    everything = list(combinations(range(size), 2))
    if most is None or most >= len(everything):
        return everything
    chosen: list[Pair] = []
    nothing = WinMatrix(np.zeros((size, size)))
    while len(chosen) < most:
        pair = choose_pair(nothing, dict.fromkeys(chosen, 1), chosen, rng, "balanced")
        assert pair is not None  # there are more than `most`
        chosen.append(pair)
    return chosen


def question(template: str, prompt: Prompt, a: str, b: str) -> str:
    """The recipe's words with prompt and completions filled in; braces inside of these stay what they are."""
    turns = prompt.messages
    asked = prompt.text if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    values = {"prompt": asked, "a": a, "b": b}
    return _PLACE.sub(lambda match: values[match[1]], template)
