"""What the owner's page is told, and gold pairs over HTTP."""

from __future__ import annotations

import httpx
import pytest
from flow_world import World
from test_server_store import open_item

from rlhf_cli.flow.base import Responses
from rlhf_cli.flow.wire import Outcome
from rlhf_cli.server import dashboard, gold
from rlhf_cli.server.markdown import render

ANY = Responses(1, 20, 20)


def cast(world: World, rater_id: str, outcome: Outcome, response_ms: int) -> None:
    pair = world.store.lease(rater_id)
    assert pair is not None
    world.store.vote(pair.id, rater_id, outcome, response_ms)


def test_figures_are_those_of_the_votes(world: World) -> None:
    open_item(world, texts=6, responses=ANY)
    hasty, calm = world.rater(), world.rater()
    for _ in range(3):
        cast(world, hasty, "left", 100)
        cast(world, calm, "right", 5000)
    cast(world, calm, "skip", 50)
    board = dashboard.overview(world.store)
    raters = {row["id"]: row for row in board["raters"]}
    assert (raters[hasty]["votes"], raters[hasty]["fast"], raters[hasty]["left_share"]) == (3, 3, 1.0)
    assert (raters[calm]["votes"], raters[calm]["fast"], raters[calm]["skipped"]) == (3, 0, 1)
    assert board["votes"] == {"counted": 6, "late": 0, "skipped": 1, "undone": 0}
    assert board["perMinute"][-1] == sum(board["perMinute"]) == 7
    assert board["latest"][0]["votes"] == 6


def test_a_group_is_shown_best_first_with_its_matrix_in_the_same_order(world: World) -> None:
    item_id = open_item(world, texts=3, responses=ANY)
    world.vote(9)  # the longer text wins
    group = dashboard.one_item(world.store, item_id)
    assert [row["shown"] for row in group["completions"]] == ["xxx", "xx", "x"]
    assert [row["place"] for row in group["completions"]] == [3, 2, 1]
    assert all(group["matrix"][j][i] == 0 for i in range(3) for j in range(i, 3))
    assert sum(map(sum, group["matrix"])) == 9
    assert all(row["low"] < row["score"] < row["high"] for row in group["completions"])


async def test_gold_pairs_are_set_by_clients_and_owners_and_seen_by_no_rater(world: World) -> None:
    flow_id = world.store.item(open_item(world)).flow_id
    path, pairs = f"/flow/ranking/{flow_id}/gold", [{"prompt": "Is 4 even?", "better": "Yes.", "worse": "No."}]
    async with httpx.AsyncClient(transport=world.transport, base_url="http://localhost") as http:
        for role, status in (("rater", 403), ("client", 204), ("owner", 204)):
            _, secret = world.store.tokens.add(role, role)  # type: ignore[arg-type]
            headers = {"Authorization": f"Bearer {secret}"}
            assert (await http.put(path, json={"pairs": pairs}, headers=headers)).status_code == status
            assert (await http.get(path, headers=headers)).status_code == (403 if status == 403 else 200)
        assert (await http.get(path, headers=headers)).json() == {"pairs": pairs}
        for wrong in ({"pairs": [{"prompt": "", "better": "a", "worse": "b"}]}, {"pairs": pairs, "x": 1}, {}):
            assert (await http.put(path, json=wrong, headers=headers)).status_code == 400
        assert (await http.put("/flow/ranking/none/gold", json={"pairs": []}, headers=headers)).status_code == 404
    assert gold.pairs(world.store, flow_id) == [gold.GoldPair("Is 4 even?", "Yes.", "No.")]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**bold** `code`", "<p><strong>bold</strong> <code>code</code></p>\n"),
        ("1 < 2 & <b>3</b>", "<p>1 &lt; 2 &amp; &lt;b&gt;3&lt;/b&gt;</p>\n"),
        ("![x](http://e/x.png) [y](http://e)", "<p>![x](http://e/x.png) [y](http://e)</p>\n"),
        ("<http://e.example>", "<p>&lt;http://e.example&gt;</p>\n"),
        ("```js onload=x\na\n```", "<pre><code>a\n</code></pre>\n"),
        ("a\u202eb", "<p>a&lt;U+202E&gt;b</p>\n"),
    ],
)
def test_markdown_is_structure_and_nothing_else(text: str, html: str) -> None:
    assert render(text) == html
