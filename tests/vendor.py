"""A strict stand-in for the vendor's service, as docs/flow-protocol.md describes it.

It answers what the vendor's SDK was seen to accept, and notes every request outside of the protocol in `violations`: no
idempotency keys, 200 for creations, 409 before an item has ended, a list that lags. What happened is in the ledger:
`flows`, `datasets`, `items`, `votes`.
"""

from __future__ import annotations

import asyncio
import base64
import email
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import parse_qs

import httpx
import numpy as np

Json = dict[str, Any]
Labels = Literal["identifier", "text", "unique", "datapoint"]

TERMINAL = ("Completed", "Incomplete", "Stopped", "Failed")
HEADERS = {
    *("host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"),
    *("authorization", "x-client", "traceparent"),
}
STRING, INTEGER, NUMBER, ANY_LIST, OBJECT = str, int, (int, float), list, dict

FLOW_MEMBERS: dict[str, Any] = {
    **dict.fromkeys(("criteria", "validationSetId", "audienceId", "pidBatchMode"), STRING),
    **dict.fromkeys(("maxResponses", "minResponses", "drainDurationSeconds", "serveTimeoutSeconds"), INTEGER),
    **dict.fromkeys(("startingElo", "serveResponses", "targetResponseCount"), INTEGER),
    **dict.fromkeys(("pidMinSessionsPerMinute", "pidMaxSessionsPerMinute"), INTEGER),
    **dict.fromkeys(("pidProportionalGain", "pidIntegralGain", "pidDerivativeGain", "pidOutputOffset"), NUMBER),
    "serveToResponseRatio": NUMBER,
    "featureFlags": ANY_LIST,
}
NULL_RESETS = ("audienceId", "serveResponses", "serveToResponseRatio", "serveTimeoutSeconds", "drainDurationSeconds")


class Problem(Exception):
    def __init__(self, status: int, detail: str, violation: bool = False) -> None:
        super().__init__(detail)
        self.status, self.violation = status, violation


@dataclass
class Flow:
    id: str
    name: str
    created_at: float
    settings: Json
    deleted: bool = False

    def responses(self, key: str, default: int) -> int:
        value = self.settings.get(key)
        return default if value is None else int(value)

    @property
    def most(self) -> int:
        return self.responses("maxResponses", 100)

    @property
    def least(self) -> int:
        return self.responses("minResponses", min(20, self.most))

    @property
    def drain_s(self) -> float:
        return self.responses("drainDurationSeconds", 40)


@dataclass
class Datapoint:
    id: str
    sort_index: int
    text: str | None
    """None for an uploaded file."""
    file: str | None
    identifier: str | None
    """As the client sent it; the SDK sends none."""


@dataclass
class Item:
    id: str
    flow: Flow
    dataset_id: str
    candidates: list[Datapoint]
    """By sort index, which is how votes name them."""
    context: str | None
    created_at: float
    ttl_s: float
    drain_s: float
    wins: np.ndarray
    votes: int = 0
    stop_asked_at: float | None = None
    ended: str | None = None
    ended_at: float | None = None
    truth: np.ndarray | None = None
    """The votes at the moment the item ended."""
    forced: str | None = None
    """Whatever the service says its state is."""
    failure: str | None = None
    forgotten: bool = False
    """404 from here on, and not in the list."""


@dataclass
class Vendor:
    """The service on an injected clock (Unix seconds); both hosts are behind `transport()`.

    Args:
        labels: What a candidate is called in results and matrix: what the client sent as `identifier` or else the text;
            always the text; an identifier of the service's own; or the datapoint's id. A file is called by its original
            file name or source URL.
    """

    clock: Callable[[], float]
    labels: Labels = "identifier"
    domain: str = "vendor.test"
    client_id: str = "client-7"
    client_secret: str = "s3cr3t-of-the-client"
    token_life_s: float = 3600.0
    listing_lag_s: float = 0.0
    pending_s: float = 6.0
    stopping_s: float = 3.0
    latency_s: tuple[float, float] = (0.01, 0.05)
    upload_s: float = 2.0
    vote_weight: float = 1.0
    """What a vote counts in the matrix; the protocol allows fractions."""
    seed: int = 0

    flows: dict[str, Flow] = field(default_factory=dict)
    datasets: dict[str, list[Datapoint]] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    votes: list[tuple[str, int, int]] = field(default_factory=list)
    """Item, winner and loser of each vote that was accepted."""
    stopped: list[str] = field(default_factory=list)
    """Items that were asked to stop while they ran, in that order."""
    files: dict[str, Json] = field(default_factory=dict)
    uploads: dict[str, Json] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    """Unix time at which each ends."""
    violations: list[str] = field(default_factory=list)
    requests: list[tuple[float, str, str]] = field(default_factory=list)
    """When, method, path."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._count = 0

    # What a test does.

    def transport(self) -> httpx.AsyncBaseTransport:
        return _Transport(self)

    def open_flow(self, name: str = "flow", *, least: int = 2, most: int = 6, **settings: Any) -> str:
        flow = Flow(self._id("flw"), name, self.clock(), {"minResponses": least, "maxResponses": most, **settings})
        self.flows[flow.id] = flow
        return flow.id

    def vote(self, item_id: str, winner: int, loser: int, *, held: bool = False, late: bool = False) -> bool:
        """One person's answer, candidates by sort index; True if it counts.

        `held`: the person got the pair before the item began to drain. `late`: count it although the item has ended.
        """
        item, now = self.items[item_id], self.clock()
        state = self.state(item)
        draining = now >= item.created_at + item.ttl_s - item.drain_s
        if not late and (state not in ("Running", "Stopping") or (draining and not held)):
            return False
        assert winner != loser
        item.wins[winner, loser] += self.vote_weight
        item.votes += 1
        self.votes.append((item_id, winner, loser))
        self.state(item)
        return True

    def items_of(self, first_text: str) -> list[Item]:
        """Items whose candidate 0 is this text, oldest first."""
        return [item for item in self.items.values() if item.candidates and item.candidates[0].text == first_text]

    def revoke_tokens(self) -> None:
        self.tokens.clear()

    def state(self, item: Item) -> str:
        """How the item stands now; a terminal state stays."""
        now = self.clock()
        if item.ended is None:
            if item.failure is not None:
                self._end(item, "Failed", now)
            elif item.stop_asked_at is not None and now >= item.stop_asked_at + self.stopping_s:
                self._end(item, "Stopped", now)
            elif item.votes >= item.flow.most:
                self._end(item, "Completed", now)
            elif now >= item.created_at + item.ttl_s:
                self._end(item, "Completed" if item.votes >= item.flow.least else "Incomplete", now)
        if item.forced is not None:
            return item.forced
        if item.ended is not None:
            return item.ended
        if item.stop_asked_at is not None:
            return "Stopping"
        return "Pending" if now < item.created_at + self.pending_s else "Running"

    def label(self, point: Datapoint) -> str:
        if point.file is not None:
            return str(self.files[point.file]["label"])
        if self.labels == "datapoint":
            return point.id
        return self._identifier(point) or ""

    # What the service does.

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append((self.clock(), request.method, request.url.path))
        place = f"{request.method} {request.url.copy_with(query=None)}"
        try:
            return self._route(request)
        except Problem as problem:
            if problem.violation:
                self.violations.append(f"{place}: {problem}")
            if problem.status == 401:
                return httpx.Response(401)
            body = {"type": "about:blank", "title": str(problem), "status": problem.status, "detail": str(problem)}
            content = json.dumps({**body, "instance": request.url.path, "traceId": "00-stand-in"}).encode()
            return httpx.Response(problem.status, content=content, headers={"Content-Type": "application/problem+json"})

    def _route(self, request: httpx.Request) -> httpx.Response:
        parts = tuple(request.url.path.strip("/").split("/"))
        if unknown := {name.lower() for name in request.headers} - HEADERS:
            raise Problem(400, f"header {sorted(unknown)} is not in the protocol", violation=True)
        if request.url.scheme != "https":
            raise Problem(400, "the service speaks https only", violation=True)
        if request.url.host == f"auth.{self.domain}":
            return self._identity(request, parts)
        if request.url.host != f"api.{self.domain}":
            raise Problem(404, "another host", violation=True)
        self._authenticate(request)
        if request.headers.get("accept") != "application/json":
            raise Problem(400, f"Accept is {request.headers.get('accept')!r}", violation=True)
        match request.method, *parts:
            case "POST", "flow", "ranking":
                return self._create_flow(request)
            case "PATCH", "flow", "ranking", flow_id:
                return self._update_flow(request, flow_id)
            case "GET", "flow":
                return self._find_flows(request)
            case "GET", "flow", flow_id if flow_id != "ranking":
                return self._show_flow(request, flow_id)
            case "DELETE", "flow", flow_id:
                self._plain(request)
                self._flow(flow_id).deleted = True
                return httpx.Response(204)
            case "POST", "campaign", "boost", "preheat":
                self._plain(request)
                return httpx.Response(204)
            case "POST", "dataset":
                body = self._body(request, {"name": STRING}, {"schema": OBJECT})
                assert body["name"]
                self.datasets[new := self._id("dts")] = []
                return httpx.Response(200, json={"datasetId": new})
            case "POST", "dataset", dataset_id, "datapoint":
                return self._add_datapoint(request, dataset_id)
            case "POST", "flow", "ranking", flow_id, "item":
                return self._create_item(request, flow_id)
            case "GET", "flow", "ranking", flow_id, "item":
                return self._list(request, flow_id)
            case "GET", "flow", "ranking", "item", item_id:
                self._plain(request)
                return httpx.Response(200, json=self._document(self._item(item_id)))
            case "GET", "flow", "ranking", "item", item_id, "results" | "vote-matrix" as what:
                self._plain(request)
                return self._votes(self._item(item_id), what)
            case "POST", "flow", "item", item_id, "stop":
                self._plain(request)
                item = self._item(item_id)
                if self.state(item) in ("Pending", "Running"):
                    item.stop_asked_at = self.clock()
                    self.stopped.append(item_id)
                return httpx.Response(204)
            case "POST", "asset", "file":
                return self._upload_file(request)
            case "POST", "asset", "url":
                (url,) = self._query(request, {"url": 1})["url"]
                return httpx.Response(200, json=self._uploaded(url, {"sourceUrl": url}))
            case "POST", "asset", "batch-upload":
                return self._upload_urls(request)
            case "GET", "asset", "batch-upload", what:
                return self._uploads(request, what)
            case "POST", "asset", "batch-upload", upload_id, "abort":
                self._plain(request)
                self._known(self.uploads, upload_id)["aborted"] = True
                return httpx.Response(204)
        raise Problem(404, "no such path and method in the protocol", violation=True)

    # Who asks.

    def _identity(self, request: httpx.Request, parts: tuple[str, ...]) -> httpx.Response:
        if (request.method, parts) == ("GET", ("connect", "userinfo")):
            self._authenticate(request)
            return httpx.Response(200, json={"sub": "someone", "email": "someone@example.org", "role": "Customer"})
        if (request.method, parts) != ("POST", ("connect", "token")):
            raise Problem(404, "no such path and method in the protocol", violation=True)
        self._query(request, {})
        form = parse_qs(request.content.decode(), strict_parsing=True)
        wanted = {"grant_type": ["client_credentials"], "scope": ["openid email api"]}
        if form != wanted or not request.headers["content-type"].startswith("application/x-www-form-urlencoded"):
            raise Problem(400, f"a token request is a form of {wanted}, not {form}", violation=True)
        pair = f"{self.client_id}:{self.client_secret}"
        if request.headers.get("authorization") != "Basic " + base64.b64encode(pair.encode()).decode():
            return httpx.Response(401, json={"error": "invalid_client", "error_description": "unknown client"})
        token = self._id("tok-s3cr3t")
        self.tokens[token] = self.clock() + self.token_life_s
        answer = {"access_token": token, "token_type": "Bearer", "expires_in": int(self.token_life_s)}
        return httpx.Response(200, json={**answer, "scope": "openid email api"})

    def _authenticate(self, request: httpx.Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind != "Bearer" or not token:
            raise Problem(401, "a request without a token", violation=True)
        if self.clock() >= self.tokens.get(token, 0.0):
            raise Problem(401, "the token is over")

    # Flows.

    def _create_flow(self, request: httpx.Request) -> httpx.Response:
        body = self._body(request, {"name": STRING, "criteria": STRING}, FLOW_MEMBERS)
        settings = {key: value for key, value in body.items() if key != "name" and value is not None}
        flow = Flow(self._id("flw"), body["name"], self.clock(), settings)
        self._sound(flow)
        self.flows[flow.id] = flow
        return httpx.Response(200, json={"flowId": flow.id})

    def _update_flow(self, request: httpx.Request, flow_id: str) -> httpx.Response:
        members = {key: kind for key, kind in FLOW_MEMBERS.items() if key != "validationSetId"}
        flow, body = self._flow(flow_id), self._body(request, {}, members)
        resets = (*NULL_RESETS, "targetResponseCount")
        settings = flow.settings | {key: value for key, value in body.items() if value is not None or key in resets}
        self._sound(Flow(flow.id, flow.name, flow.created_at, settings))
        flow.settings = settings  # items hold their own copy, so only later ones change
        return httpx.Response(204)

    def _sound(self, flow: Flow) -> None:
        serve = flow.responses("serveResponses", flow.most)
        if not 1 <= flow.least <= flow.most or not 1 <= serve <= flow.most:
            raise Problem(400, "1 <= minResponses, serveResponses <= maxResponses does not hold", violation=True)
        for flag in flow.settings.get("featureFlags") or []:
            if flag.keys() != {"key", "value"} or not all(isinstance(part, str) for part in flag.values()):
                raise Problem(400, f"feature flag {flag}", violation=True)

    def _find_flows(self, request: httpx.Request) -> httpx.Response:
        query = self._page_query(request, {"name[contains]", "name[eq]"})
        part, name = query.get("name[contains]", [""])[0], query.get("name[eq]", [None])[0]
        rows = [flow for flow in self.flows.values() if not flow.deleted and part in flow.name]
        rows = [flow for flow in rows if name in (None, flow.name)]
        owner = {"ownerId": "c0ffee00-0000-4000-8000-000000000001", "ownerMail": "o@example.org"}
        made = [
            {"id": f.id, "name": f.name, "type": "Ranking", "organizationId": "org_1", "createdAt": iso(f.created_at)}
            for f in rows
        ]
        return self._page(query, [{**row, **owner} for row in made])

    def _show_flow(self, request: httpx.Request, flow_id: str) -> httpx.Response:
        self._plain(request)
        flow = self._flow(flow_id)
        nothing = dict.fromkeys(FLOW_MEMBERS.keys() - {"validationSetId", "audienceId"})
        fixed = {"_t": "RankingFlow", "id": flow.id, "name": flow.name, "campaignId": "cmp_1", "startingElo": 1200}
        count = sum(item.flow.id == flow_id for item in self.items.values())
        thresholds = {"minResponses": flow.least, "maxResponses": flow.most, "flowItemCount": count}
        made = {"featureFlags": flow.settings.get("featureFlags") or [], "createdAt": iso(flow.created_at)}
        shown = {key: value for key, value in flow.settings.items() if key in nothing}
        return httpx.Response(200, json={**nothing, **fixed, **shown, **thresholds, **made})

    # Datasets and items.

    def _add_datapoint(self, request: httpx.Request, dataset_id: str) -> httpx.Response:
        points = self._known(self.datasets, dataset_id)
        optional = {"group": STRING, "privateMetadata": OBJECT}
        body = self._body(request, {"segments": ANY_LIST, "sortIndex": INTEGER}, optional)
        if any(not isinstance(value, str) for value in (body.get("privateMetadata") or {}).values()):
            raise Problem(400, "privateMetadata maps strings to strings", violation=True)
        (segment, *more) = body["segments"] or [{}]
        if more or segment.keys() != {"key", "kind", "asset"}:
            raise Problem(400, f"segments {body['segments']}", violation=True)
        if (segment["key"], segment["kind"]) != ("asset", "Asset"):
            raise Problem(400, f"segment {segment['key']} of kind {segment['kind']}", violation=True)
        asset = segment["asset"]
        sent = {"_t", "metadata", "identifier"}
        text = asset.get("text") if asset.get("_t") == "TextAssetInput" and asset.keys() <= sent | {"text"} else None
        file = (
            asset.get("name") if asset.get("_t") == "ExistingAssetInput" and asset.keys() <= sent | {"name"} else None
        )
        if not isinstance(text, str) and not isinstance(file, str):
            raise Problem(400, f"asset {asset}", violation=True)
        if file is not None:
            self._known(self.files, file)
        if body["sortIndex"] < 0 or any(point.sort_index == body["sortIndex"] for point in points):
            self.violations.append(f"sortIndex {body['sortIndex']} is in {dataset_id} twice, or negative")
        points.append(Datapoint(self._id("dpt"), body["sortIndex"], text, file, asset.get("identifier")))
        return httpx.Response(200, json={"datapointId": points[-1].id})

    def _create_item(self, request: httpx.Request, flow_id: str) -> httpx.Response:
        flow = self._flow(flow_id)
        optional = {"context": STRING, "contextAsset": OBJECT, "timeToLiveInSeconds": INTEGER}
        body = self._body(request, {"datasetId": STRING}, {**optional, "drainDurationInSeconds": INTEGER})
        points = sorted(self._known(self.datasets, body["datasetId"]), key=lambda point: point.sort_index)
        ttl_s, drain_s = body.get("timeToLiveInSeconds"), body.get("drainDurationInSeconds")
        ttl_s, drain_s = 240 if ttl_s is None else ttl_s, flow.drain_s if drain_s is None else drain_s
        if not drain_s + 20 <= ttl_s <= 3600:
            raise Problem(400, f"a time to live is {drain_s + 20:g} to 3600 s, not {ttl_s}", violation=True)
        if (asset := body.get("contextAsset")) is not None:
            for one in asset.get("assets", [asset]):
                if one.keys() - {"_t", "name", "metadata", "identifier"}:
                    raise Problem(400, f"context asset {asset}", violation=True)
                self._known(self.files, one["name"])
        settings = Flow(flow.id, flow.name, flow.created_at, {**flow.settings})
        size = len(points)
        item = Item(
            *(self._id("fli"), settings, body["datasetId"], points, body.get("context"), self.clock()),
            *(ttl_s, drain_s, np.zeros((size, size))),
        )
        item.failure = None if points else "the dataset is empty"
        self.items[item.id] = item
        return httpx.Response(200, json={"flowItemId": item.id})

    def _list(self, request: httpx.Request, flow_id: str) -> httpx.Response:
        self._flow(flow_id)
        filters = {f"{name}[{op}]" for name in ("state", "created_at") for op in ("eq", "neq", "in")}
        filters |= {f"created_at[{op}]" for op in ("gt", "gte", "lt", "lte")} | {"state[not_contains]", "logic"}
        query = self._page_query(request, filters)
        seen_before = self.clock() - self.listing_lag_s
        items = [item for item in self.items.values() if item.flow.id == flow_id and not item.forgotten]
        items = [item for item in items if item.created_at <= seen_before and self._matches(item, query)]
        rows = [{**self._document(item), "flowId": None} for item in items]
        return self._page(query, [{k: v for k, v in row.items() if k not in ("flowId", "expiresAt")} for row in rows])

    def _matches(self, item: Item, query: dict[str, list[str]]) -> bool:
        values = {"state": self.state(item), "created_at": item.created_at}
        tests: dict[str, Callable[[Any, list[Any]], bool]] = {
            "eq": lambda value, asked: value == asked[0],
            "neq": lambda value, asked: value != asked[0],
            "in": lambda value, asked: value in asked,
            "gt": lambda value, asked: value > asked[0],
            "gte": lambda value, asked: value >= asked[0],
            "lt": lambda value, asked: value < asked[0],
            "lte": lambda value, asked: value <= asked[0],
        }
        results = []
        for key, given in query.items():
            name, _, op = key.rstrip("]").partition("[")
            if name in values and op in tests:
                asked: list[Any] = [moment(one) for one in given] if name == "created_at" else given
                results.append(tests[op](values[name], asked))
        return any(results) if query.get("logic") == ["or"] and results else all(results)

    def _document(self, item: Item) -> Json:
        state, started = self.state(item), item.created_at + self.pending_s
        ended = None if item.ended_at is None else iso(item.ended_at)
        return {
            **{"id": item.id, "flowId": item.flow.id, "datasetId": item.dataset_id, "workflowId": "wfl_1"},
            **{"state": state, "context": item.context, "failureMessage": item.failure},
            "createdAt": iso(item.created_at),
            "expiresAt": iso(item.created_at + item.ttl_s),
            "startedAt": iso(started) if self.clock() >= started else None,
            "completedAt": ended if item.ended == "Completed" else None,
            "failedAt": ended if item.ended == "Failed" else None,
        }

    def _votes(self, item: Item, what: str) -> httpx.Response:
        state = self.state(item)
        if state not in TERMINAL or state == "Failed":
            raise Problem(409, f"flow item is {state}")
        order = list(range(len(item.candidates)))
        random.Random(item.id).shuffle(order)  # nothing says in which order candidates come back
        if what == "results":
            strength = item.wins.sum(1) - item.wins.sum(0)
            rows = [self._result(item.candidates[i], 1200 + 10 * int(strength[i])) for i in order]
            return httpx.Response(200, json={"datapoints": rows, "totalVotes": int(item.wins.sum())})
        labels = [self.label(item.candidates[i]) for i in order]
        data = item.wins[np.ix_(order, order)].tolist()
        return httpx.Response(200, json={"index": labels, "columns": labels, "data": data})

    def _result(self, point: Datapoint, elo: int) -> Json:
        if point.file is None:
            asset: Json = {"_t": "TextAsset", "text": point.text, "metadata": {}, "identifier": self._identifier(point)}
            return {"id": point.id, "elo": elo, "asset": asset}
        file = self.files[point.file]
        name, url = file.get("originalFilename"), file.get("sourceUrl")
        metadata: Json = {}
        if name is not None:
            metadata["originalFilename"] = {"_t": "OriginalFilenameMetadata", "originalFilename": name}
        if url is not None:
            metadata["sourceUrl"] = {"_t": "SourceUrlMetadataModel", "url": url}
        shown = {"_t": "FileAsset", "fileName": point.file, "metadata": metadata, "identifier": point.file}
        return {"id": point.id, "elo": elo, "asset": shown}

    def _identifier(self, point: Datapoint) -> str | None:
        match self.labels:
            case "identifier":
                return point.text if point.identifier is None else point.identifier
            case "text":
                return point.text
            case "unique":
                return f"asset-of-{point.id}"
            case "datapoint":
                return None

    # Media.

    def _upload_file(self, request: httpx.Request) -> httpx.Response:
        self._query(request, {"compress": 0, "quality": 0, "maxdim": 0})
        kind = request.headers.get("content-type", "")
        message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + request.content)
        parts: list[Any] = list(message.walk())[1:]
        names = [part.get_param("name", header="content-disposition") for part in parts]
        if not kind.startswith("multipart/form-data") or names != ["file"]:
            raise Problem(400, "an upload is one multipart part named file", violation=True)
        filename = parts[0].get_filename()
        return httpx.Response(200, json=self._uploaded(filename or "", {"originalFilename": filename}))

    def _uploaded(self, label: str, metadata: Json) -> Json:
        name = self._id("file") + ".png"
        self.files[name] = {"label": label, **metadata}
        sizes = {"originalSizeBytes": 1, "finalSizeBytes": 1}
        return {"fileName": name, "warnings": [], "wasCompressed": False, **sizes}

    def _upload_urls(self, request: httpx.Request) -> httpx.Response:
        body = self._body(request, {"urls": ANY_LIST, "correlationId": STRING}, {"compression": OBJECT})
        if not 1 <= len(body["urls"]) <= 1000:
            raise Problem(400, "1 to 1000 urls", violation=True)
        new = self._id("bup")
        self.uploads[new] = {**body, "done_at": self.clock() + self.upload_s, "aborted": False}
        return httpx.Response(200, json={"batchUploadId": new})

    def _uploads(self, request: httpx.Request, what: str) -> httpx.Response:
        if what == "status":
            (correlation,) = self._query(request, {"correlationId": 1})["correlationId"]
            ids = [key for key, upload in self.uploads.items() if upload["correlationId"] == correlation]
            if not ids:
                raise Problem(404, f"no upload {correlation}")
            done = [key for key in ids if self.clock() >= self.uploads[key]["done_at"]]
            total = sum(len(self.uploads[key]["urls"]) for key in ids)
            count = sum(len(self.uploads[key]["urls"]) for key in done)
            status = "Completed" if done == ids else "Processing"
            counts = {"totalCount": total, "completedCount": count, "failedCount": 0}
            return httpx.Response(200, json={"status": status, **counts, "completedBatches": done})
        self._plain(request)
        upload = self._known(self.uploads, what)
        done_now, urls = self.clock() >= upload["done_at"], sorted(upload["urls"])
        if done_now and "names" not in upload:
            upload["names"] = [self._uploaded(url, {"sourceUrl": url})["fileName"] for url in urls]
        items = [
            {"url": url, "status": "Completed", "fileName": upload["names"][i], "warnings": []}
            if done_now
            else {"url": url, "status": "Pending"}
            for i, url in enumerate(urls)
        ]
        counts = {"totalCount": len(urls), "completedCount": len(urls) * done_now, "failedCount": 0}
        status = "Completed" if done_now else "Processing"
        return httpx.Response(200, json={"batchUploadId": what, "status": status, **counts, "items": items})

    # Reading strictly.

    def _query(self, request: httpx.Request, allowed: dict[str, int]) -> dict[str, list[str]]:
        """The query; `allowed` maps names to how often they must be there at least."""
        query = parse_qs(request.url.query.decode(), keep_blank_values=True)
        if unknown := query.keys() - allowed.keys():
            raise Problem(400, f"query {sorted(unknown)} is not in the protocol", violation=True)
        if missing := [name for name, least in allowed.items() if len(query.get(name, [])) < least]:
            raise Problem(400, f"query {missing} is missing", violation=True)
        return query

    def _page_query(self, request: httpx.Request, filters: set[str]) -> dict[str, list[str]]:
        self._bodyless(request)
        query = self._query(request, {"page": 0, "page_size": 0, "sort": 0, **dict.fromkeys(filters, 0)})
        if query.get("sort", ["-created_at"]) != ["-created_at"]:
            raise Problem(400, f"sort {query['sort']}", violation=True)
        return query

    def _page(self, query: dict[str, list[str]], rows: list[Json]) -> httpx.Response:
        """Newest first; `rows` are oldest first."""
        number, size = int(query.get("page", ["1"])[0]), int(query.get("page_size", ["10"])[0])
        if number < 1 or size < 1:
            raise Problem(400, "pages count from 1", violation=True)
        rows = rows[::-1]
        shown = rows[(number - 1) * size : number * size]
        counts = {"total": len(rows), "page": number, "pageSize": size, "totalPages": -(-len(rows) // size)}
        return httpx.Response(200, json={**counts, "items": shown})

    def _plain(self, request: httpx.Request) -> None:
        self._query(request, {})
        self._bodyless(request)

    def _bodyless(self, request: httpx.Request) -> None:
        if request.content:
            raise Problem(400, "a body where none belongs", violation=True)

    def _body(self, request: httpx.Request, required: dict[str, Any], optional: dict[str, Any]) -> Json:
        self._query(request, {})
        if request.headers.get("content-type") != "application/json":
            raise Problem(400, f"Content-Type is {request.headers.get('content-type')!r}", violation=True)
        body = json.loads(request.content)
        if unknown := body.keys() - required.keys() - optional.keys():
            raise Problem(400, f"members {sorted(unknown)} are not in the protocol", violation=True)
        for name, kind in {**required, **optional}.items():
            value = body.get(name)
            if value is None and name not in required:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise Problem(400, f"member {name} is {value!r}", violation=True)
        return dict(body)

    def _flow(self, flow_id: str) -> Flow:
        flow = self.flows.get(flow_id)
        if flow is None or flow.deleted:
            raise Problem(404, f"flow {flow_id} does not exist")
        return flow

    def _item(self, item_id: str) -> Item:
        item = self.items.get(item_id)
        if item is None or item.forgotten:
            raise Problem(404, f"flow item {item_id} does not exist")
        return item

    def _known(self, table: dict[str, Any], key: str) -> Any:
        if key not in table:
            raise Problem(404, f"{key} does not exist")
        return table[key]

    def _end(self, item: Item, state: str, now: float) -> None:
        item.ended, item.ended_at, item.truth = state, now, item.wins.copy()

    def _id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._rng.getrandbits(48):012x}{self._count}"


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, vendor: Vendor) -> None:
        self._vendor = vendor
        self._rng = random.Random(vendor.seed)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        await asyncio.sleep(self._rng.uniform(*self._vendor.latency_s))  # so that requests overtake each other
        return self._vendor.answer(request)


def iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
