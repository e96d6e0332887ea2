"""What the owner's page shows: figures of the whole, and one group at a time. Read only."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.ranking.agreement import response_floor_s
from rlhf_cli.ranking.bradley_terry import rank
from rlhf_cli.server import figures
from rlhf_cli.server.requests import for_role
from rlhf_cli.server.results_api import flags
from rlhf_cli.server.store import Store
from rlhf_cli.server.tokens import Token

LATEST_ITEMS = 50
MINUTES = 60
FRESH_S = 2.0
"""However many pages look on, the figures are computed once in so many seconds."""
_NOT_KEPT = {"Cache-Control": "no-store"}


@for_role("owner", browser=True)
async def board(request: Request, store: Store, _: Token) -> Response:
    at, body = getattr(request.app.state, "board", (0.0, None))
    if body is None or time.monotonic() - at > FRESH_S:
        body = await run_in_threadpool(overview, store)
        request.app.state.board = (time.monotonic(), body)
    return JSONResponse(body, headers=_NOT_KEPT)


@for_role("owner", browser=True)
async def group(request: Request, store: Store, _: Token) -> Response:
    return JSONResponse(await run_in_threadpool(one_item, store, request.path_params["item_id"]), headers=_NOT_KEPT)


def overview(store: Store) -> dict[str, Any]:
    """All figures of the page."""
    with store.now() as (db, now):
        items = db.execute(
            "SELECT i.id, substr(i.context, 1, 200) AS prompt, i.state, i.votes, i.live, i.desired, i.max, i.size, "
            "i.created_at, i.ended_at, f.name AS flow FROM items i JOIN flows f ON f.id = i.flow_id "
            "ORDER BY i.created_at DESC, i.rowid DESC LIMIT ?",
            (LATEST_ITEMS,),
        ).fetchall()
        ages = db.execute(
            "SELECT CAST((?1 - created_at) / 60 AS INTEGER), COUNT(*) FROM votes WHERE created_at > ?1 - ?2 GROUP BY 1",
            (now, 60 * MINUTES),
        ).fetchall()
    per_minute = [0] * MINUTES
    for minutes_ago, count in ages:
        per_minute[MINUTES - 1 - max(0, min(minutes_ago, MINUTES - 1))] = count
    fast = fast_votes(store)
    body = figures.summary(store)
    for row in body["raters"]:
        row["fast"] = fast[row["id"]]
    return {**body, "now": now, "perMinute": per_minute, "latest": [dict(row) for row in items]}


def fast_votes(store: Store) -> Counter[str]:
    """By rater, those of the latest votes that came before anybody could have skimmed the texts. Images have none."""
    with store.now() as (db, _):
        votes = db.execute(
            "SELECT v.rater_id, v.response_ms, v.left, v.right, i.dataset_id, i.context FROM votes v "
            "JOIN items i ON i.id = v.item_id WHERE v.response_ms IS NOT NULL AND v.outcome <> 'skip' "
            "ORDER BY v.id DESC LIMIT ?",
            (figures.RECENT,),
        ).fetchall()
        datasets = json.dumps(list({vote["dataset_id"] for vote in votes}))
        texts: dict[str, list[str]] = {}
        for dataset_id, text in db.execute(
            "SELECT dataset_id, text FROM datapoints WHERE dataset_id IN (SELECT value FROM json_each(?)) "
            "ORDER BY dataset_id, sort_index",
            (datasets,),
        ):
            texts.setdefault(dataset_id, []).append(text)
    fast: Counter[str] = Counter()
    for vote in votes:
        shown = [vote["context"], *(texts[vote["dataset_id"]][side] for side in (vote["left"], vote["right"]))]
        words = sum(len(text.split()) for text in shown)
        fast[vote["rater_id"]] += vote["response_ms"] / 1000 < response_floor_s(words)
    return fast


def one_item(store: Store, item_id: str) -> dict[str, Any]:
    """A group: prompt, completions best first with their intervals, matrix in that order, and raw votes counted."""
    item, candidates, wins = store.item(item_id), store.candidates(item_id), store.matrix(item_id)
    ranking = rank(wins, tau=store.prior_sd(item), min_votes=item.responses.min)
    votes = store.votes(item_id)
    order = ranking.order
    return {
        "id": item.id,
        "prompt": item.context,
        "contextImages": [f"/media/{digest}" for digest in item.context_media],
        "instruction": item.instruction,
        "state": item.state,
        "goal": item.goal,
        "votes": item.votes,
        "live": item.live,
        "min": item.responses.min,
        "desired": item.responses.desired,
        "max": item.responses.max,
        "late": sum(vote.late for vote in votes),
        "undone": sum(vote.undone for vote in votes),
        "outcomes": dict(Counter(vote.outcome for vote in votes if not vote.late and not vote.undone)),
        "matrix": [[float(wins.wins[i, j]) for j in order] for i in order],
        "completions": [
            {
                "place": i + 1,
                "image": candidates[i].media is not None,
                "shown": candidates[i].shown,
                "score": float(ranking.scores[i]),
                "low": float(ranking.interval95[i, 0]),
                "high": float(ranking.interval95[i, 1]),
                "pBest": float(ranking.p_best[i]),
                "votes": float(ranking.votes[i]),
                "flags": flags(ranking, i),
            }
            for i in order
        ],
    }


routes = [
    Route("/owner/board", board, methods=["GET"]),
    Route("/owner/groups/{item_id}", group, methods=["GET"]),
]
