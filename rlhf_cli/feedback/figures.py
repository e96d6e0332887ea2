"""What can be said about the asking as it stands: votes, latencies, losses."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Figures:
    """Written by the asking thread; any thread reads `row`, which is only ever replaced as a whole."""

    votes: float
    """On items that are over, late ones included."""
    late: float = 0.0
    """Votes that came after their group was decided."""
    saved: float = 0.0
    """Votes short of the desired number on items that were stopped because the ranking was decided."""
    ended: int = 0
    """Groups with an outcome that were asked about."""
    incomplete: int = 0
    decided: int = 0
    """Groups with an outcome, asked about or not."""
    set_aside: int = 0
    doubles: int = 0
    """Datasets of which a service made two items."""
    orphans: int = 0
    """Items found at the service that the journal did not know."""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """Clock time and votes, of the last minute."""
    row: dict[str, float] = field(default_factory=dict)
    _latency: dict[str, float] = field(default_factory=dict)

    def waited(self, latency_s: float) -> None:
        self.latencies_s.append(latency_s)
        p50, p95 = np.quantile(self.latencies_s, (0.5, 0.95))
        self._latency = {"flow/latency_p50_s": float(p50), "flow/latency_p95_s": float(p95)}

    def tick(self, now: float, running: float) -> None:
        """Note the votes at clock time `now`, `running` of them on items that are not over yet, and publish."""
        self.recent.append((now, self.votes + running))
        while now - self.recent[0][0] > 60:
            self.recent.popleft()
        self.publish(running)

    def publish(self, running: float) -> None:
        """Make `row` anew; what nothing is known about yet is left out of it."""
        row = {
            "flow/votes_total": self.votes + running,
            "flow/set_aside_total": float(self.set_aside),
            "flow/late_votes_total": self.late,
            "flow/votes_saved_total": self.saved,
            "flow/doubles_total": float(self.doubles),
            "flow/orphans_total": float(self.orphans),
            **self._latency,
        }
        if self.ended:
            row["flow/incomplete_frac"] = self.incomplete / self.ended
        if len(self.recent) > 1 and self.recent[-1][0] > self.recent[0][0]:
            (start, before), (end, after) = self.recent[0], self.recent[-1]
            row["flow/votes_per_min"] = 60 * (after - before) / (end - start)
        self.row = row
