"""What owners ask for: figures, and simulated raters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhf_cli.server import figures
from rlhf_cli.server.requests import for_role, read
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import Token


class MoreRaters(BaseModel):
    """`population` names them: asking again for the same one gives the same raters new secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1, le=10_000)
    population: str = Field("crowd", pattern=r"^[a-z0-9_-]{1,40}$")


@for_role("owner")
async def add_simulated_raters(request: Request, store: Store, _: Token) -> Response:
    """Make simulated raters; every vote of theirs is marked by whose it is."""
    body, _once = await read(request, MoreRaters)
    made = store.tokens.add_simulated(body.population, body.count)
    return JSONResponse({"raters": [{"id": rater, "secret": secret} for rater, secret in made]})


@for_role("owner")
async def summary(request: Request, store: Store, _: Token) -> Response:
    return JSONResponse(figures.summary(store), headers={"Cache-Control": "no-store"})


@for_role("owner", "client")
async def metrics(request: Request, store: Store, _: Token) -> Response:
    return PlainTextResponse(figures.metrics(store), media_type="text/plain; version=0.0.4")


routes = [
    Route("/owner/simulated-raters", add_simulated_raters, methods=["POST"]),
    Route("/owner/summary", summary, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
