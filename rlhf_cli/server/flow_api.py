"""Flows, datasets and items, as the training loop and the official SDK ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.flow import wire
from rlhf_cli.flow.base import ItemState, Responses
from rlhf_cli.server.filters import read_filter
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import FlowRecord, ItemRecord
from rlhf_cli.server.requests import for_role, read, whole_number
from rlhf_cli.server.store import Store
from rlhf_cli.server.times import iso, unix_time
from rlhf_cli.server.tokens import Token

DEFAULT_TTL_S = 240.0
DEFAULT_MIN, DEFAULT_MAX = 20, 100


@for_role("client", "owner")
async def create_flow(request: Request, store: Store, _: Token) -> Response:
    body, once = await read(request, wire.CreateFlow)
    most = DEFAULT_MAX if body.max_responses is None else body.max_responses
    least = min(DEFAULT_MIN, most) if body.min_responses is None else body.min_responses
    responses = _responses(least, body.serve_responses, most)
    goal, settings = body.goal or "ranking", body.settings()
    flow_id = store.create_flow(body.name, body.criteria, responses, once, goal=goal, settings=settings)
    return JSONResponse(wire.FlowCreated(flow_id=flow_id).to_json())


@for_role("client", "owner")
async def update_flow(request: Request, store: Store, _: Token) -> Response:
    """Change what later items are asked; members that are absent stay, null resets those that may be null."""
    body, _once = await read(request, wire.UpdateFlow)

    def change(flow: FlowRecord) -> FlowRecord:
        was = flow.responses
        most = was.max if body.max_responses is None else body.max_responses
        least = min(was.min, most) if body.min_responses is None else body.min_responses
        kept = was.desired if was.desired < was.max else None  # who asked for no desired number follows the maximum
        desired = body.serve_responses if "serve_responses" in body.model_fields_set else kept
        return replace(
            flow,
            instruction=flow.instruction if body.criteria is None else body.criteria,
            responses=_responses(least, desired, most),
            goal=flow.goal if body.goal is None else body.goal,
            settings=flow.settings | body.settings(),
        )

    store.update_flow(request.path_params["flow_id"], change)
    return Response(status_code=204)


@for_role("client", "owner")
async def delete_flow(request: Request, store: Store, _: Token) -> Response:
    store.delete_flow(request.path_params["flow_id"])
    return Response(status_code=204)


@for_role("client", "owner")
async def get_flow(request: Request, store: Store, _: Token) -> Response:
    flow, count = store.flow(request.path_params["flow_id"])
    document = wire.FlowDocument(
        id=flow.id,
        name=flow.name,
        criteria=flow.instruction,
        min_responses=flow.responses.min,
        max_responses=flow.responses.max,
        serve_responses=flow.responses.desired,
        goal=flow.goal,
        flow_item_count=count,
        created_at=iso(flow.created_at),
    )
    return JSONResponse(document.to_json() | flow.settings)


@for_role("client", "owner")
async def list_flows(request: Request, store: Store, _: Token) -> Response:
    page, size, newest_first = _paging(request)
    where = read_filter(request.query_params.multi_items(), {"name": str, "created_at": unix_time})
    total, flows = store.flows("", (page - 1) * size, size, newest_first=newest_first, where=where)
    rows = [wire.FlowRow(id=flow.id, name=flow.name, created_at=iso(flow.created_at)) for flow in flows]
    return JSONResponse(_page(page, size, total, rows))


@for_role("client", "owner")
async def create_dataset(request: Request, store: Store, _: Token) -> Response:
    body, once = await read(request, wire.CreateDataset)
    return JSONResponse(wire.DatasetCreated(dataset_id=store.create_dataset(body.name, once)).to_json())


@for_role("client", "owner")
async def create_datapoint(request: Request, store: Store, _: Token) -> Response:
    body, _once = await read(request, wire.CreateDatapoint)
    asset, dataset_id = body.candidate, request.path_params["dataset_id"]
    if isinstance(asset, wire.ExistingAsset):
        datapoint_id = await store.together(lambda: store.add_datapoint(dataset_id, body.sort_index, "", asset.name))
    else:
        _check_size("text", asset.text)
        datapoint_id = await store.together(lambda: store.add_datapoint(dataset_id, body.sort_index, asset.text))
    return JSONResponse(wire.DatapointCreated(datapoint_id=datapoint_id).to_json())


@for_role("client", "owner")
async def create_item(request: Request, store: Store, _: Token) -> Response:
    body, once = await read(request, wire.CreateItem)
    _check_size("context", body.context or "")
    item_id = store.create_item(
        request.path_params["flow_id"],
        body.dataset_id,
        body.context or "",
        DEFAULT_TTL_S if body.time_to_live_in_seconds is None else body.time_to_live_in_seconds,
        once,
        context_media=body.context_names,
        drain_s=body.drain_duration_in_seconds,
    )
    return JSONResponse(wire.ItemCreated(flow_item_id=item_id).to_json())


@for_role("client", "owner")
async def list_items(request: Request, store: Store, _: Token) -> Response:
    page, size, newest_first = _paging(request)
    where = read_filter(request.query_params.multi_items(), {"state": ItemState, "created_at": unix_time})
    flow_id = request.path_params["flow_id"]
    total, items = store.items(flow_id, (page - 1) * size, size, newest_first=newest_first, where=where)
    return JSONResponse(_page(page, size, total, [_item(item) for item in items]))


@for_role("client", "owner")
async def get_item(request: Request, store: Store, _: Token) -> Response:
    return JSONResponse(_item(store.item(request.path_params["item_id"])).to_json())


@for_role("client", "owner")
async def stop_item(request: Request, store: Store, _: Token) -> Response:
    store.stop(request.path_params["item_id"])
    return Response(status_code=204)


@for_role("client", "owner")
async def preheat(request: Request, store: Store, _: Token) -> Response:
    return Response(status_code=204)  # our raters are there or not; nothing can be warmed up


async def capabilities(request: Request) -> Response:
    document = wire.CapabilityDocument(**asdict(wire.OURS))
    return JSONResponse(document.to_json())


routes = [
    Route("/flow/ranking", create_flow, methods=["POST"]),
    Route("/flow", list_flows, methods=["GET"]),
    Route("/flow/ranking/item/{item_id}", get_item, methods=["GET"]),
    Route("/flow/ranking/{flow_id}/item", create_item, methods=["POST"]),
    Route("/flow/ranking/{flow_id}/item", list_items, methods=["GET"]),
    Route("/flow/ranking/{flow_id}/config", update_flow, methods=["PATCH"]),
    Route("/flow/ranking/{flow_id}", update_flow, methods=["PATCH"]),
    Route("/flow/item/{item_id}/stop", stop_item, methods=["POST"]),
    Route("/flow/{flow_id}", get_flow, methods=["GET"]),
    Route("/flow/{flow_id}", delete_flow, methods=["DELETE"]),
    Route("/dataset", create_dataset, methods=["POST"]),
    Route("/dataset/{dataset_id}/datapoint", create_datapoint, methods=["POST"]),
    Route("/campaign/boost/preheat", preheat, methods=["POST"]),
    Route("/.well-known/rlhf-flow", capabilities, methods=["GET"]),
]


def _responses(least: int, desired: int | None, most: int) -> Responses:
    try:
        return Responses(least, most if desired is None else desired, most)
    except ValueError as error:
        raise Problem(400, str(error), {"minResponses": [str(error)]}) from None


def _item(item: ItemRecord) -> wire.Item:
    return wire.Item(
        id=item.id,
        flow_id=item.flow_id,
        dataset_id=item.dataset_id,
        workflow_id=item.id,
        state=item.state,
        context=item.context,
        created_at=iso(item.created_at),
        started_at=None if item.started_at is None else iso(item.started_at),
        expires_at=iso(item.expires_at),
        completed_at=None if item.ended_at is None else iso(item.ended_at),
        votes=item.votes,
        desired=item.responses.desired,
    )


def _paging(request: Request) -> tuple[int, int, bool]:
    page = whole_number(request, "page", 1, 1_000_000)
    sort = request.query_params.get("sort", "-created_at")
    if sort not in ("created_at", "-created_at"):
        raise Problem(400, "only sorting by created_at is supported", {"sort": ["created_at or -created_at"]})
    return page, whole_number(request, "page_size", 10, 1000), sort.startswith("-")


def _page(page: int, size: int, total: int, rows: Sequence[wire.FlowRow | wire.Item]) -> dict[str, object]:
    items = [row.to_json() for row in rows]
    return {"total": total, "page": page, "pageSize": size, "totalPages": -(-total // size), "items": items}


def _check_size(name: str, text: str) -> None:
    if len(text.encode()) > wire.MAX_TEXT_BYTES:
        raise Problem(400, f"{name} is longer than {wire.MAX_TEXT_BYTES} bytes", {name: ["too long"]})
