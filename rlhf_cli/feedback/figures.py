"""What can be said about the asking as it stands: votes, latencies, losses."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Figures:
    """Written by the asking thread, read by any."""

    votes: float
    """Delivered, in decided groups."""
    ended: int = 0
    """Items with an outcome."""
    incomplete: int = 0
    decided: int = 0
    """Groups with an outcome, asked about or not."""
    set_aside: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """Clock time and votes, of the last minute."""

    def tick(self, now: float, running: float) -> None:
        self.recent.append((now, self.votes + running))
        while now - self.recent[0][0] > 60:
            self.recent.popleft()

    def rows(self, running: float) -> dict[str, float]:
        """Metrics; what nothing is known about yet is left out."""
        rows = {"flow/votes_total": self.votes + running, "flow/set_aside_total": float(self.set_aside)}
        if self.ended:
            rows["flow/incomplete_frac"] = self.incomplete / self.ended
        if latencies_s := list(self.latencies_s):
            p50, p95 = np.quantile(latencies_s, (0.5, 0.95))
            rows |= {"flow/latency_p50_s": float(p50), "flow/latency_p95_s": float(p95)}
        recent = list(self.recent)
        if len(recent) > 1 and recent[-1][0] > recent[0][0]:
            (start, before), (end, after) = recent[0], recent[-1]
            rows["flow/votes_per_min"] = 60 * (after - before) / (end - start)
        return rows
