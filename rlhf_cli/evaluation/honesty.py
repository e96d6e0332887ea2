"""How far a reward model can be trusted, on votes that it never saw: `train_rm/report.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.evaluation.calibration import (
    Floats,
    Ints,
    Pairs,
    Reliability,
    clustered,
    fit_temperature,
    is_fitting_half,
    reliability,
)
from rlhf_cli.evaluation.ceiling import corrected, split_half
from rlhf_cli.evaluation.verdict import VERSION, verdict, warnings
from rlhf_cli.ranking.intervals import Estimate
from rlhf_cli.recipe.votes import VotedGroup


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out groups and what the reward model says about their completions."""

    groups: Sequence[VotedGroup]
    scores: Sequence[NDArray[np.floating[Any]]]
    """Of each group: rewards, shape (G,), or log-odds that i beats j at temperature 1, shape (G, G), antisymmetric."""
    tokens: Sequence[Sequence[int]] | None = None
    """Lengths of the completions in tokens, where they are known."""
    truncated: int | None = None
    """Completions that did not fit into `max_length` with their prompt, or with another completion."""
    consistency: float | None = None
    """Of a pairwise model: share of pairs on which its two orders agree."""


class _Compared(NamedTuple):
    """All pairs that have a vote, as arrays over P; margins are first minus second."""

    pairs: Pairs
    groups: Ints
    characters: Floats
    tokens: Floats | None
    agreed: Floats
    decided: Floats

    @property
    def outcomes(self) -> Floats:
        """1 where most votes are for the first, -1 for the second, 0 where there is no majority."""
        return np.sign(self.pairs.won - self.pairs.lost)


def honesty_report(judged: Judged) -> dict[str, Any]:
    """Every figure of the report, fit for JSON; what cannot be known is None.

    `temperature.value` is what margins are to be divided by: it is fitted on one half of the prompts, and `calibration`
    is measured on the other half.

    Raises:
        ValueError: No groups, or a score that is not finite.
    """
    compared = _compare(judged)
    pairs, outcome_P = compared.pairs, compared.outcomes
    right_P = _right(pairs.margins, outcome_P)
    longer_P = _right(compared.characters, outcome_P)
    clear_P = outcome_P != 0

    def share(part_P: Floats, chosen_P: Any = True) -> dict[str, Any] | None:
        here = clear_P & chosen_P
        return _share(part_P[here], np.ones(here.sum()), pairs.clusters[here])

    fitting_G = np.array([is_fitting_half(group.key) for group in judged.groups])
    fitting_P = fitting_G[compared.groups]
    temperature = fit_temperature(pairs.at(fitting_P))
    reported = pairs.at(~fitting_P)
    halves = [reliability(reported, t) for t in (1.0, temperature.value)] if len(reported.won) else None
    report: dict[str, Any] = {
        "version": VERSION,
        "sizes": _sizes(judged, compared),
        "accuracy": share(right_P),
        "vote_accuracy": _vote_accuracy(pairs),
        "longer_wins": {
            "characters": share(longer_P),
            "tokens": None if compared.tokens is None else share(_right(compared.tokens, outcome_P)),
            "advantage": _advantage(right_P[clear_P], longer_P[clear_P], pairs.clusters[clear_P]),
        },
        "ceiling": _ceiling(compared, right_P),
        "temperature": {
            **temperature._asdict(),
            "pairs": int(fitting_P.sum()),
            "votes": float((pairs.won + pairs.lost)[fitting_P].sum()),
        },
        "calibration": None
        if halves is None
        else {k: _bins(h) for k, h in zip(("before", "after"), halves, strict=True)},
        "length": _length(judged),
        "by_source": _by(compared, right_P, _sources(judged, compared)),
        "by_margin": _by(compared, right_P, _margins(pairs)),
        "by_length": _by(compared, right_P, _lengths(compared)),
        "consistency": judged.consistency,
    }
    return {**report, "words": verdict(report), "warnings": warnings(report)}


def _compare(judged: Judged) -> _Compared:
    if not judged.groups:
        raise ValueError("no held-out groups, so there is nothing to report")
    clusters: dict[str, int] = {}
    columns: list[list[Floats]] = [[] for _ in range(8)]
    for g, (group, scores) in enumerate(zip(judged.groups, judged.scores, strict=True)):
        wins = group.wins.wins
        i_P, j_P = np.nonzero(np.triu(wins + wins.T))
        margins_GG = _margins_of(np.asarray(scores, dtype=np.float64), len(group.completions))
        lengths = np.array([len(text) for text in group.completions], dtype=float)
        tokens = np.array(judged.tokens[g], dtype=float) if judged.tokens is not None else lengths
        halves = split_half(group)
        nothing = np.zeros_like(margins_GG)
        agreed_GG, decided_GG = halves if halves is not None else (nothing, nothing)
        cluster = clusters.setdefault(group.key, len(clusters))
        for column, values in zip(
            columns,
            (
                margins_GG[i_P, j_P],
                wins[i_P, j_P],
                wins[j_P, i_P],
                np.full(len(i_P), cluster),
                np.full(len(i_P), g),
                lengths[i_P] - lengths[j_P],
                tokens[i_P] - tokens[j_P],
                np.stack([agreed_GG[i_P, j_P], decided_GG[i_P, j_P]]),
            ),
            strict=True,
        ):
            column.append(values)
    margins, won, lost, cluster_P, group_P, characters, tokens_P, halves_2P = (
        np.concatenate(column, axis=-1) for column in columns
    )
    if not np.isfinite(margins).all():
        raise ValueError("a score is not finite, so the reward model cannot be judged")
    return _Compared(
        Pairs(margins, won, lost, cluster_P.astype(np.int64)),
        group_P.astype(np.int64),
        characters,
        tokens_P if judged.tokens is not None else None,
        halves_2P[0],
        halves_2P[1],
    )


def _margins_of(scores: Floats, size: int) -> Floats:
    if scores.shape == (size,):
        return scores[:, None] - scores[None, :]
    if scores.shape != (size, size):
        raise ValueError(f"scores of {size} completions have shape ({size},) or ({size}, {size}), not {scores.shape}")
    return scores


def _right(margin_P: Floats, outcome_P: Floats) -> Floats:
    """1 where a margin has the sign of the outcome, 0 where it has the other, 1/2 where it is 0."""
    return (1 + np.sign(margin_P) * outcome_P) / 2


def _share(part_P: Floats, total_P: Floats, clusters_P: Ints) -> dict[str, Any] | None:
    if not total_P.sum():
        return None
    return {**_interval(clustered(part_P, total_P, clusters_P)), "pairs": int((total_P > 0).sum())}


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.mean, "low": estimate.low, "high": estimate.high}


def _sizes(judged: Judged, compared: _Compared) -> dict[str, Any]:
    pairs = compared.pairs
    return {
        "groups": len(judged.groups),
        "prompts": len(np.unique(pairs.clusters)),
        "completions": sum(len(group.completions) for group in judged.groups),
        "pairs": len(pairs.won),
        "pairs_without_majority": int((compared.outcomes == 0).sum()),
        "pairs_scored_equal": int((pairs.margins == 0).sum()),
        "votes": float((pairs.won + pairs.lost).sum()),
        "truncated": judged.truncated,
    }


def _vote_accuracy(pairs: Pairs) -> dict[str, Any]:
    """Share of single votes that go the model's way, and that would go the way of somebody who knew the majorities."""
    votes_P = pairs.won + pairs.lost
    ahead_P = (1 + np.sign(pairs.margins)) / 2
    found = _interval(clustered(ahead_P * pairs.won + (1 - ahead_P) * pairs.lost, votes_P, pairs.clusters))
    return {**found, "best_possible": float(np.maximum(pairs.won, pairs.lost).sum() / votes_P.sum())}


def _advantage(right_P: Floats, longer_P: Floats, clusters_P: Ints) -> dict[str, Any] | None:
    """Accuracy minus that of the better of `longer wins` and `shorter wins`, pair by pair."""
    if not len(right_P):
        return None
    rule_P = longer_P if longer_P.mean() >= 0.5 else 1 - longer_P
    # A difference in [-1, 1] as a share in [0, 1], and back.
    found = clustered((right_P - rule_P + 1) / 2, np.ones_like(right_P), clusters_P)
    return {"value": 2 * found.mean - 1, "low": 2 * found.low - 1, "high": 2 * found.high - 1}


def _ceiling(compared: _Compared, right_P: Floats) -> dict[str, Any] | None:
    """Half of the raters against the other half, beside the model on the same pairs."""
    twice_P = compared.decided > 0
    clusters_P = compared.pairs.clusters
    found = _share(compared.agreed[twice_P], compared.decided[twice_P], clusters_P[twice_P])
    if found is None:
        return None
    clear_P = twice_P & (compared.outcomes != 0)
    return {
        **found,
        "corrected": corrected(found["value"]),
        "accuracy_on_the_same": _share(right_P[clear_P], np.ones(clear_P.sum()), clusters_P[clear_P]),
    }


def _bins(measured: Reliability) -> dict[str, Any]:
    return {
        "ece": measured.ece,
        "ece_by_chance": measured.ece_by_chance,
        "excess": _interval(measured.excess),
        "nll_nats": measured.nll_nats,
        "pairs": sum(b.pairs for b in measured.bins),
        "votes": sum(b.votes for b in measured.bins),
        "bins": [{**b._asdict(), "was": _interval(b.was)} for b in measured.bins],
    }


def _length(judged: Judged) -> dict[str, float | None]:
    """Correlation with length in characters within groups: of the reward, and of the share of votes won."""
    lengths: list[Floats] = []
    rewards: list[Floats] = []
    shares: list[Floats] = []
    for group, scores in zip(judged.groups, judged.scores, strict=True):
        wins = group.wins.wins
        seen = (wins + wins.T).sum(1) > 0
        length = np.array([len(text) for text in group.completions], dtype=float)
        reward = _margins_of(np.asarray(scores, dtype=np.float64), len(length)).mean(1)
        share = wins.sum(1)[seen] / (wins + wins.T).sum(1)[seen]
        for column, values in ((lengths, length[seen]), (rewards, reward[seen]), (shares, share)):
            column.append(values - values.mean())
    return {
        "correlation": _correlation(np.concatenate(lengths), np.concatenate(rewards)),
        "correlation_of_votes": _correlation(np.concatenate(lengths), np.concatenate(shares)),
    }


def _correlation(a: Floats, b: Floats) -> float | None:
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size else None


def _by(compared: _Compared, right_P: Floats, names: Callable[[int], str]) -> list[dict[str, Any]]:
    """Accuracy of each kind of pairs that have a majority, the largest kind first."""
    kinds: dict[str, list[int]] = {}
    for p in np.flatnonzero(compared.outcomes):
        kinds.setdefault(names(int(p)), []).append(int(p))
    rows = []
    for name, members in kinds.items():
        chosen = np.array(members)
        found = _share(right_P[chosen], np.ones(len(chosen)), compared.pairs.clusters[chosen])
        rows.append({"name": name, **(found or {})})
    return sorted(rows, key=lambda row: (-row["pairs"], row["name"]))


def _sources(judged: Judged, compared: _Compared) -> Callable[[int], str]:
    return lambda p: judged.groups[compared.groups[p]].source


def _margins(pairs: Pairs) -> Callable[[int], str]:
    def name(p: int) -> str:
        votes = pairs.won[p] + pairs.lost[p]
        most = max(pairs.won[p], pairs.lost[p]) / votes
        if votes <= 1:
            return "a single vote"
        return "all votes one way" if most == 1 else "two thirds or more" if most >= 2 / 3 else "less than two thirds"

    return name


def _lengths(compared: _Compared) -> Callable[[int], str]:
    def name(p: int) -> str:
        side = compared.characters[p] * compared.outcomes[p]
        return "longer preferred" if side > 0 else "shorter preferred" if side < 0 else "equally long"

    return name
