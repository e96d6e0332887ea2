"""A reward model that keeps up with the policy: its heads are refitted to people's votes while the run goes on.

People's groups, in the order of the journal, are the replay store. Every `every_groups` of them the heads are refitted
to all of the store but a held-out part of the fresh groups, which neither version has learned from. The refit becomes
the next version only if it agrees with those votes no less than the version in use. Then the held-out groups join the
others: the next refit is judged by fresher ones.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf_cli.errors import RunDamaged
from rlhf_cli.feedback.scores import Scored, by_rewards
from rlhf_cli.journal.events import Event, GroupRanked, RewardModelRefreshed, VotesLate
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import RunState
from rlhf_cli.journal.run_dir import RunDir, write_atomic
from rlhf_cli.policy.heads import HEADS, Array, Heads, VotedFeatures, save_heads
from rlhf_cli.policy.scoring import RewardModel, weights_version, write_about
from rlhf_cli.recipe.online import Refresh
from rlhf_cli.types import Group, WinMatrix

Refit = Callable[[Heads, Sequence[VotedFeatures], float], Heads]
"""From the first heads, people's groups and the temperature of the first heads to better heads."""

AT_ONCE = 8
"""Groups whose texts go through the backbone together."""


class LiveModel:
    """A reward model in use, whose heads may be replaced; its backbone and temperature stay."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.first = self.heads = Heads.of(model.model)
        self.version = 1
        """Counts up with every refit that is published; 1 is what `train-rm` left."""

    def score(self, group: Group) -> Scored:
        (features_GH,) = self.features([group])
        return by_rewards(f"v{self.version}", self.heads.rewards(features_GH), self.model.about.temperature)

    def features(self, groups: Sequence[Group]) -> list[Array]:
        """What the heads read of the completions of each group, shape (G, H)."""
        return self.model.features([(g.prompt.messages, [c.text for c in g.completions]) for g in groups])

    def save(self, folder: Path) -> None:
        """Write the version in use as a whole model; this one cannot score any more."""
        self.heads.put_into(self.model.model)
        if len(self.heads.weight) > 1:
            save_heads(self.model.model, folder)
        self.model.model.save_pretrained(folder)
        self.model.tokenizer.save_pretrained(folder)
        write_about(folder, replace(self.model.about, version=weights_version(folder)))


class Refresher:
    """Refits the heads of a `LiveModel` and decides what becomes of the result.

    `note` may be called from any thread, all else from the one that the model is used in.

    Args:
        refit: Fits heads to votes; the same for the same input.
        section: How often, and how much is held out.
        seed: Of the run; says which groups are held out.
        run: Versions are kept in its folder.
        journal: Puts an event on disk before it returns.
        say: Takes a sentence that whoever watches should read.
    """

    def __init__(
        self,
        model: LiveModel,
        refit: Refit,
        section: Refresh,
        seed: int,
        run: RunDir,
        journal: Callable[[Event], object],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._model, self._refit, self._section, self._seed = model, refit, section, seed
        self._run, self._journal, self._say = run, journal, say
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._groups: dict[str, Group] = {}
        self._ranked: set[str] = set()
        self._wins: dict[str, Array] = {}
        """Votes on each group that has some, late ones too, in the order in which groups got their first."""
        self._features: dict[str, Array] = {}
        self._latest: RewardModelRefreshed | None = None

    def asked(self, group: Group) -> None:
        """Remember a group that people are asked about."""
        self._groups[group.id] = group

    def note(self, event: Event) -> None:
        """Take note of what was journalled; votes on groups are used at the next look."""
        if isinstance(event, GroupRanked | VotesLate):
            self._events.put(event)

    def resume(self, state: RunState, entries: Iterable[Entry]) -> None:
        """Go on from the votes and versions of earlier processes.

        Raises:
            RunDamaged: A published version is missing, or not what was published.
        """
        for group in state.groups.values():
            if group.asks:
                self.asked(group.sampled.group())
        for entry in entries:
            self.note(entry.event)
        self._take_note()
        for event in state.refreshed:
            self._latest = event
            if event.published:
                self._model.heads, self._model.version = self._load(event), event.version

    def refresh(self, outdated: Set[str] = frozenset(), *, due: bool = False) -> bool:
        """Refit if enough fresh groups have votes; returns whether it did.

        Takes about as long as scoring the fresh groups and a fit of linear heads, and the caller waits for it.

        Args:
            outdated: Groups to leave out, whose votes no longer hold.
            due: Do not wait for `every_groups`; two fresh ones will do.
        """
        self._take_note()
        known = self._latest.groups if self._latest is not None else 0
        fresh = [group_id for group_id in list(self._wins)[known:] if group_id not in outdated]
        if len(fresh) < (2 if due else self._section.every_groups):
            return False
        heldout = self._held_out(fresh)
        voted = self._voted([g for g in self._wins if g not in outdated])
        apart = [voted.pop(group_id) for group_id in heldout]
        model = self._model
        heads = self._refit(model.first, list(voted.values()), model.model.about.temperature)
        before, after = agreement(model.heads, apart), agreement(heads, apart)
        published = bool(np.isfinite(heads.weight).all()) and after >= before
        event = RewardModelRefreshed(
            version=model.version + published,
            published=published,
            groups=len(self._wins),
            heldout=tuple(heldout),
            accuracy_before=before,
            accuracy_after=after,
            **self._keep(heads, model.version + 1) if published else {},
        )
        self._journal(event)
        self._latest = event
        if published:
            model.heads, model.version = heads, event.version
        what = f"is version {event.version} now" if published else f"stays version {event.version}"
        self._say(
            f"The reward model {what}: refitted on {len(voted)} groups, it agrees with {after:.0%} of the votes on "
            f"{len(heldout)} others, before with {before:.0%}."
        )
        return True

    def status(self) -> dict[str, float]:
        row = {"rm/version": float(self._model.version), "rm/replay_groups": float(len(self._wins))}
        if (latest := self._latest) is not None:
            row["rm/heldout_accuracy"] = latest.accuracy_after if latest.published else latest.accuracy_before
        return row

    def _take_note(self) -> None:
        while not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, GroupRanked) and event.by_people and event.group_id not in self._ranked:
                self._ranked.add(event.group_id)
                self._add(event.group_id, event.matrix())
            elif isinstance(event, VotesLate):
                self._add(event.group_id, event.matrix())

    def _add(self, group_id: str, wins: WinMatrix) -> None:
        if group_id in self._groups and wins.votes:  # groups of an attempt that was given up are not ours
            self._wins[group_id] = self._wins.get(group_id, 0) + wins.wins

    def _held_out(self, fresh: Sequence[str]) -> list[str]:
        """A share of the fresh groups, at least one and not all, by a hash that knows nothing of their votes."""
        count = min(len(fresh) - 1, max(1, round(self._section.heldout_share * len(fresh))))

        def luck(group_id: str) -> bytes:
            return hashlib.sha256(f"{self._seed}/heldout/{self._groups[group_id].index}".encode()).digest()

        return sorted(fresh, key=luck)[:count]

    def _voted(self, group_ids: Sequence[str]) -> dict[str, VotedFeatures]:
        missing = [group_id for group_id in group_ids if group_id not in self._features]
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            features = self._model.features([self._groups[group_id] for group_id in some])
            self._features.update(zip(some, features, strict=True))
        return {
            group_id: VotedFeatures(
                self._groups[group_id].index, self._features[group_id], WinMatrix(self._wins[group_id])
            )
            for group_id in group_ids
        }

    def _path(self, version: int) -> Path:
        return self._run.reward_model_versions / f"v{version}" / HEADS

    def _keep(self, heads: Heads, version: int) -> dict[str, str]:
        data, path = heads.to_bytes(), self._path(version)
        write_atomic(path, data)
        return {"path": str(path.relative_to(self._run.path)), "sha256": hashlib.sha256(data).hexdigest()}

    def _load(self, event: RewardModelRefreshed) -> Heads:
        path = self._path(event.version)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunDamaged(
                f"version {event.version} of the reward model cannot be read: {error}; restore {path}, or start over "
                "with --fresh"
            ) from error
        if hashlib.sha256(data).hexdigest() != event.sha256:
            raise RunDamaged(
                f"{path} is not what was published as version {event.version} of the reward model; restore it, or "
                "start over with --fresh"
            )
        return Heads.from_bytes(data)


def agreement(heads: Heads, voted: Iterable[VotedFeatures]) -> float:
    """Share of the votes whose winner has the higher reward, by the mean of the heads; equal rewards count half."""
    agreed, votes = 0.0, 0.0
    for v in voted:
        mine, of = agreed_votes(heads.rewards(v.features).mean(1), v.wins)
        agreed, votes = agreed + mine, votes + of
    return agreed / votes


def agreed_votes(scores_G: Array, wins: WinMatrix) -> tuple[float, float]:
    """How many votes have a winner of higher score, of how many; equal scores count half."""
    margins_GG = scores_G[:, None] - scores_G[None, :]
    return float((wins.wins * ((margins_GG > 0) + 0.5 * (margins_GG == 0))).sum()), wins.votes
