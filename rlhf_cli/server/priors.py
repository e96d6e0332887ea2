"""How far apart a flow's completions are, learned from its earlier items: the width that makes intervals honest."""

from __future__ import annotations

import sqlite3

import numpy as np

from rlhf_cli.ranking.bradley_terry import TAU
from rlhf_cli.ranking.prior import fit_tau
from rlhf_cli.server import items
from rlhf_cli.server.records import ItemRecord

REFIT_ITEMS = 16
FITTED_ITEMS = 64


class Priors:
    """Fitted widths, remembered: each belongs to a fixed set of ended items, so a result never changes afterwards."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], float] = {}

    def sd(self, db: sqlite3.Connection, item: ItemRecord) -> float:
        """Prior standard deviation in logits for ranking `item`; the default while too few items ended before it."""
        before = float("inf") if item.ended_at is None else item.ended_at
        ended = "FROM items WHERE flow_id = ? AND ended_at < ? AND votes > 0"
        (count,) = db.execute(f"SELECT COUNT(*) {ended}", (item.flow_id, before)).fetchone()
        used = count // REFIT_ITEMS * REFIT_ITEMS
        if used == 0:
            return TAU
        if (item.flow_id, used) not in self._known:
            rows = db.execute(
                f"SELECT id, size {ended} ORDER BY ended_at, rowid LIMIT ? OFFSET ?",
                (item.flow_id, before, FITTED_ITEMS, max(0, used - FITTED_ITEMS)),
            ).fetchall()[: min(used, FITTED_ITEMS)]
            size = max(row["size"] for row in rows)
            wins_BGG = np.zeros((len(rows), size, size))
            for wins_GG, row in zip(wins_BGG, rows, strict=True):
                wins_GG[: row["size"], : row["size"]] = items.wins(db, row["id"], row["size"]).wins
            self._known[item.flow_id, used] = fit_tau(wins_BGG)
        return self._known[item.flow_id, used]
