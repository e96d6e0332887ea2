"""OAuth2 client credentials and who one is, as the official SDK asks for them."""

from __future__ import annotations

import base64
import binascii
import hmac
import uuid
from urllib.parse import parse_qs, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.server.requests import address_of, for_role, read_bytes
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import ACCESS_TTL_S, Token


async def token(request: Request) -> Response:
    """A short-lived token for a client's id and secret, by Basic or in the form."""
    content = (await read_bytes(request)).decode("utf-8", "replace")
    form = {name: values[0] for name, values in parse_qs(content).items()}
    scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
    client_id, client_secret = form.get("client_id", ""), form.get("client_secret", "")
    if scheme.lower() == "basic":
        try:
            client_id, _, client_secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return _refused("invalid_client", "the Authorization header cannot be read", 401)
        client_id, client_secret = unquote(client_id), unquote(client_secret)
    if not hmac.compare_digest(form.get("grant_type", "").encode(), b"client_credentials"):
        return _refused("unsupported_grant_type", "only client_credentials is supported", 400)
    access = request.app.state.store.tokens.issue_access(client_id, client_secret)
    if access is None:
        request.app.state.guard.refused(address_of(request))
        return _refused("invalid_client", "unknown client id or wrong secret", 401)
    answer = {
        "access_token": access,
        "token_type": "Bearer",
        "expires_in": int(ACCESS_TTL_S),
        "scope": "openid email api",
    }
    return JSONResponse(answer, headers={"Cache-Control": "no-store"})


def _refused(error: str, description: str, status: int) -> Response:
    return JSONResponse({"error": error, "error_description": description}, status)


@for_role("client", "owner")
async def userinfo(request: Request, store: Store, asking: Token) -> Response:
    name = asking.parent or asking.id
    body = {"sub": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "email": f"{name}@localhost", "role": "Customer"}
    return JSONResponse(body)


routes = [
    Route("/connect/token", token, methods=["POST"]),
    Route("/connect/userinfo", userinfo, methods=["GET"]),
]
