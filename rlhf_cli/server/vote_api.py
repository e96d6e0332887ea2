"""Voting: a rater takes a pair and answers it. Nothing here tells which candidate is which, or which pair is gold."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.flow import wire
from rlhf_cli.server import gold, voting
from rlhf_cli.server.markdown import render
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.requests import for_role, read
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import Token

_RNG = random.SystemRandom()
_NOT_KEPT = {"Cache-Control": "no-store"}


class GoldPairBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1, max_length=wire.MAX_TEXT_BYTES)
    better: str = Field(min_length=1, max_length=wire.MAX_TEXT_BYTES)
    worse: str = Field(min_length=1, max_length=wire.MAX_TEXT_BYTES)


class GoldBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: list[GoldPairBody] = Field(max_length=1000)


@for_role("rater", browser=True)
async def lease(request: Request, store: Store, rater: Token) -> Response:
    """Hand out a pair; 204 while nothing is open for this rater."""
    shown = await store.together(lambda: voting.lease(store, rater.id, _RNG))
    return Response(status_code=204) if shown is None else JSONResponse(_body(shown), headers=_NOT_KEPT)


@for_role("rater", browser=True)
async def vote(request: Request, store: Store, rater: Token) -> Response:
    """Take an answer; by the time of the reply it is on disk."""
    body, _ = await read(request, wire.CastVote)
    lease_id = request.path_params["lease"]
    cast = (body.outcome, body.response_ms, body.segments)
    if not await store.together(lambda: voting.vote(store, lease_id, rater.id, *cast)):
        raise Problem(410, "too late: the pair went back or its item has ended; the answer is kept but does not count")
    return Response(status_code=204)


@for_role("rater", browser=True)
async def renew(request: Request, store: Store, rater: Token) -> Response:
    """A preloaded pair is being looked at now."""
    lease_id = request.path_params["lease"]
    seconds = await store.together(lambda: voting.renew(store, lease_id, rater.id))
    return JSONResponse({"secondsLeft": seconds}, headers=_NOT_KEPT)


@for_role("rater", browser=True)
async def undo(request: Request, store: Store, rater: Token) -> Response:
    """Take the last vote back; the answer is the same pair once more."""
    lease_id = request.path_params["lease"]
    shown = await store.together(lambda: voting.undo(store, lease_id, rater.id))
    return JSONResponse(_body(shown), headers=_NOT_KEPT)


@for_role("rater", browser=True)
async def progress(request: Request, store: Store, rater: Token) -> Response:
    """Own votes since `since` (Unix seconds, the rater's midnight) and the items that need votes."""
    text = request.query_params.get("since", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise Problem(400, "since is a time in whole Unix seconds", {"since": ["not a time"]})
    return JSONResponse(asdict(voting.progress(store, rater.id, float(text))), headers=_NOT_KEPT)


@for_role("client", "owner")
async def set_gold(request: Request, store: Store, _: Token) -> Response:
    """Put these pairs in the place of a flow's gold pairs."""
    body, _once = await read(request, GoldBody)
    pairs = [gold.GoldPair(pair.prompt, pair.better, pair.worse) for pair in body.pairs]
    gold.set_pairs(store, request.path_params["flow_id"], pairs)
    return Response(status_code=204)


@for_role("client", "owner")
async def get_gold(request: Request, store: Store, _: Token) -> Response:
    pairs = gold.pairs(store, request.path_params["flow_id"])
    return JSONResponse({"pairs": [asdict(pair) for pair in pairs]}, headers=_NOT_KEPT)


def _body(shown: voting.Shown) -> dict[str, Any]:
    pair = shown.pair
    body = wire.Lease(
        lease=pair.id,
        prompt=pair.prompt,
        instruction=pair.instruction,
        kind="image" if pair.images else "text",
        left=pair.left,
        right=pair.right,
        context_images=list(pair.context_images),
        segments=shown.segments,
        expires=pair.expires_at,
    ).to_json()
    # The reader's clock may be wrong by minutes, so it is told how long, not only until when.
    body["secondsLeft"] = shown.seconds
    if shown.markdown and not pair.images:
        body["leftHtml"], body["rightHtml"] = render(pair.left), render(pair.right)
    return body


routes = [
    Route("/vote/lease", lease, methods=["POST"]),
    Route("/vote/progress", progress, methods=["GET"]),
    Route("/vote/{lease}", vote, methods=["POST"]),
    Route("/vote/{lease}/renew", renew, methods=["POST"]),
    Route("/vote/{lease}/undo", undo, methods=["POST"]),
    Route("/flow/ranking/{flow_id}/gold", set_gold, methods=["PUT"]),
    Route("/flow/ranking/{flow_id}/gold", get_gold, methods=["GET"]),
]
