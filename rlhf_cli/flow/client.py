"""The flow over HTTP: one client for Rapidata and for our own server."""

from __future__ import annotations

import asyncio
import math
import mimetypes
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar
from urllib.parse import quote

import httpx

from rlhf_cli.errors import FlowRefused, FlowUnavailable
from rlhf_cli.flow import wire
from rlhf_cli.flow.base import (
    RAPIDATA,
    Asset,
    BadAnswer,
    Capabilities,
    FlowSpec,
    ImageFile,
    ImageUrl,
    ItemResults,
    ItemState,
    ItemStatus,
)
from rlhf_cli.flow.credentials import Credentials
from rlhf_cli.flow.http import PATIENT, Answer, HttpCalls, Patience
from rlhf_cli.flow.labels import Nameless, elo_in_order_of, identifier, in_order_of, name_of, segments_in_order_of
from rlhf_cli.types import Segment, WinMatrix

PAGE_SIZE = 100
NEWEST_PAGES = 3
ALONE = 2
"""So many items are asked for one by one rather than by a list."""
MAX_PAGES = 1000
RAW_VOTES_PAGE = 1000
UPLOAD_S = 300.0
"""How long the service may take to fetch images from their addresses."""
UPLOAD_POLL_S = 0.5

OnBody = Callable[[str, str, bytes], None]
Got = TypeVar("Got")


class FlowClient:
    """A `Flow` over HTTP; make and use it within one event loop.

    Args:
        base_url: Of the service, such as `https://votes.example.org`.
        token_url: Defaults to `/connect/token` under `base_url`.
        capabilities: What the service offers, where that is known; otherwise it is asked.
        on_body: Given what the service says about an item that has ended, word for word but for secrets: the kind
            (`vote-matrix`, `results` or `votes`), the item's id and the body.
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
        on_body: OnBody | None = None,
    ) -> None:
        token_url = token_url or base_url.rstrip("/") + "/connect/token"
        self._calls = HttpCalls(base_url, token_url, credentials, patience=patience, transport=transport, clock=clock)
        self._capabilities = capabilities
        self._on_body = on_body

    @classmethod
    def rapidata(
        cls,
        credentials: Credentials,
        *,
        domain: str = "rapidata.ai",
        patience: Patience = PATIENT,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_body: OnBody | None = None,
    ) -> FlowClient:
        """The vendor's service: two hosts, and nothing beyond the protocol."""
        return cls(
            f"https://api.{domain}",
            credentials,
            token_url=f"https://auth.{domain}/connect/token",
            capabilities=RAPIDATA,
            patience=patience,
            transport=transport,
            clock=clock,
            on_body=on_body,
        )

    async def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            path = "/.well-known/rlhf-flow"
            document = await self._calls.find(path, wire.CapabilityDocument, absent=404)
            self._capabilities = document.capabilities() if document else Capabilities()
        return self._capabilities

    # Flows.

    async def open_flow(self, spec: FlowSpec) -> str:
        responses = spec.responses
        body = wire.CreateFlow(
            name=spec.title,
            criteria=spec.instruction,
            min_responses=responses.min,
            max_responses=responses.max,
            serve_responses=await self._desired(spec),
            mark_segments=await self._marks(spec),
        )
        created = await self._create("/flow/ranking", wire.FlowCreated, body, str(uuid.uuid4()))
        return created.flow_id

    async def find_flow(self, spec: FlowSpec) -> str | None:
        marker = spec.title.removeprefix(spec.name).strip()
        async for page in self._pages("/flow", wire.Page[wire.FlowRow], {"name[contains]": marker}):
            for row in page.items:
                if row.name == spec.title and await self.asks(row.id, spec):
                    return row.id
        return None

    async def asks(self, flow_id: str, spec: FlowSpec) -> bool:
        flow = await self._calls.find(f"/flow/{_id(flow_id)}", wire.FlowDocument, absent=404)
        if flow is None or await self._desired(spec) not in (None, flow.serve_responses or flow.max_responses):
            return False
        if await self._marks(spec) not in (None, bool(flow.mark_segments)):
            return False
        wanted = (spec.instruction, spec.responses.min, spec.responses.max)
        return (flow.criteria, flow.min_responses, flow.max_responses) == wanted

    async def update_flow(self, flow_id: str, spec: FlowSpec) -> None:
        body = wire.UpdateFlow(
            criteria=spec.instruction,
            min_responses=spec.responses.min,
            max_responses=spec.responses.max,
            serve_responses=await self._desired(spec),
            mark_segments=await self._marks(spec),
        )
        await self._calls.send("PATCH", f"/flow/ranking/{_id(flow_id)}", body)

    async def preheat(self) -> None:
        if (await self.capabilities()).preheat:
            await self._calls.send("POST", "/campaign/boost/preheat")

    # Items.

    async def create_dataset(self, name: str, key: str) -> str:
        # Repeated everywhere: one dataset too many is empty, and free.
        once = key if (await self.capabilities()).idempotency else None
        body = wire.CreateDataset(name=name)
        created = await self._calls.call("POST", "/dataset", wire.DatasetCreated, body=body, key=once)
        return created.dataset_id

    async def add_datapoint(self, dataset_id: str, sort_index: int, asset: Asset) -> str:
        names = await self._upload({sort_index: asset})
        return await self._add(dataset_id, sort_index, asset, names.get(sort_index))

    async def fill_dataset(self, dataset_id: str, assets: Sequence[Asset]) -> None:
        names = await self._upload(dict(enumerate(assets)))
        ids = await _all(self._add(dataset_id, i, asset, names.get(i)) for i, asset in enumerate(assets))
        if len(set(ids)) != len(assets):
            raise BadAnswer(
                f"{len(assets)} candidates were put into dataset {dataset_id} and {len(set(ids))} arrived; "
                "nothing is asked about it."
            )

    async def create_item(self, flow_id: str, dataset_id: str, context: str, ttl_s: float, key: str) -> str:
        # Whole seconds go to every service as whole numbers: one that knows no others refuses 60.0.
        whole = ttl_s == int(ttl_s) or not (await self.capabilities()).idempotency
        body = wire.CreateItem(
            dataset_id=dataset_id, context=context, time_to_live_in_seconds=math.ceil(ttl_s) if whole else ttl_s
        )
        created = await self._create(f"/flow/ranking/{_id(flow_id)}/item", wire.ItemCreated, body, key)
        return created.flow_item_id

    async def find_item(self, flow_id: str, dataset_id: str) -> ItemStatus | None:
        found: ItemStatus | None = None
        async for page in self._pages(_items(flow_id), wire.Page[wire.ItemRow]):
            for row in page.items:  # newest first, so the last one found is the oldest
                found = row.status() if row.dataset_id == dataset_id else found
        return found

    async def newest_items(self, flow_id: str) -> list[ItemStatus]:
        found: dict[str, ItemStatus] = {}
        async for page in self._pages(_items(flow_id), wire.Page[wire.ItemRow], most=NEWEST_PAGES):
            found |= {row.id: row.status() for row in page.items}
        return list(found.values())

    async def statuses(self, flow_id: str, item_ids: Collection[str]) -> dict[str, ItemStatus]:
        missing = set(item_ids)
        found: dict[str, ItemStatus] = {}
        if len(missing) > ALONE:
            # Items that were asked for lately are on the first pages, ended ones among them.
            oldest = await self._look(flow_id, missing, found, -(-len(missing) // PAGE_SIZE) + 1)
            if len(missing) > ALONE and oldest and (await self.capabilities()).list_filter:
                # Old ones that still run are few, and lie far behind many that have ended.
                live = {"state[in]": [state.value for state in ItemState if not state.terminal]}
                await self._look(flow_id, missing, found, MAX_PAGES, live | {"created_at[lte]": oldest})
        alone = await _all(self._status(item_id) for item_id in sorted(missing))
        return found | {status.item_id: status for status in alone if status is not None}

    async def vote_matrix(self, item_id: str, assets: Sequence[Asset], *, partial: bool = False) -> WinMatrix | None:
        if partial and not (await self.capabilities()).live_votes:
            return None
        names = [name_of(i, asset) for i, asset in enumerate(assets)]
        matrix = await self._about("vote-matrix", item_id, wire.VoteMatrix, partial)
        if matrix is None:
            return None
        try:
            wins = in_order_of(names, matrix, item_id)
        except Nameless:
            results = await self._about("results", item_id, wire.SeenResults, partial)
            if results is None:
                return None
            wins = in_order_of(names, matrix, item_id, results)
        if not partial and self._on_body is not None and (await self.capabilities()).raw_votes:
            # A record, not a label: where it is no good, as its body then shows, the votes above are all the same.
            with suppress(FlowRefused):
                await self._keep_votes(item_id)
        return wins

    async def segments(self, item_id: str, assets: Sequence[str]) -> tuple[Segment, ...] | None:
        answer = await self._about("segments", item_id, wire.ItemSegments)
        return None if answer is None else segments_in_order_of(assets, answer, item_id)

    async def results(self, item_id: str, assets: Sequence[Asset]) -> ItemResults | None:
        results = await self._about("results", item_id, wire.SeenResults)
        if results is None:
            return None
        return elo_in_order_of([name_of(i, asset) for i, asset in enumerate(assets)], results, item_id)

    async def stop(self, item_id: str) -> None:
        await self._calls.send("POST", f"/flow/item/{_id(item_id)}/stop")

    def health(self) -> dict[str, float]:
        return {
            "flow/circuit_open": float(self._calls.circuit.state != "closed"),
            "flow/unreachable_s": self._calls.circuit.open_for_s,
            "flow/requests_total": float(self._calls.requests),
            "flow/retries_total": float(self._calls.retries),
        }

    async def close(self) -> None:
        await self._calls.close()

    async def _create(self, path: str, answer: type[Answer], body: wire.Body, key: str | None = None) -> Answer:
        safe = (await self.capabilities()).idempotency
        return await self._calls.call("POST", path, answer, body=body, key=key if safe else None, repeatable=safe)

    async def _desired(self, spec: FlowSpec) -> int | None:
        """Where the service may stop asking. The vendor has the member, but only stops serving there: see `mapping`."""
        return spec.responses.desired if (await self.capabilities()).desired else None

    async def _marks(self, spec: FlowSpec) -> bool | None:
        """Whether raters may mark spans; None at a service that knows of no such thing."""
        return spec.segments if (await self.capabilities()).segments else None

    async def _add(self, dataset_id: str, place: int, asset: Asset, uploaded: str | None) -> str:
        name = identifier(dataset_id, place)
        candidate: wire.CandidateAsset
        if isinstance(asset, str):
            candidate = wire.TextAsset(text=asset, identifier=name)
        else:
            assert uploaded is not None
            candidate = wire.ExistingAsset(name=uploaded, identifier=name)
        body = wire.CreateDatapoint(segments=[wire.Segment(asset=candidate)], sort_index=place)
        # No key: our server knows a repetition by its sort index.
        created = await self._create(f"/dataset/{_id(dataset_id)}/datapoint", wire.DatapointCreated, body)
        return created.datapoint_id

    async def _upload(self, assets: Mapping[int, Asset]) -> dict[int, str]:
        """What the service calls the images among these; nothing costs money yet, and repeating does no harm."""
        files = {place: asset for place, asset in assets.items() if isinstance(asset, ImageFile)}
        urls = {place: asset.url for place, asset in assets.items() if isinstance(asset, ImageUrl)}
        if len(set(urls.values())) != len(urls):
            raise FlowRefused("Two candidates are the same image address; a service could not tell them apart.")
        sent = await _all(self._upload_file(place, image) for place, image in files.items())
        fetched = await self._upload_urls(list(urls.values())) if urls else {}
        return dict(zip(files, sent, strict=True)) | {place: fetched[url] for place, url in urls.items()}

    async def _upload_file(self, place: int, image: ImageFile) -> str:
        try:
            content = image.path.read_bytes()
        except OSError as error:
            raise FlowRefused(f"The image {image.path} cannot be read: {error.strerror}.") from error
        name = name_of(place, image)
        part = (name, content, mimetypes.guess_type(name)[0] or "application/octet-stream")
        uploaded = await self._calls.call("POST", "/asset/file", wire.FileUploaded, files={"file": part})
        return uploaded.file_name

    async def _upload_urls(self, urls: list[str]) -> dict[str, str]:
        """Names by address, once the service has fetched all of them."""
        correlation = str(uuid.uuid4())
        body = wire.UploadUrls(urls=urls, correlation_id=correlation)
        started = await self._calls.call("POST", "/asset/batch-upload", wire.UploadStarted, body=body)
        batch = f"/asset/batch-upload/{_id(started.batch_upload_id)}"
        try:
            async with asyncio.timeout(UPLOAD_S):
                await self._until_fetched(started.batch_upload_id, correlation)
        except TimeoutError:
            await self._calls.send("POST", f"{batch}/abort")
            raise FlowUnavailable(
                f"The service did not fetch {len(urls)} images within {UPLOAD_S:g} s. Check that they can be reached "
                "from outside, or give them as local files."
            ) from None
        ended = await self._calls.call("GET", batch, wire.UploadEnded)
        names = {row.url: row.file_name for row in ended.items if row.status == "Completed" and row.file_name}
        for row in ended.items:
            if row.url not in names:
                raise FlowRefused(f"The service could not fetch {row.url}: {row.error_message or row.status}.")
        if names.keys() != set(urls):
            raise BadAnswer(f"GET {batch} answered about {len(names)} images where {len(urls)} were sent.")
        return {url: name for url, name in names.items() if name}

    async def _until_fetched(self, batch_id: str, correlation: str) -> None:
        path, params = "/asset/batch-upload/status", {"correlationId": correlation}
        while (
            batch_id not in (await self._calls.call("GET", path, wire.UploadProgress, params=params)).completed_batches
        ):
            await asyncio.sleep(UPLOAD_POLL_S)

    async def _status(self, item_id: str) -> ItemStatus | None:
        path = f"/flow/ranking/item/{_id(item_id)}"
        item = await self._calls.find(path, wire.ItemRow, absent=404)
        if item is not None and item.id != item_id:
            raise BadAnswer(f"GET {path} answered about item {item.id!r}.")
        return item.status() if item else None

    async def _look(
        self,
        flow_id: str,
        missing: set[str],
        found: dict[str, ItemStatus],
        most: int,
        params: Mapping[str, str | list[str]] | None = None,
    ) -> str | None:
        """Move items from `missing` to `found`, from at most so many pages; returns when the last row was created."""
        oldest = None
        async for page in self._pages(_items(flow_id), wire.Page[wire.ItemRow], params, most=most):
            for row in page.items:
                if row.id in missing:
                    found[row.id] = row.status()
                    missing.remove(row.id)
                oldest = row.created_at
            if len(missing) <= ALONE:
                break
        return oldest

    async def _about(self, kind: str, item_id: str, answer: type[Answer], partial: bool = False) -> Answer | None:
        """What the service says about an item's votes; kept word for word once the item has ended."""
        path, keep = f"/flow/ranking/item/{_id(item_id)}/{kind}", self._on_body
        return await self._calls.find(
            path,
            answer,
            absent=409,
            params={"partial": "true"} if partial else None,
            keep=None if keep is None or partial else lambda body: keep(kind, item_id, body),
        )

    async def _keep_votes(self, item_id: str) -> None:
        keep, path = self._on_body, f"/flow/ranking/item/{_id(item_id)}/votes"
        assert keep is not None
        for number in range(1, MAX_PAGES + 1):
            page = await self._calls.find(
                path,
                wire.RawVotes,
                absent=404,
                params={"page": number, "page_size": RAW_VOTES_PAGE},
                keep=lambda body: keep("votes", item_id, body),
            )
            if page is None or not page.items or number * RAW_VOTES_PAGE >= page.total:
                return

    async def _pages(
        self,
        path: str,
        answer: type[wire.Page[wire.Row]],
        params: Mapping[str, str | list[str]] | None = None,
        *,
        most: int = MAX_PAGES,
    ) -> AsyncIterator[wire.Page[wire.Row]]:
        """Pages of a list, newest first, until its end or until there were `most`."""
        seen = 0
        for number in range(1, most + 1):
            query: dict[str, str | int | list[str]] = {"page": number, "page_size": PAGE_SIZE, "sort": "-created_at"}
            page = await self._calls.call("GET", path, answer, params=query | dict(params or {}))
            yield page
            seen += len(page.items)
            if not page.items or seen >= page.total:
                return
        if most == MAX_PAGES:
            raise BadAnswer(f"GET {path}: the list does not end after {MAX_PAGES} pages.")


async def _all(work: Iterable[Awaitable[Got]]) -> list[Got]:
    """Wait for all of it, also where some fails, so that nothing goes on behind an error; then the first error."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return [result for result in done if not isinstance(result, BaseException)]


def _items(flow_id: str) -> str:
    return f"/flow/ranking/{_id(flow_id)}/item"


def _id(value: str) -> str:
    """An id as one segment of a path, whatever a service put into it."""
    return quote(value, safe="")
