"""What the votes on an item say: results and matrix as the protocol has them, and ours with intervals and raw votes."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_cli.flow import wire
from rlhf_cli.ranking.bradley_terry import ELO_PER_LOGIT, Ranking, rank
from rlhf_cli.server.problems import Problem
from rlhf_cli.server.records import Candidate, ItemRecord
from rlhf_cli.server.requests import for_role, whole_number
from rlhf_cli.server.store import Store
from rlhf_cli.server.times import iso
from rlhf_cli.server.tokens import Token

START_ELO = 1200


@for_role("client", "owner")
async def get_results(request: Request, store: Store, _: Token) -> Response:
    item = _readable(store, request)
    start = store.flow_settings(item.flow_id).get("startingElo", START_ELO)
    candidates, ranking = store.candidates(item.id), _rank(store, item)
    names, shift = labels(candidates), start - START_ELO
    rows = [
        wire.ResultRow(
            id=candidate.id,
            asset=_asset(candidate, names[i]),
            elo=round(ranking.elo[i] + shift),
            elo_low=round(START_ELO + ELO_PER_LOGIT * ranking.interval95[i, 0] + shift),
            elo_high=round(START_ELO + ELO_PER_LOGIT * ranking.interval95[i, 1] + shift),
            p_best=round(float(ranking.p_best[i]), 4),
            votes=float(ranking.votes[i]),
            sort_index=candidate.sort_index,
            flags=flags(ranking, i),
        )
        for i, candidate in enumerate(candidates)
    ]
    return JSONResponse(wire.Results(datapoints=rows, total_votes=item.votes).to_json())


@for_role("client", "owner")
async def get_ranking(request: Request, store: Store, _: Token) -> Response:
    """The ranking as it stands, best first, in logits; also while votes come in."""
    item = store.item(request.path_params["item_id"])
    candidates, ranking = store.candidates(item.id), _rank(store, item)
    names = labels(candidates)
    rows = [
        {
            "sortIndex": candidates[i].sort_index,
            "label": names[i],
            "score": float(ranking.scores[i]),
            "interval95": ranking.interval95[i].tolist(),
            "pBest": float(ranking.p_best[i]),
            "votes": float(ranking.votes[i]),
            "component": int(ranking.component[i]),
            "flags": flags(ranking, i),
        }
        for i in ranking.order
    ]
    body = {
        "itemId": item.id,
        "state": item.state,
        "goal": item.goal,
        "votes": item.votes,
        "belowMinVotes": ranking.below_min_votes,
        "disconnected": ranking.disconnected,
        "priorSd": store.prior_sd(item),
        "candidates": rows,
    }
    return JSONResponse(body)


@for_role("client", "owner")
async def get_vote_matrix(request: Request, store: Store, _: Token) -> Response:
    item = _readable(store, request)
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
async def get_segments(request: Request, store: Store, _: Token) -> Response:
    """What raters marked in votes that count, one entry for every mark."""
    item = _readable(store, request)
    candidates = store.candidates(item.id)
    marks = [
        wire.ItemSegment(candidate=s.completion, start=s.start, end=s.end, good=s.good)
        for vote in store.votes(item.id)
        if vote.counts
        for s in vote.segments
    ]
    places = [candidate.sort_index for candidate in candidates]
    return JSONResponse(wire.ItemSegments(index=labels(candidates), sort_index=places, segments=marks).to_json())


@for_role("client", "owner")
async def get_votes(request: Request, store: Store, _: Token) -> Response:
    """Raw votes in the order they arrived, by pseudonym; those that do not count too, and why."""
    item = store.item(request.path_params["item_id"])
    page, size = whole_number(request, "page", 1, 1_000_000), whole_number(request, "page_size", 100, 1000)
    places = [candidate.sort_index for candidate in store.candidates(item.id)]
    simulated = {token.id for token in store.tokens.all() if token.simulated}
    votes = store.votes(item.id)
    rows = [
        {
            "rater": vote.rater_id,
            "simulated": vote.rater_id in simulated,
            "left": places[vote.left],
            "right": places[vote.right],
            "outcome": vote.outcome,
            "responseMs": vote.response_ms,
            "counts": vote.counts,
            "late": vote.late,
            "undone": vote.undone,
            "createdAt": iso(vote.created_at),
            "segments": [{**asdict(s), "completion": places[s.completion]} for s in vote.segments],
        }
        for vote in votes[(page - 1) * size : page * size]
    ]
    return JSONResponse(
        {"total": len(votes), "page": page, "pageSize": size, "totalPages": -(-len(votes) // size), "items": rows}
    )


def labels(candidates: list[Candidate]) -> list[str]:
    """One label per candidate: its text or file name, made unique where it repeats."""
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


def flags(ranking: Ranking, i: int) -> list[str]:
    """What to know before relying on the score of candidate `i`."""
    known = {
        "never_lost": ranking.never_lost[i],
        "never_won": ranking.never_won[i],
        "no_votes": ranking.no_votes[i],
        "disconnected": ranking.disconnected,
        "below_min_votes": ranking.below_min_votes,
    }
    return [name for name, holds in known.items() if holds]


def _rank(store: Store, item: ItemRecord) -> Ranking:
    return rank(store.matrix(item.id), tau=store.prior_sd(item), min_votes=item.responses.min)


def _asset(candidate: Candidate, label: str) -> wire.ResultAsset | wire.ResultFile:
    if candidate.media is None:
        return wire.ResultAsset(text=candidate.text, identifier=label)
    name = wire.OriginalFilename(original_filename=label)
    return wire.ResultFile(file_name=candidate.shown, metadata={"originalFilename": name}, identifier=label)


def _readable(store: Store, request: Request) -> ItemRecord:
    """The item, once it has ended; before that only for who asks with `?partial=true`."""
    item = store.item(request.path_params["item_id"])
    if not item.state.terminal and request.query_params.get("partial") != "true":
        raise Problem(409, f"flow item is {item.state}")
    return item


_ITEM = "/flow/ranking/item/{item_id}"
routes = [
    Route(f"{_ITEM}/results", get_results, methods=["GET"]),
    Route(f"{_ITEM}/vote-matrix", get_vote_matrix, methods=["GET"]),
    Route(f"{_ITEM}/segments", get_segments, methods=["GET"]),
    Route(f"{_ITEM}/ranking", get_ranking, methods=["GET"]),
    Route(f"{_ITEM}/votes", get_votes, methods=["GET"]),
]
