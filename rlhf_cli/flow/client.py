"""The flow over HTTP: one client for Rapidata and for our own server."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from urllib.parse import quote

import httpx
import numpy as np

from rlhf_cli.flow import wire
from rlhf_cli.flow.base import BadAnswer, Capabilities, FlowSpec, ItemStatus
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.http import PATIENT, Answer, HttpCalls, Patience
from rlhf_cli.types import WinMatrix

PAGE_SIZE = 100
LISTED_PAGES = 3
MAX_PAGES = 1000


class FlowClient:
    """A `Flow` over HTTP; make and use it within one event loop.

    Args:
        base_url: Of the service, such as `https://votes.example.org`.
        token_url: Defaults to `/connect/token` under `base_url`.
        capabilities: What the service offers, where that is known; otherwise it is asked.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        *,
        token_url: str | None = None,
        capabilities: Capabilities | None = None,
        patience: Patience = PATIENT,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        token_url = token_url or base_url.rstrip("/") + "/connect/token"
        self._calls = HttpCalls(base_url, token_url, credentials, patience=patience, transport=transport, clock=clock)
        self._capabilities = capabilities

    @classmethod
    def rapidata(
        cls,
        credentials: Credentials,
        *,
        domain: str = "rapidata.ai",
        patience: Patience = PATIENT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> FlowClient:
        """The vendor's service: two hosts, and nothing beyond the protocol."""
        return cls(
            f"https://api.{domain}",
            credentials,
            token_url=f"https://auth.{domain}/connect/token",
            capabilities=Capabilities(),
            patience=patience,
            transport=transport,
        )

    async def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            path = "/.well-known/rlhf-flow"
            document = await self._calls.find(path, wire.CapabilityDocument, absent=404)
            self._capabilities = document.capabilities() if document else Capabilities()
        return self._capabilities

    async def open_flow(self, spec: FlowSpec) -> str:
        responses = spec.responses
        has_desired = (await self.capabilities()).desired
        body = wire.CreateFlow(
            name=spec.title,
            criteria=spec.instruction,
            min_responses=responses.min,
            max_responses=responses.max,
            serve_responses=responses.desired if has_desired else None,
        )
        created = await self._create("/flow/ranking", wire.FlowCreated, body, str(uuid.uuid4()))
        return created.flow_id

    async def find_flow(self, spec: FlowSpec) -> str | None:
        marker = spec.title.removeprefix(spec.name).strip()
        async for page in self._pages("/flow", wire.Page[wire.FlowRow], {"name[contains]": marker}):
            for row in page.items:
                if row.name == spec.title and await self._still_asks(row.id, spec):
                    return row.id
        return None

    async def create_dataset(self, name: str, key: str) -> str:
        created = await self._create("/dataset", wire.DatasetCreated, wire.CreateDataset(name=name), key)
        return created.dataset_id

    async def add_datapoint(self, dataset_id: str, sort_index: int, text: str) -> None:
        body = wire.CreateDatapoint(segments=[wire.Segment(asset=wire.TextAsset(text=text))], sort_index=sort_index)
        path = f"/dataset/{_id(dataset_id)}/datapoint"
        await self._create(path, wire.DatapointCreated, body)  # our server knows a repetition by its sort index

    async def create_item(self, flow_id: str, dataset_id: str, context: str, ttl_s: float, key: str) -> str:
        # The vendor knows whole seconds only.
        ttl: float = math.ceil(ttl_s) if not (await self.capabilities()).idempotency or ttl_s == int(ttl_s) else ttl_s
        body = wire.CreateItem(dataset_id=dataset_id, context=context, time_to_live_in_seconds=ttl)
        created = await self._create(f"/flow/ranking/{_id(flow_id)}/item", wire.ItemCreated, body, key)
        return created.flow_item_id

    async def find_item(self, flow_id: str, dataset_id: str) -> ItemStatus | None:
        found: ItemStatus | None = None
        async for page in self._pages(f"/flow/ranking/{_id(flow_id)}/item", wire.Page[wire.Item]):
            for row in page.items:  # newest first, so the last one found is the oldest
                found = row.status() if row.dataset_id == dataset_id else found
        return found

    async def statuses(self, flow_id: str, item_ids: Collection[str]) -> dict[str, ItemStatus]:
        wanted = set(item_ids)
        found: dict[str, ItemStatus] = {}
        if len(wanted) > 2:  # one list instead of one request each
            pages = 0
            async for page in self._pages(f"/flow/ranking/{_id(flow_id)}/item", wire.Page[wire.Item]):
                found |= {row.id: row.status() for row in page.items if row.id in wanted}
                pages += 1
                if found.keys() >= wanted or pages == LISTED_PAGES:
                    break
        alone = await asyncio.gather(*(self._status(item_id) for item_id in sorted(wanted - found.keys())))
        return found | {status.item_id: status for status in alone if status is not None}

    async def vote_matrix(self, item_id: str, texts: Sequence[str], *, partial: bool = False) -> WinMatrix | None:
        path = f"/flow/ranking/item/{_id(item_id)}/vote-matrix"
        params = {"partial": "true"} if partial else None
        matrix = await self._calls.find(path, wire.VoteMatrix, params=params, absent=409)
        return None if matrix is None else in_order_of(texts, matrix, item_id)

    async def stop(self, item_id: str) -> None:
        await self._calls.send("POST", f"/flow/item/{_id(item_id)}/stop")

    async def close(self) -> None:
        await self._calls.close()

    async def _create(self, path: str, answer: type[Answer], body: wire.Body, key: str | None = None) -> Answer:
        safe = (await self.capabilities()).idempotency
        return await self._calls.call("POST", path, answer, body=body, key=key if safe else None, repeatable=safe)

    async def _status(self, item_id: str) -> ItemStatus | None:
        path = f"/flow/ranking/item/{_id(item_id)}"
        item = await self._calls.find(path, wire.Item, absent=404)
        if item is not None and item.id != item_id:
            raise BadAnswer(f"GET {path} answered about item {item.id!r}.")
        return item.status() if item else None

    async def _still_asks(self, flow_id: str, spec: FlowSpec) -> bool:
        """Whether a flow found by name was not changed since."""
        flow = await self._calls.find(f"/flow/{_id(flow_id)}", wire.FlowDocument, absent=404)
        wanted = (spec.instruction, spec.responses.min, spec.responses.max)
        return flow is not None and (flow.criteria, flow.min_responses, flow.max_responses) == wanted

    async def _pages(
        self, path: str, answer: type[wire.Page[wire.Row]], params: dict[str, str] | None = None
    ) -> AsyncIterator[wire.Page[wire.Row]]:
        seen = 0
        for number in range(1, MAX_PAGES + 1):
            query: dict[str, str | int] = {
                "page": number,
                "page_size": PAGE_SIZE,
                "sort": "-created_at",
                **(params or {}),
            }
            page = await self._calls.call("GET", path, answer, params=query)
            yield page
            seen += len(page.items)
            if not page.items or seen >= page.total:
                return
        raise BadAnswer(f"GET {path}: the list does not end after {MAX_PAGES} pages.")


def in_order_of(texts: Sequence[str], matrix: wire.VoteMatrix, item_id: str) -> WinMatrix:
    """The votes of `matrix` in the order of `texts`, which are distinct.

    Rows and columns are matched by label, each by itself; where the service gives sort indices, they must agree.

    Raises:
        BadAnswer: A candidate is missing, unknown or there twice, or a count is not one.
    """

    def bad(why: str) -> BadAnswer:
        return BadAnswer(f"The votes on item {item_id} cannot be used: {why}. Nothing was learned from them.")

    size = len(texts)
    if len(matrix.index) != size or len(matrix.data) != size or any(len(row) != size for row in matrix.data):
        raise bad(f"{size} candidates were sent, the matrix has {len(matrix.index)} labels and {len(matrix.data)} rows")
    for labels in (matrix.index, matrix.columns):
        if len(set(labels)) != size or len(labels) != size:
            raise bad("a label stands for two candidates or is missing")
    if set(matrix.index) != set(matrix.columns):
        raise bad("its rows and columns are about different candidates")
    place = {text: i for i, text in enumerate(texts)}
    if unknown := [label for label in matrix.index if label not in place]:
        raise bad(f"it names a candidate that was never sent: {unknown[0][:80]!r}")
    rows = [place[label] for label in matrix.index]
    if matrix.sort_index is not None and matrix.sort_index != rows:
        raise bad("its labels and its sort indices contradict each other")
    columns = [place[label] for label in matrix.columns]
    wins = np.zeros((size, size))
    wins[np.ix_(rows, columns)] = matrix.data
    try:
        return WinMatrix(wins)
    except ValueError as error:
        raise bad(str(error)) from error


def _id(value: str) -> str:
    """An id as one segment of a path, whatever a service put into it."""
    return quote(value, safe="")
