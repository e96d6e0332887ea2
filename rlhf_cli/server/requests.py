"""Reading requests and writing answers, the same way for every route."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from rlhf_cli.server import session
from rlhf_cli.server.limits import Guard
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.store import Once, Store
from rlhf_cli.server.tokens import Role, Token

MAX_BODY_BYTES = 1024 * 1024
MAX_DEPTH = 32
BODY_S = 60.0
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")

Model = TypeVar("Model", bound=BaseModel)
Handler = Callable[[Request, Store, Token], Awaitable[Response]]
TITLES = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    501: "Not Implemented",
    503: "Service Unavailable",
}


def for_role(*roles: Role, browser: bool = False) -> Callable[[Handler], Callable[[Request], Awaitable[Response]]]:
    """Make a route out of a handler that only these roles may use; with `browser`, a session will do for a token."""

    def route(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            store: Store = request.app.state.store
            guard: Guard = request.app.state.guard
            token = whose(request, store)
            if token is None and browser and "Authorization" not in request.headers:
                token = session.person(request, store.tokens)
            if token is None:
                guard.refused(address_of(request))
                return Response(status_code=401, headers={"WWW-Authenticate": "Bearer"})
            guard.token(token)
            if token.role not in roles:
                raise Problem(403, f"a token of role {token.role} may not do this")
            return await handler(request, store, token)

        return endpoint

    return route


def whose(request: Request, store: Store) -> Token | None:
    """Whose request this is, by its bearer token; None when there is none that is valid."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return store.tokens.authenticate(secret.strip()) if scheme.lower() == "bearer" else None


def address_of(request: Request) -> str:
    """Where a request comes from; held in memory to count by, and written down nowhere."""
    return request.client.host if request.client else ""


async def read_bytes(request: Request, at_most: int = MAX_BODY_BYTES) -> bytes:
    """The whole body.

    Raises:
        Problem: 413 when it is larger than `at_most`; the rest of it is not read. 408 when it does not end.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > at_most:
                    raise Problem(413, f"a body may have {at_most} bytes")
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {BODY_S:.0f} s") from None
    return bytes(content)


def parse(content: bytes) -> Any:
    """JSON as the standard has it.

    Raises:
        Problem: 400 for anything else, `NaN`, repeated members and nesting deeper than 32.
    """
    try:
        if _depth(content) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        return _DECODER.decode(content.decode())
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from None


async def read(request: Request, model: type[Model]) -> tuple[Model, Once | None]:
    """The body as a model, and its idempotency key where it came with one.

    Raises:
        Problem: 400 when it is not JSON as the standard has it (NaN and repeated members refused) or not such a model.
    """
    content = await read_bytes(request)
    document = parse(content)
    try:
        parsed = model.model_validate(document)
    except ValidationError as error:
        errors: dict[str, list[str]] = {}
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            errors.setdefault(".".join(str(part) for part in problem["loc"]) or "body", []).append(problem["msg"])
        raise Problem(400, "the body is not valid", errors) from None
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= 255:
        raise Problem(400, "an Idempotency-Key has 1 to 255 characters")
    return parsed, None if key is None else Once(key, content)


def whole_number(request: Request, name: str, default: int, most: int) -> int:
    """A query parameter from 1 to `most`."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
        raise Problem(400, f"{name} must be a whole number from 1 to {most}", {name: [f"not 1 to {most}"]})
    return int(text)


async def problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(error.status, "Error"),
        "status": error.status,
        "detail": error.detail,
        "instance": request.url.path,
    }
    if error.errors:
        document["errors"] = error.errors
    wait_s = error.retry_after_s
    headers = {} if wait_s is None else {"Retry-After": str(wait_s)}
    return JSONResponse(document, error.status, headers, media_type="application/problem+json")


async def database_trouble(request: Request, error: Exception) -> Response:
    """A full disk or a locked file: nothing was kept, so the caller must come back."""
    assert isinstance(error, sqlite3.OperationalError)
    return await problem(request, Problem(503, "the database cannot take this now"))


async def gone(request: Request, error: Exception) -> Response:
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=400)  # nobody is there to read it


class FrontDoor:
    """What every request passes first: only names that are ours are answered, and no address may ask too often.

    A browser sends the name it believes to talk to, so a web page cannot reach a loopback server under its own name.
    """

    def __init__(self, app: Any, hosts: Collection[str], guard: Guard) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._guard = guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Problem as refusal:
                await (await problem(Request(scope), refusal))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Any) -> None:
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if name not in self._hosts:
            raise Problem(400, "this server does not go by that name")
        self._guard.address(scope["client"][0] if scope["client"] else "")


def _depth(content: bytes) -> int:
    """How deep brackets are nested, those inside strings left out."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", content)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member appears twice")
    return members


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_repeats)
