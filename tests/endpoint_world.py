"""A real HTTP endpoint at a loopback port that answers, or fails, as a test tells it to; and what feedback decided."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flow_world import until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from stream_world import Disk

from rlhf_cli.feedback.background import InBackground
from rlhf_cli.feedback.endpoint import Patience
from rlhf_cli.journal.events import GroupSampled
from rlhf_cli.server.protocol import listen, server_of
from rlhf_cli.types import Group, RankedGroup, Unranked

QUICK = Patience(attempt_s=5.0, outage_s=1.0, pause_s=0.01)
Answer = Callable[[Any], Awaitable[Response]]


@dataclass
class Endpoint:
    """What came in, and what goes out."""

    answer: Answer
    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    now: int = 0
    """Requests that are being answered."""
    most: int = 0
    """Most of them at a time."""

    async def post(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.paths.append(request.url.path)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self.answer(self.bodies[-1])
        finally:
            self.now -= 1


@contextlib.contextmanager
def served(answer: Answer) -> Iterator[Endpoint]:
    endpoint, listening = Endpoint(answer), listen("127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = server_of(Starlette(routes=[Route("/{path:path}", endpoint.post, methods=["POST"])]))
    server.config.timeout_graceful_shutdown = 0
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def closed_port() -> str:
    """An address at which nobody answers."""
    with contextlib.closing(listen("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def cut_off() -> Response:
    """An answer whose connection breaks in the middle."""

    async def half() -> Any:
        yield b'{"half":'
        raise ConnectionResetError

    return StreamingResponse(half(), headers={"Content-Length": "100"})


def fails(status: int, **headers: str) -> Response:
    return JSONResponse(
        {"error": f"no: {status}"}, status, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


class Asked:
    """A feedback in the background, and what it has decided."""

    def __init__(self, disk: Disk, feedback: InBackground) -> None:
        self.disk, self.feedback = disk, feedback
        self.decided: dict[str, RankedGroup | Unranked] = {}

    def submit(self, *groups: Group) -> None:
        for group in groups:
            self.disk.append(GroupSampled.of(group))
            self.feedback.submit(group)

    def has(self, count: int) -> bool:
        self.decided |= {outcome.group.id: outcome for outcome in self.feedback.collect()}
        return len(self.decided) >= count

    def ranked(self, group: Group) -> RankedGroup:
        until(lambda: self.has(0) and group.id in self.decided)
        outcome = self.decided[group.id]
        assert isinstance(outcome, RankedGroup), outcome
        return outcome

    def reason(self, group: Group) -> str:
        until(lambda: self.has(0) and group.id in self.decided)
        outcome = self.decided[group.id]
        assert isinstance(outcome, Unranked), outcome
        return outcome.reason

    def error(self) -> BaseException:
        try:
            until(lambda: self.has(10**6))
        except AssertionError:
            raise
        except Exception as error:
            return error
        raise AssertionError("unreachable")
