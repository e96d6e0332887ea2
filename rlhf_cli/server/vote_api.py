"""Voting: a rater takes a pair and answers it. Nothing here tells which candidate is which."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.flow import wire
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.requests import for_role, read
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import Token


@for_role("rater")
async def lease(request: Request, store: Store, rater: Token) -> Response:
    """Hand out a pair; 204 while nothing is open for this rater."""
    pair = await store.together(lambda: store.lease(rater.id))
    if pair is None:
        return Response(status_code=204)
    body = wire.Lease(
        lease=pair.id,
        prompt=pair.prompt,
        instruction=pair.instruction,
        kind="image" if pair.images else "text",
        left=pair.left,
        right=pair.right,
        context_images=list(pair.context_images),
        expires=pair.expires_at,
    )
    return JSONResponse(body.to_json(), headers={"Cache-Control": "no-store"})


@for_role("rater")
async def vote(request: Request, store: Store, rater: Token) -> Response:
    """Take an answer; by the time of the reply it is on disk."""
    body, _ = await read(request, wire.CastVote)
    lease_id = request.path_params["lease"]
    if not await store.together(lambda: store.vote(lease_id, rater.id, body.outcome, body.response_ms)):
        raise Problem(410, "too late: the pair went back or its item has ended; the answer is kept but does not count")
    return Response(status_code=204)


routes = [
    Route("/vote/lease", lease, methods=["POST"]),
    Route("/vote/{lease}", vote, methods=["POST"]),
]
