"""The official SDK, unmodified, drives `rlhf serve`; `rlhf crowd` votes. All of them are processes of their own.

The SDK speaks https to two host names alone, so its HTTP library gets a transport that sends both to our server.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_world import Served, serve

pytestmark = pytest.mark.filterwarnings("ignore")  # the SDK's own

CROWD = ("--raters", "12", "--latency-p50-s", "0.01", "--latency-p95-s", "0.03", "--taste", "letters", "--dropout", "0")
TEXTS = ["xxxx", "axxx", "aaxx", "aaaa"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(scope="module")
def sdk(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAPIDATA_DISABLE_OTLP", "1")
        patch.setenv("RAPIDATA_cacheToDisk", "0")
        patch.setenv("RAPIDATA_silent_mode", "1")
        httpx2 = pytest.importorskip("httpx2")
        from rapidata import RapidataClient
        from rapidata.api_client.rest import RESTClientObject
        from rapidata.rapidata_client import rapidata_client

        class ToOurServer(httpx2.HTTPTransport):  # type: ignore[misc,name-defined]
            def handle_request(self, request: Any) -> Any:
                assert request.url.host in ("api.flow.test", "auth.flow.test")
                request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=httpx2.URL(server.url).port)
                request.headers["Host"] = "127.0.0.1"
                return super().handle_request(request)

        defaults = RESTClientObject._get_session_defaults
        patch.setattr(
            RESTClientObject, "_get_session_defaults", lambda self: {**defaults(self), "transport": ToOurServer()}
        )

        def offline(*args: object, **kwargs: object) -> None:
            raise rapidata_client.requests.ConnectionError("no network in tests")

        patch.setattr(rapidata_client.requests, "get", offline)
        client_id, secret = server.token("client", "sdk")
        client = RapidataClient(client_id=client_id, client_secret=secret, environment="flow.test")
        yield client
        client._openapi_service.api_client.rest_client.session.close()  # which it never does itself


@pytest.fixture(scope="module")
def voters(server: Served) -> Iterator[None]:
    with server.crowd(*CROWD):
        yield


def test_a_flow_is_created_found_changed_and_deleted(sdk: Any, server: Served) -> None:
    sdk.flow.preheat()
    flow = sdk.flow.create_ranking_flow(
        "contract", "Which has more vowels?", max_response_threshold=12, min_response_threshold=4
    )
    assert sdk.flow.get_flow_by_id(flow.id).name == "contract"
    assert [found.id for found in sdk.flow.find_flows("contract", amount=5)] == [flow.id]

    flow.update_config(instruction="Which has more vowels now?", min_responses=5, max_responses=9, serve_timeout=30)

    with server.store() as store:
        changed, _ = store.flow(flow.id)
    assert (changed.instruction, changed.responses.min, changed.responses.max) == ("Which has more vowels now?", 5, 9)
    assert changed.responses.desired == 9
    assert changed.settings["serveTimeoutSeconds"] == 30

    flow.delete()
    assert sdk.flow.find_flows("contract", amount=5) == []


@pytest.mark.usefixtures("voters")
def test_texts_are_ranked_by_the_crowd_and_everything_agrees_with_the_store(sdk: Any, server: Served) -> None:
    flow = sdk.flow.create_ranking_flow("texts", "More vowels?", max_response_threshold=40, min_response_threshold=10)
    item = flow.create_new_flow_batch(
        TEXTS,
        context="What has vowels?",
        data_type="text",
        private_metadata=[{"place": str(n)} for n in range(4)],
        time_to_live=60,
    )
    results, matrix, count = item.get_results(), item.get_win_loss_matrix(), item.get_response_count()

    assert item.get_status().value == "Completed"
    with server.store() as store:
        wins = store.matrix(item.id)
        assert [candidate.text for candidate in store.candidates(item.id)] == TEXTS
        assert all(vote.rater_id.startswith("rater_simulated_") for vote in store.votes(item.id))
    assert list(matrix.index) == list(matrix.columns) == TEXTS
    assert matrix.to_numpy().tolist() == wins.wins.tolist()
    assert count == wins.votes == 40
    elo = results.datapoints
    assert results.total_votes == 40
    assert set(elo) == set(TEXTS)
    assert max(elo, key=elo.get) == "aaaa"
    assert all(isinstance(score, int) for score in elo.values())
    assert sum(elo.values()) / 4 == pytest.approx(1200, abs=1)
    assert [listed.id for listed in flow.get_flow_items(amount=5)] == [item.id]


@pytest.mark.usefixtures("voters")
def test_images_are_uploaded_and_ranked_under_their_file_names(sdk: Any, server: Served, tmp_path: Path) -> None:
    files = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for shade, file in zip((10, 120, 250), files, strict=True):
        file.write_bytes(png(shade))
    flow = sdk.flow.create_ranking_flow("images", "Nicer?", max_response_threshold=9, min_response_threshold=3)

    item = flow.create_new_flow_batch([str(file) for file in files], context_assets=[str(files[0])], time_to_live=60)
    results, matrix = item.get_results(), item.get_win_loss_matrix()

    names = [file.name for file in files]
    assert set(results.datapoints) == set(names)
    assert list(matrix.index) == names
    with server.store() as store:
        assert matrix.to_numpy().tolist() == store.matrix(item.id).wins.tolist()
        for candidate, file in zip(store.candidates(item.id), files, strict=True):
            assert candidate.media is not None
            assert store.media(candidate.media)[0].read_bytes() == file.read_bytes()
        assert store.item(item.id).context_media == (store.candidates(item.id)[0].media,)


def test_images_by_address_are_refused_at_once_and_say_why(sdk: Any) -> None:
    flow = sdk.flow.create_ranking_flow("urls", "Nicer?", max_response_threshold=9)
    with pytest.raises(Exception, match=r"422|upload|fetches nothing"):
        flow.create_new_flow_batch(["https://example.org/a.png", "https://example.org/b.png"], time_to_live=60)


def png(shade: int) -> bytes:
    """One grey pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes([0, shade])))
        + chunk(b"IEND", b"")
    )
