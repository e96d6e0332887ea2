"""The server as one ASGI application."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.server import dashboard, flow_api, media_api, owner_api, results_api, site, token_api, vote_api
from rlhf_cli.server.limits import Guard, Limits
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.requests import FrontDoor, database_trouble, gone, problem
from rlhf_cli.server.session import PageHeaders
from rlhf_cli.server.store import Store

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def create_app(
    store: Store,
    hosts: Collection[str] = LOOPBACK,
    limits: Limits | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> Starlette:
    """The ranking-flow protocol and the voting API over `store`.

    Args:
        hosts: Names and addresses that are ours; requests for others are refused.
        limits: How often somebody may ask; None for a server inside the process that uses it.
    """
    guard = Guard(limits, monotonic)
    app = Starlette(
        routes=[
            *vote_api.routes,
            *flow_api.routes,
            *results_api.routes,
            *media_api.routes,
            *token_api.routes,
            *owner_api.routes,
            *dashboard.routes,
            *site.routes,
            Route("/healthz", _healthz, methods=["GET"]),
        ],
        middleware=[Middleware(PageHeaders), Middleware(FrontDoor, hosts=hosts, guard=guard)],
        exception_handlers={
            Problem: problem,
            HTTPException: _not_routed,
            ClientDisconnect: gone,
            sqlite3.OperationalError: database_trouble,
        },
    )
    app.state.store = store
    app.state.guard = guard
    return app


async def _healthz(request: Request) -> Response:
    """Alive, and the database answers."""
    request.app.state.store.tokens.authenticate("")
    return JSONResponse({"status": "ok"})


async def _not_routed(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, answered like every other refusal."""
    assert isinstance(error, HTTPException)
    return await problem(request, Problem(error.status_code, error.detail))
