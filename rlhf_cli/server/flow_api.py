"""The ranking-flow protocol, as the training loop and the official SDK speak it."""

from __future__ import annotations

import base64
import binascii
import hmac
from datetime import UTC, datetime
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.flow import wire
from rlhf_cli.flow.base import Responses
from rlhf_cli.ranking.bradley_terry import rank
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import Candidate, ItemRecord
from rlhf_cli.server.requests import for_role, read, read_bytes, whole_number
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import ACCESS_TTL_S, Token

DEFAULT_TTL_S = 240.0


async def token(request: Request) -> Response:
    """OAuth2 client credentials, by Basic or in the form."""
    form = {
        name: values[0] for name, values in parse_qs((await read_bytes(request)).decode("utf-8", "replace")).items()
    }
    scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
    client_id, client_secret = form.get("client_id", ""), form.get("client_secret", "")
    if scheme.lower() == "basic":
        try:
            client_id, _, client_secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return _refused("invalid_client", "the Authorization header cannot be read", 401)
    if not hmac.compare_digest(form.get("grant_type", "").encode(), b"client_credentials"):
        return _refused("unsupported_grant_type", "only client_credentials is supported", 400)
    access = request.app.state.store.tokens.issue_access(client_id, client_secret)
    if access is None:
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
async def create_flow(request: Request, store: Store, _: Token) -> Response:
    body, once = await read(request, wire.CreateFlow)
    desired = body.max_responses if body.serve_responses is None else body.serve_responses
    try:
        responses = Responses(body.min_responses, desired, body.max_responses)
    except ValueError as error:
        raise Problem(400, str(error), {"minResponses": [str(error)]}) from None
    flow_id = store.create_flow(body.name, body.criteria, responses, once)
    return JSONResponse(wire.FlowCreated(flow_id=flow_id).to_json())


@for_role("client", "owner")
async def get_flow(request: Request, store: Store, _: Token) -> Response:
    flow, items = store.flow(request.path_params["flow_id"])
    document = wire.FlowDocument(
        id=flow.id,
        name=flow.name,
        criteria=flow.instruction,
        min_responses=flow.responses.min,
        max_responses=flow.responses.max,
        serve_responses=flow.responses.desired,
        flow_item_count=items,
        created_at=_iso(flow.created_at),
    )
    return JSONResponse(document.to_json())


@for_role("client", "owner")
async def list_flows(request: Request, store: Store, _: Token) -> Response:
    page, size, newest_first = _paging(request)
    name = request.query_params.get("name[contains]", "")
    total, flows = store.flows(name, (page - 1) * size, size, newest_first=newest_first)
    rows = [wire.FlowRow(id=flow.id, name=flow.name, created_at=_iso(flow.created_at)) for flow in flows]
    return JSONResponse(_page(page, size, total, rows))


@for_role("client", "owner")
async def create_dataset(request: Request, store: Store, _: Token) -> Response:
    body, once = await read(request, wire.CreateDataset)
    return JSONResponse(wire.DatasetCreated(dataset_id=store.create_dataset(body.name, once)).to_json())


@for_role("client", "owner")
async def create_datapoint(request: Request, store: Store, _: Token) -> Response:
    body, _once = await read(request, wire.CreateDatapoint)
    _check_size("text", body.text)
    datapoint_id = store.add_datapoint(request.path_params["dataset_id"], body.sort_index, body.text)
    return JSONResponse(wire.DatapointCreated(datapoint_id=datapoint_id).to_json())


@for_role("client", "owner")
async def create_item(request: Request, store: Store, _: Token) -> Response:
    body, once = await read(request, wire.CreateItem)
    _check_size("context", body.context or "")
    ttl_s = DEFAULT_TTL_S if body.time_to_live_in_seconds is None else body.time_to_live_in_seconds
    item_id = store.create_item(request.path_params["flow_id"], body.dataset_id, body.context or "", ttl_s, once)
    return JSONResponse(wire.ItemCreated(flow_item_id=item_id).to_json())


@for_role("client", "owner")
async def list_items(request: Request, store: Store, _: Token) -> Response:
    page, size, newest_first = _paging(request)
    flow_id = request.path_params["flow_id"]
    total, items = store.items(flow_id, (page - 1) * size, size, newest_first=newest_first)
    return JSONResponse(_page(page, size, total, [_item(item) for item in items]))


@for_role("client", "owner")
async def get_item(request: Request, store: Store, _: Token) -> Response:
    return JSONResponse(_item(store.item(request.path_params["item_id"])).to_json())


@for_role("client", "owner")
async def get_results(request: Request, store: Store, _: Token) -> Response:
    item = _ended(store, request)
    candidates = store.candidates(item.id)
    elo = rank(store.matrix(item.id)).elo
    rows = [
        wire.ResultRow(
            id=candidate.id, asset=wire.ResultAsset(text=candidate.text, identifier=label), elo=round(candidate_elo)
        )
        for candidate, label, candidate_elo in zip(candidates, labels(candidates), elo.tolist(), strict=True)
    ]
    return JSONResponse(wire.Results(datapoints=rows, total_votes=item.votes).to_json())


@for_role("client", "owner")
async def get_vote_matrix(request: Request, store: Store, _: Token) -> Response:
    partial = request.query_params.get("partial") == "true"
    item = store.item(request.path_params["item_id"]) if partial else _ended(store, request)
    candidates = store.candidates(item.id)
    names = labels(candidates)
    matrix = wire.VoteMatrix(
        index=names,
        columns=names,
        data=store.matrix(item.id).wins.tolist(),
        sort_index=[candidate.sort_index for candidate in candidates],
    )
    return JSONResponse(matrix.to_json())


@for_role("client", "owner")
async def stop_item(request: Request, store: Store, _: Token) -> Response:
    store.stop(request.path_params["item_id"])
    return Response(status_code=204)


async def capabilities(request: Request) -> Response:
    return JSONResponse(wire.CapabilityDocument(idempotency=True, desired=True, live_votes=True).to_json())


routes = [
    Route("/connect/token", token, methods=["POST"]),
    Route("/flow/ranking", create_flow, methods=["POST"]),
    Route("/flow", list_flows, methods=["GET"]),
    Route("/flow/{flow_id}", get_flow, methods=["GET"]),
    Route("/dataset", create_dataset, methods=["POST"]),
    Route("/dataset/{dataset_id}/datapoint", create_datapoint, methods=["POST"]),
    Route("/flow/ranking/item/{item_id}", get_item, methods=["GET"]),
    Route("/flow/ranking/item/{item_id}/results", get_results, methods=["GET"]),
    Route("/flow/ranking/item/{item_id}/vote-matrix", get_vote_matrix, methods=["GET"]),
    Route("/flow/ranking/{flow_id}/item", create_item, methods=["POST"]),
    Route("/flow/ranking/{flow_id}/item", list_items, methods=["GET"]),
    Route("/flow/item/{item_id}/stop", stop_item, methods=["POST"]),
    Route("/.well-known/rlhf-flow", capabilities, methods=["GET"]),
]


def labels(candidates: list[Candidate]) -> list[str]:
    """One label per candidate: its text, made unique where a text repeats."""
    taken: set[str] = {candidate.text for candidate in candidates}
    result: list[str] = []
    for candidate in candidates:
        label, number = candidate.text, 2
        if label in result:
            while (label := f"{candidate.text} ({number})") in taken:
                number += 1
            taken.add(label)
        result.append(label)
    return result


def _ended(store: Store, request: Request) -> ItemRecord:
    item = store.item(request.path_params["item_id"])
    if not item.state.terminal:
        raise Problem(409, f"flow item is {item.state}")
    return item


def _item(item: ItemRecord) -> wire.Item:
    return wire.Item(
        id=item.id,
        flow_id=item.flow_id,
        dataset_id=item.dataset_id,
        workflow_id=item.id,
        state=item.state,
        context=item.context,
        created_at=_iso(item.created_at),
        started_at=_iso(item.started_at),
        expires_at=_iso(item.expires_at),
        completed_at=_iso(item.ended_at),
        votes=item.votes,
        desired=item.responses.desired,
    )


def _paging(request: Request) -> tuple[int, int, bool]:
    page = whole_number(request, "page", 1, 1_000_000)
    sort = request.query_params.get("sort", "-created_at")
    if sort not in ("created_at", "-created_at"):
        raise Problem(400, "only sorting by created_at is supported", {"sort": ["created_at or -created_at"]})
    return page, whole_number(request, "page_size", 10, 1000), sort.startswith("-")


def _page(page: int, size: int, total: int, rows: list[wire.FlowRow] | list[wire.Item]) -> dict[str, object]:
    items = [row.to_json() for row in rows]
    return {"total": total, "page": page, "pageSize": size, "totalPages": -(-total // size), "items": items}


def _check_size(name: str, text: str) -> None:
    if len(text.encode()) > wire.MAX_TEXT_BYTES:
        raise Problem(400, f"{name} is longer than {wire.MAX_TEXT_BYTES} bytes", {name: ["too long"]})


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
