"""The strict stand-in of the vendor is not stricter than the vendor's own SDK: unmodified, it is never objected to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vendor import Vendor

pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own

SPEED = 60.0


@pytest.fixture
def vendor() -> Vendor:
    began = time.time()
    return Vendor(lambda: began + SPEED * (time.time() - began), domain="flow.test")


@pytest.fixture
def sdk(vendor: Vendor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name, value in {"HOME": str(tmp_path), "RAPIDATA_DISABLE_OTLP": "1", "RAPIDATA_silent_mode": "1"}.items():
        monkeypatch.setenv(name, value)
    httpx2 = pytest.importorskip("httpx2")
    from rapidata import RapidataClient
    from rapidata.api_client.rest import RESTClientObject
    from rapidata.rapidata_client import rapidata_client

    class ToTheStandIn(httpx2.BaseTransport):  # type: ignore[misc,name-defined]
        def handle_request(self, request: Any) -> Any:
            sent = httpx.Request(
                request.method, str(request.url), headers=dict(request.headers), content=request.read()
            )
            reply = vendor.answer(sent)
            return httpx2.Response(reply.status_code, headers=dict(reply.headers), content=reply.content)

    defaults = RESTClientObject._get_session_defaults
    monkeypatch.setattr(
        RESTClientObject, "_get_session_defaults", lambda self: {**defaults(self), "transport": ToTheStandIn()}
    )

    def offline(*args: object, **kwargs: object) -> None:
        raise rapidata_client.requests.ConnectionError("no network in tests")

    monkeypatch.setattr(rapidata_client.requests, "get", offline)
    client = RapidataClient(client_id=vendor.client_id, client_secret=vendor.client_secret, environment="flow.test")
    yield client
    client._openapi_service.api_client.rest_client.session.close()


def test_the_sdk_goes_through_all_it_can_do(sdk: Any, vendor: Vendor, tmp_path: Path) -> None:
    sdk.flow.preheat()
    flow = sdk.flow.create_ranking_flow("demo", "Which?", max_response_threshold=3, min_response_threshold=1)
    assert sdk.flow.get_flow_by_id(flow.id).name == "demo"
    assert [found.id for found in sdk.flow.find_flows("demo", amount=5)] == [flow.id]
    flow.update_config(instruction="Which one?", min_responses=2, max_responses=4)
    item = flow.create_new_flow_batch(["a", "b", "c"], context="Why?", data_type="text", time_to_live=60)
    (bought,) = vendor.items.values()
    assert [point.text for point in bought.candidates] == ["a", "b", "c"]
    assert [found.id for found in flow.get_flow_items(amount=5)] == [bought.id]
    while vendor.state(bought) == "Pending":
        time.sleep(0.01)
    for pair in ((0, 1), (0, 1), (2, 0)):
        assert vendor.vote(bought.id, *pair, held=True)
    matrix = item.get_win_loss_matrix()
    assert (matrix.loc["a", "b"], matrix.loc["c", "a"], matrix.to_numpy().sum()) == (2, 1, 3)
    assert bought.ended == "Completed"
    results = item.get_results()
    assert (set(results.datapoints), results.total_votes) == ({"a", "b", "c"}, 3)
    images = [tmp_path / "one.png", tmp_path / "two.png"]
    for image in images:
        image.write_bytes(b"not looked into")
    flow.create_new_flow_batch([str(image) for image in images], time_to_live=60)
    urls = ["https://example.com/a.png", "https://example.com/b.png"]
    flow.create_new_flow_batch(urls, time_to_live=60)
    _, files, fetched = vendor.items.values()
    assert [vendor.label(point) for point in files.candidates] == ["one.png", "two.png"]
    assert [vendor.label(point) for point in fetched.candidates] == urls
    flow.delete()
    assert sdk.flow.find_flows("demo", amount=5) == []
    assert vendor.violations == []
