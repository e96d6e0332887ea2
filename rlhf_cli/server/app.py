"""The server as one ASGI application."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.server import flow_api, vote_api
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.requests import HostCheck, database_trouble, gone, problem
from rlhf_cli.server.store import Store

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def create_app(store: Store, hosts: Collection[str] = LOOPBACK) -> Starlette:
    """The ranking-flow protocol and the voting API over `store`; requests for other host names are refused."""
    app = Starlette(
        routes=[Route("/healthz", _healthz, methods=["GET"]), *flow_api.routes, *vote_api.routes],
        middleware=[Middleware(HostCheck, hosts=hosts)],
        exception_handlers={
            Problem: problem,
            HTTPException: _not_routed,
            ClientDisconnect: gone,
            sqlite3.OperationalError: database_trouble,
        },
    )
    app.state.store = store
    return app


async def _healthz(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _not_routed(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, answered like every other refusal."""
    assert isinstance(error, HTTPException)
    return await problem(request, Problem(error.status_code, error.detail))
