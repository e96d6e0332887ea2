"""The user's own scores: a Python function or an HTTP endpoint that scores the completions of some groups at once."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import numbers
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel

from rlhf_cli.errors import DataError, FlowUnavailable
from rlhf_cli.feedback.background import InBackground, Waiting
from rlhf_cli.feedback.endpoint import Endpoint, Patience, Unanswerable
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.journal.events import Event
from rlhf_cli.types import Group

Asked = dict[str, Any]
"""One group as the function sees it: `prompt` (the last turn of the user), `messages` (all turns), `completions`."""
Score = Callable[[list[Asked]], Any]

LATEST = 64
"""Groups that the mean score in the metrics is over."""
AT_ONCE = 4
"""Calls of an endpoint in flight; a Python function is called by one at a time, in one thread, always the same."""


def load_function(file: Path, name: str) -> Score:
    """The function `name` of a Python file, whose folder is put at the end of the import path.

    Raises:
        DataError: The file cannot be run, or has no such function; says what Python said.
    """
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"rlhf_function_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise DataError(f"{file}: is no Python file; run_online.function.file needs one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{file}: cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise DataError(f"{file}: has no function {name!r}; name another one in run_online.function.name")
    return found  # type: ignore[no-any-return]


class FunctionFeedback(InBackground, ABC):
    """Groups ranked by the scores that `_call` gives them: 1 for the higher score, half each for equal ones.

    No score is ever made up: where a completion has none (None), the group is ranked among those that have one, and
    where fewer than two have, or a score is not a finite number, or the call fails, the group is set aside with the
    reason. A call of several groups that fails is repeated for each of them alone, so that one takes no others along.

    Args:
        source: Provenance, such as `function:score`.
        batch: Most groups in one call.
        penalty: Taken from the score for every character of a completion.
        all_scores: Set aside groups in which a completion has no score: for learners that need a number for each.
    """

    def __init__(
        self,
        journal: Callable[[Event], object],
        source: str,
        *,
        batch: int,
        at_once: int,
        penalty: float = 0.0,
        all_scores: bool = False,
    ) -> None:
        super().__init__(journal)
        self._source, self._batch, self._at_once = source, batch, at_once
        self._penalty, self._all_scores = penalty, all_scores
        self._calls = 0
        self._latest: deque[float] = deque(maxlen=LATEST)
        self._mean: dict[str, float] = {}

    def status(self) -> dict[str, float]:
        return {**super().status(), "function/calls_total": float(self._calls), **self._mean}

    @abstractmethod
    async def _call(self, groups: list[Asked]) -> Any:
        """What the user's code returns for `groups`, unchecked.

        Raises:
            Unanswerable: It failed; says how.
        """

    async def _serve(self) -> None:
        free = asyncio.Semaphore(self._at_once)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await free.acquire()
                some = [await self._inbox.get()]
                while len(some) < self._batch and not self._inbox.empty():
                    some.append(self._inbox.get_nowait())
                tasks.create_task(self._score(some)).add_done_callback(lambda _: free.release())

    async def _score(self, some: list[Waiting]) -> None:
        self._calls += 1
        try:
            said = await self._call([asked(one.group) for one in some])
            rows = _as_list(said, len(some), "groups")
        except Unanswerable as error:
            if len(some) == 1:
                self._set_aside(some[0], f"{self._source}: {error}")
            else:
                for one in some:
                    await self._score([one])
            return
        for one, row in zip(some, rows, strict=True):
            try:
                scores = _numbers(row, one.group, self._penalty)
                if self._all_scores and None in scores:
                    raise Unanswerable("no score for one of the completions, and this learner needs all")
                known = [i for i, score in enumerate(scores) if score is not None]
                if len(known) < 2:
                    raise Unanswerable(f"a score for {len(known)} of {len(scores)} completions: nothing to compare")
            except Unanswerable as error:
                self._set_aside(one, f"{self._source}: {error}")
            else:
                complete = None not in scores
                self._latest.append(fmean(score for score in scores if score is not None))
                self._mean = {"function/score_mean": fmean(self._latest)}
                self._rank(one, self._source, wins_of(scores), complete=complete, scores=scores)


class PythonFeedback(FunctionFeedback):
    """Scores of a function in this process, `def` or `async def`."""

    def __init__(
        self, score: Score, name: str, timeout_s: float, journal: Callable[[Event], object], **given: Any
    ) -> None:
        super().__init__(journal, f"function:{name}", at_once=1, **given)
        self._timeout_s = timeout_s
        self._worker = _Worker(score, timeout_s)

    def close(self) -> None:
        super().close()
        self._worker.end()

    async def _call(self, groups: list[Asked]) -> Any:
        answer = self._worker.begin(groups)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError as error:
            if self._worker.busy_with is not answer:  # it never began, two timeouts are over
                raise FlowUnavailable(
                    f"{self._source}: a call has not come back for more than {self._timeout_s:g} s and keeps all "
                    "others waiting. Look where it hangs, or raise run_online.function.timeout_s, and resume."
                ) from error
            raise Unanswerable(f"no answer within {self._timeout_s:g} s") from error
        except Unanswerable:
            raise
        except Exception as error:
            raise Unanswerable(f"raised {type(error).__name__}: {error}"[:300]) from error


class HttpFeedback(FunctionFeedback):
    """Scores of an HTTP endpoint that takes `{"groups": [...]}` and answers `{"scores": [[...]]}`."""

    def __init__(
        self,
        url: str,
        credentials: Credentials | None,
        patience: Patience,
        journal: Callable[[Event], object],
        **given: Any,
    ) -> None:
        super().__init__(journal, f"function:{urlsplit(url).hostname}", at_once=AT_ONCE, **given)
        self._endpoint = Endpoint(url, credentials, patience)

    async def _serve(self) -> None:
        async with self._endpoint:
            await super()._serve()

    async def _call(self, groups: list[Asked]) -> Any:
        return (await self._endpoint.ask({"groups": groups}, _Scores)).scores


class _Scores(BaseModel):
    scores: list[Any]


class _Worker:
    """A thread that calls the user's function, one call after the other, and may be left behind where one hangs."""

    def __init__(self, score: Score, timeout_s: float) -> None:
        self._score, self._timeout_s = score, timeout_s
        self._calls: queue.SimpleQueue[tuple[list[Asked], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self.busy_with: asyncio.Future[Any] | None = None
        """The answer to the call that is under way."""
        self._thread = threading.Thread(target=self._run, name="rlhf-function", daemon=True)
        self._thread.start()

    def begin(self, groups: list[Asked]) -> asyncio.Future[Any]:
        """Call it; the answer belongs to the running loop."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.put((groups, answer))
        return answer

    def end(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        with asyncio.Runner() as runner:  # one loop for all calls: a client that the function keeps belongs to it
            while (call := self._calls.get()) is not None:
                groups, answer = call
                if answer.cancelled():  # waited for too long behind a call that hung
                    continue
                loop, self.busy_with = answer.get_loop(), answer
                try:
                    said = self._score(groups)
                    if inspect.isawaitable(said):
                        said = runner.run(self._finished(said))
                except BaseException as error:
                    outcome: tuple[Any, BaseException | None] = (None, error)
                else:
                    outcome = (said, None)
                try:
                    loop.call_soon_threadsafe(_settle, answer, *outcome)
                except RuntimeError:  # the loop was closed: nobody waits for this answer any more
                    return

    async def _finished(self, said: Any) -> Any:
        async with asyncio.timeout(self._timeout_s):
            return await said


def _settle(answer: asyncio.Future[Any], said: Any, error: BaseException | None) -> None:
    if answer.done():  # too late
        return
    if error is None:
        answer.set_result(said)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        answer.set_exception(error)
    else:  # what would end this thread and not the call
        answer.set_exception(Unanswerable(f"raised {type(error).__name__}: {error}"))


def asked(group: Group) -> Asked:
    """The group as the user's code sees it, fit for JSON."""
    return {
        "prompt": group.prompt.text,
        "messages": [{"role": m.role, "content": m.content} for m in group.prompt.messages],
        "completions": [c.text for c in group.completions],
    }


def wins_of(scores: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(G, G) votes: one a pair, for the higher score; half each where they are equal, none where one is unknown."""
    known_G = np.array([score is not None for score in scores])
    scores_G = np.array([0.0 if score is None else score for score in scores])
    wins_GG = (scores_G[:, None] > scores_G[None, :]) + 0.5 * (scores_G[:, None] == scores_G[None, :])
    wins_GG = wins_GG * np.outer(known_G, known_G)
    np.fill_diagonal(wins_GG, 0)
    return np.asarray(wins_GG, dtype=np.float64)


def _numbers(row: Any, group: Group, penalty: float) -> list[float | None]:
    """Scores of one group, less the penalty for length.

    Raises:
        Unanswerable: Not one for each completion, or one that is neither None nor a finite number.
    """
    scores: list[float | None] = []
    for score, completion in zip(_as_list(row, len(group.completions), "completions"), group.completions, strict=True):
        if score is None:
            scores.append(None)
            continue
        try:
            number = float(score) if isinstance(score, numbers.Real) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise Unanswerable(f"{str(score)[:40]!r} is not a finite number; None says that there is no label")
        scores.append(number - penalty * len(completion.text))
    return scores


def _as_list(said: Any, size: int, what: str) -> list[Any]:
    try:
        rows = None if isinstance(said, str | bytes | dict) else list(said)
    except Exception:  # whatever the user's object raises
        rows = None
    if rows is None:
        raise Unanswerable(f"answered {type(said).__name__} where a list for {size} {what} was asked for")
    if len(rows) != size:
        raise Unanswerable(f"answered {len(rows)} values for {size} {what}")
    return rows
