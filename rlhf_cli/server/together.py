"""Requests that arrive together are committed together: one flush to disk, and each of them all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_cli.server.database import Database

T = TypeVar("T")


class Together:
    """Runs pieces of work inside one transaction per turn of the event loop; use within one loop.

    While the disk flushes, requests queue up in their sockets, so the slower the disk, the more share the next flush.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    async def __call__(self, work: Callable[[], T]) -> T:
        """What `work` returns, durable by then; what it raises has left no trace in the database."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append((work, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._commit)
        return await future

    def _commit(self) -> None:
        batch, self._waiting = self._waiting, []
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            with self._database.transaction():
                for work, _ in batch:
                    try:
                        with self._database.part():
                            outcomes.append((work(), None))
                    except Exception as error:
                        if self._database.lost:
                            raise
                        outcomes.append((None, error))
        except Exception as error:  # nothing of the batch was kept
            outcomes = [(None, error)] * len(batch)
        for (_, future), (result, failure) in zip(batch, outcomes, strict=True):
            if future.done():  # whoever asked has gone
                continue
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
