"""The pages, and how a person signs in to them.

A one-time link is opened twice: once to take its secret out of the address bar, and once, by a button on the page that
follows, to use it. What previews links in a chat or scans them in a mail never presses the button.

The pages hold no data, so they are the same for everybody. Whoever follows a link from another site arrives without
the cookie, which is strict; what the page then fetches by itself comes with it.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf_cli.server import session
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.requests import address_of, problem, read
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import JOIN_PATH, Role

HOME: dict[Role, str] = {"rater": "/vote", "owner": "/owner"}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_PAGES = {"/vote": "vote.html", "/owner": "owner.html", "/join": "join.html", "/login": "login.html"}


class Login(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    secret: str = Field(min_length=1, max_length=200)


def _load() -> dict[str, bytes]:
    folder = files("rlhf_cli.server") / "pages"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}


_FILES = _load()


def _file(request: Request, name: str) -> Response:
    content = _FILES.get(name)
    if content is None:
        raise Problem(404, "there is no such page")
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, 200, headers, _TYPES[name.rpartition(".")[2]])


async def page(request: Request) -> Response:
    return _file(request, _PAGES[request.url.path])


async def asset(request: Request) -> Response:
    return _file(request, request.path_params["name"])


async def home(request: Request) -> Response:
    return RedirectResponse("/vote", 303)


async def follow_link(request: Request) -> Response:
    """Move the secret of a one-time link into a cookie and leave its address."""
    answer = RedirectResponse(JOIN_PATH, 303, {"Cache-Control": "no-store"})
    session.hold_link(request, answer, request.path_params["secret"])
    return answer


async def join(request: Request) -> Response:
    """Use a one-time link, once. A client's link has no page to lead to."""
    session.check_origin(request)
    store: Store = request.app.state.store
    secret = request.cookies.get(session.JOIN_COOKIE, "")
    found = await store.together(lambda: store.tokens.redeem_link(secret)) if secret else None
    if found is None:
        request.app.state.guard.refused(address_of(request))
        refusal = Problem(410, "this link was used before or is too old; ask whoever sent it for a new one")
        answer = await problem(request, refusal)
    else:
        token, session_secret = found
        answer = _home(request, token.role, session_secret)
    session.hold_link(request, answer, "")
    return answer


async def login(request: Request) -> Response:
    """Sign in with a secret of one's own, as `rlhf tokens add` prints it."""
    session.check_origin(request)
    store: Store = request.app.state.store
    body, _ = await read(request, Login)
    token = store.tokens.authenticate(body.secret.strip())
    if token is None or token.role not in HOME:
        request.app.state.guard.refused(address_of(request))
        raise Problem(403, "that secret is not right, was revoked, or belongs to a client, which uses no pages")
    session_secret = await store.together(lambda: store.tokens.open_session(token.parent or token.id))
    return _home(request, token.role, session_secret)


def _home(request: Request, role: Role, session_secret: str) -> Response:
    answer = JSONResponse({"home": HOME[role]}, headers={"Cache-Control": "no-store"})
    session.begin(request, answer, session_secret)
    return answer


async def logout(request: Request) -> Response:
    """End this browser's session."""
    store: Store = request.app.state.store
    if session.person(request, store.tokens) is None:
        return Response(status_code=204)
    answer = Response(status_code=204)
    session.end(request, answer, store.tokens)
    return answer


async def me(request: Request) -> Response:
    """Who is signed in in this browser, and the token that its requests must carry."""
    store: Store = request.app.state.store
    token = session.person(request, store.tokens)
    if token is None:
        return JSONResponse({"detail": "not signed in"}, 401, {"Cache-Control": "no-store"})
    body = {"id": token.id, "name": token.label, "role": token.role, "csrf": session.csrf(request)}
    return JSONResponse(body, headers={"Cache-Control": "no-store"})


routes = [
    Route("/", home, methods=["GET"]),
    *(Route(path, page, methods=["GET"]) for path in _PAGES),
    Route("/pages/{name}", asset, methods=["GET"]),
    Route(f"{JOIN_PATH}/{{secret}}", follow_link, methods=["GET"]),
    Route(JOIN_PATH, join, methods=["POST"]),
    Route("/login", login, methods=["POST"]),
    Route("/session", me, methods=["GET"]),
    Route("/session", logout, methods=["DELETE"]),
]
