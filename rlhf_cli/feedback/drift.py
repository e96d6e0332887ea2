"""Where the reward model goes wrong: clusters of prompts in which people begin to disagree with it.

A group's disagreement is the share of its votes against the model's side, less what the model itself expects to be
against it: 0 on average for a calibrated model, however unsure it is and whichever groups people are shown. In every
cluster the groups that people decided most lately are compared with those before, at the place where the two differ
most. Where that is beyond `z` standard errors, a targeted round begins: people see the next `round_groups` groups of
the cluster, and when they have decided, the reward model is to be refitted without what it was told there before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.journal.events import DriftFound, GroupChosen, GroupRanked, RoundEnded
from rlhf_cli.journal.replay import RunState
from rlhf_cli.recipe.online import Drift
from rlhf_cli.types import Group, Prompt, WinMatrix

Array = NDArray[np.float64]

NEW, BEFORE = 4, 6
"""Fewest groups of a cluster on either side of a comparison."""
LEAST_VARIANCE = 0.05**2
"""Of a group's disagreement: a few groups that happen to agree exactly are no proof of anything."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A group that people decided."""

    group_id: str
    cluster: int
    version: str | None
    """Of the model that it was compared with."""
    excess: float
    counts: bool
    """False from the beginning of a drift to the end of its round: neither what was usual, nor after the refit."""


def excess_disagreement(scores_G: Array, wins_GG: Array) -> float:
    """Share of votes against the side that the model is on, less the share it expects against itself.

    Args:
        scores_G: Its scores; differences are log-odds. Where two are equal, a vote is half against it.
        wins_GG: `wins_GG[i, j]` votes preferred i over j; there is at least one.

    Returns:
        From -0.5 (all agree with a model that thought every pair open) to 1 (all disagree with one that was sure).
    """
    margins_GG = scores_G[:, None] - scores_G[None, :]
    expected_GG = 0.5 - 0.5 * np.tanh(0.5 * np.abs(margins_GG))
    against_GG = (margins_GG < 0) + 0.5 * (margins_GG == 0)
    return float((wins_GG * (against_GG - expected_GG)).sum() / wins_GG.sum())


@dataclass(slots=True)
class Round:
    """A targeted round while it lasts."""

    left: int
    """Groups still to be chosen for it."""
    waiting: set[str] = field(default_factory=set)
    """Chosen, and not decided yet."""


@dataclass(frozen=True, slots=True)
class Rise:
    """How far disagreement rose in a cluster, at the place where it rose most."""

    z: float
    before: float
    now: float
    last: int
    """Place of the last group before it, among all that people decided."""


class DriftWatch:
    """Follows, cluster by cluster, how far model and people agree, and says where people should look.

    Args:
        drift: Sizes and threshold.
        cluster: Sorts prompts.
        say: Takes a sentence that whoever watches should read.
    """

    def __init__(
        self, drift: Drift, cluster: Callable[[Prompt], int], say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.drift, self.cluster, self._say = drift, cluster, say
        self.outdated: set[str] = set()
        """Groups whose votes a refit should leave out: people in their cluster now say something else."""
        self.refit_due = False
        """A round ended; whoever refits the model sets it back."""
        self._seen: list[Seen] = []
        self._chosen: dict[str, GroupChosen] = {}
        self._rounds: dict[int, Round] = {}
        self._rounds_total = 0
        self._old_versions: dict[int, set[str | None]] = {}
        self._kl_nats: dict[int, deque[float]] = {}

    def wanted(self, group: Group) -> bool:
        """Whether a targeted round is on in the group's cluster."""
        targeted = self._rounds.get(self.cluster(group.prompt))
        return targeted is not None and targeted.left > 0

    def chosen(self, group: Group, chosen: GroupChosen) -> None:
        """Take note of a group that was sampled, and of what the model said about it."""
        assert chosen.cluster is not None
        recent = self._kl_nats.setdefault(chosen.cluster, deque(maxlen=self.drift.window))
        recent.append(sum(c.kl_nats for c in group.completions) / len(group.completions))
        if not chosen.people:
            return
        self._chosen[group.id] = chosen
        if chosen.why == "round":
            targeted = self._rounds[chosen.cluster]
            targeted.left -= 1
            targeted.waiting.add(group.id)

    def decided(self, group_id: str, wins: WinMatrix | None) -> list[DriftFound | RoundEnded]:
        """Take note of what people said about a group, None where they said nothing; returns what follows from it.

        The caller journals that before it goes on.
        """
        chosen = self._chosen.pop(group_id, None)
        if chosen is None or chosen.cluster is None:
            return []
        self._note(chosen, wins)
        return self._follows(chosen.cluster)

    def z(self, cluster: int) -> float:
        """Standard errors by which disagreement rose in a cluster, where it rose most; 0 while too little is known."""
        rise = self._rise(cluster)
        return rise.z if rise is not None else 0.0

    def resume(self, state: RunState) -> list[DriftFound | RoundEnded]:
        """Go on from what the journal says; returns what follows from it and is not in there, to be journalled now."""
        chosen = {g.sampled.group_id: g.chosen for g in state.groups.values() if g.chosen is not None}
        for group_id, choice in chosen.items():
            self.chosen(state.groups[group_id].sampled.group(), choice.model_copy(update={"why": "random"}))
        ranked = [(g.ranked_seq, g.ranked) for g in state.groups.values() if g.ranked_seq >= 0]
        latest: int | None = None
        for _, event in sorted([*ranked, *state.drift], key=lambda pair: pair[0]):
            latest = None
            match event:
                case DriftFound():
                    self._begin(event)
                case RoundEnded():
                    self._end(event.cluster)
                case GroupRanked() if known := self._chosen.pop(event.group_id, None):
                    self._note(known, event.matrix())
                    latest = known.cluster
        for group_id in [g for g in self._chosen if not state.groups[g].open]:
            del self._chosen[group_id]
        for cluster, targeted in self._rounds.items():
            mine = {g for g, choice in chosen.items() if choice.why == "round" and choice.cluster == cluster}
            promised = sum(e.groups for _, e in state.drift if isinstance(e, DriftFound) and e.cluster == cluster)
            targeted.left = promised - len(mine)
            targeted.waiting = mine & self._chosen.keys()
        self.refit_due = state.refit_due
        missed = [event for cluster in sorted(self._rounds) for event in self._follows(cluster)]
        return missed if latest is None or latest in self._rounds else [*missed, *self._follows(latest)]

    def status(self) -> dict[str, float]:
        """Rounds, the largest rise, and for every cluster its KL and disagreement over the window."""
        rises = {cluster: self.z(cluster) for cluster in self._kl_nats}
        if not rises:
            return {}
        worst = max(rises, key=lambda cluster: rises[cluster])
        latest = self._seen[-self.drift.window :]
        row = {
            "drift/rounds_total": float(self._rounds_total),
            "drift/round_groups": float(sum(r.left + len(r.waiting) for r in self._rounds.values())),
            "drift/z_max": rises[worst],
            "drift/cluster_worst": float(worst),
        }
        for cluster, nats in sorted(self._kl_nats.items()):
            row[f"drift/c{cluster}_kl_nats"] = sum(nats) / len(nats)
            if mine := [s.excess for s in latest if s.cluster == cluster]:
                row[f"drift/c{cluster}_disagreement"] = sum(mine) / len(mine)
        return row

    def _note(self, chosen: GroupChosen, wins: WinMatrix | None) -> None:
        cluster = chosen.cluster
        assert cluster is not None
        targeted = self._rounds.get(cluster)
        if targeted is not None:
            targeted.waiting.discard(chosen.group_id)
        if wins is None or not wins.votes or chosen.scores is None:
            return
        excess = excess_disagreement(np.array(chosen.scores), wins.wins)
        counts = targeted is None and chosen.version not in self._old_versions.get(cluster, ())
        self._seen.append(Seen(chosen.group_id, cluster, chosen.version, excess, counts))

    def _follows(self, cluster: int) -> list[DriftFound | RoundEnded]:
        if (targeted := self._rounds.get(cluster)) is not None:
            if targeted.left > 0 or targeted.waiting:
                return []
            self._end(cluster)
            return [RoundEnded(cluster=cluster)]
        rise = self._rise(cluster)
        if rise is None or rise.z < self.drift.z:
            return []
        found = DriftFound(
            cluster=cluster,
            z=rise.z,
            before=rise.before,
            now=rise.now,
            groups=self.drift.round_groups,
            outdated=tuple(seen.group_id for seen in self._seen[: rise.last + 1] if seen.cluster == cluster),
        )
        self._begin(found)
        self._say(
            f"Model and people disagree more than before in cluster {cluster} of prompts, about "
            f"{rise.now - rise.before:.0%} more of the votes ({rise.z:.1f} standard errors); people see the next "
            f"{found.groups} groups of it, then the model is refitted."
        )
        return [found]

    def _begin(self, found: DriftFound) -> None:
        self.outdated.update(found.outdated)
        self._rounds[found.cluster] = Round(found.groups)
        self._rounds_total += 1
        self._seen = [
            replace(seen, counts=False)
            if seen.cluster == found.cluster and seen.group_id not in self.outdated
            else seen
            for seen in self._seen
        ]

    def _end(self, cluster: int) -> None:
        del self._rounds[cluster]
        self.refit_due = True
        # Until there is a new version, what people say about the old one's scores is no news.
        self._old_versions[cluster] = {seen.version for seen in self._seen if seen.cluster == cluster}

    def _rise(self, cluster: int) -> Rise | None:
        """Compare the latest groups of a cluster with those before, at every place within the window.

        The variance of a group is taken from all clusters, each around its own mean, so that few groups suffice.
        """
        places = [n for n, seen in enumerate(self._seen) if seen.cluster == cluster and seen.counts]
        x_N = np.array([self._seen[n].excess for n in places])
        start = len(self._seen) - self.drift.window
        splits = [k for k in range(BEFORE, len(places) - NEW + 1) if places[k] >= start]
        if not splits:
            return None
        others: dict[int, list[float]] = {}
        for seen in self._seen:
            if seen.counts and seen.cluster != cluster:
                others.setdefault(seen.cluster, []).append(seen.excess)
        spread = sum(float(np.var(mine)) * len(mine) for mine in others.values())
        known = sum(len(mine) - 1 for mine in others.values()) + len(places) - 2
        best: Rise | None = None
        for k in splits:
            before_K, now_K = x_N[:k], x_N[k:]
            within = spread + float(np.var(before_K)) * k + float(np.var(now_K)) * len(now_K)
            variance = max(within / known, LEAST_VARIANCE)
            rise = float(now_K.mean() - before_K.mean())
            z = rise / float(np.sqrt(variance * (1 / k + 1 / len(now_K))))
            if best is None or z > best.z:
                best = Rise(z, float(before_K.mean()), float(now_K.mean()), places[k - 1])
        return best
