"""A person's browser: who it is, by its cookie, and what it may do with what we send it.

A cookie goes along with every request, whoever made the page it came from. So a request that changes something must
also carry where it came from (`Origin`, which no page can forge) and a token that only our own pages can read.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rlhf_cli.server.problems import Problem
from rlhf_cli.server.tokens import SESSION_TTL_S, Token, Tokens

CSRF_HEADER = "X-CSRF-Token"
JOIN_COOKIE = "rlhf_join"
JOIN_TTL_S = 900
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
_SAFE = ("GET", "HEAD", "OPTIONS")


def person(request: Request, tokens: Tokens) -> Token | None:
    """Whose browser this is; None when there is no session, or it is over or revoked.

    Raises:
        Problem: 403 when the request would change something and cannot be shown to come from a page of ours.
    """
    secret = request.cookies.get(_cookie(request), "")
    token = tokens.session(secret) if secret else None
    if token is not None and request.method not in _SAFE:
        check_origin(request)
        given = request.headers.get(CSRF_HEADER, "")
        if not hmac.compare_digest(given.encode(), csrf(request).encode()):
            raise Problem(403, f"the {CSRF_HEADER} header is missing or is not this session's; reload the page")
    return token


def check_origin(request: Request) -> None:
    """Raise 403 unless a page of this very server asks. Behind a proxy that ends TLS we may look like plain http."""
    scheme, _, host = request.headers.get("Origin", "").partition("://")
    right_scheme = scheme == "https" or scheme == request.url.scheme == "http"
    if not right_scheme or host.lower() != request.headers.get("Host", "").lower():
        raise Problem(403, "this did not come from a page of this server")


def csrf(request: Request) -> str:
    """The token of this session, derived from its secret, so that there is nothing to keep."""
    secret = request.cookies.get(_cookie(request), "")
    digest = hashlib.sha256(b"csrf:" + secret.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def begin(request: Request, response: Response, secret: str) -> None:
    """Give the browser its session. Under TLS the cookie's name makes the browser itself refuse any other origin's."""
    _set(request, response, _cookie(request), secret, int(SESSION_TTL_S), "/")


def end(request: Request, response: Response, tokens: Tokens) -> None:
    """Forget the session, here and in the browser."""
    tokens.end_session(request.cookies.get(_cookie(request), ""))
    _set(request, response, _cookie(request), "", 0, "/")


def hold_link(request: Request, response: Response, secret: str) -> None:
    """Take a link's secret out of the address bar, for as long as it takes to press the button; empty forgets it."""
    _set(request, response, JOIN_COOKIE, secret, JOIN_TTL_S if secret else 0, "/join")


def _set(request: Request, response: Response, name: str, value: str, max_age_s: int, path: str) -> None:
    tls = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=max_age_s, path=path, secure=tls, httponly=True, samesite="strict")


def _cookie(request: Request) -> str:
    return "__Host-rlhf_session" if request.url.scheme == "https" else "rlhf_session"


class PageHeaders:
    """Puts the headers that hold a browser on a short leash on every answer, refusals too."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = message.get("headers", [])
                names = {name.lower() for name, _ in given}
                message["headers"] = [*given, *(header for header in _RAW_HEADERS if header[0] not in names)]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
