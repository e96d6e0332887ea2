"""A reward model at once, people where it is worth their time, and a model that learns from what they said.

The model scores every group when it is sampled. Groups that the chooser picks go to people and wait for them; all
others get the model's calibrated probabilities, and the version that gave them as their source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_cli.feedback.drift import DriftWatch
from rlhf_cli.feedback.refresh import LiveModel, Refresher, agreed_votes
from rlhf_cli.feedback.reward_model import NOT_FINITE, model_ranked
from rlhf_cli.feedback.scores import Scored
from rlhf_cli.feedback.selection import Asked, Chooser
from rlhf_cli.journal.events import Event, GroupChosen, GroupSetAside
from rlhf_cli.journal.journal import Entry
from rlhf_cli.journal.replay import RunState
from rlhf_cli.types import Group, RankedGroup, Unranked, WinMatrix

COMPARED = 64
"""Latest groups of people that the agreement of model and people is measured on."""


class HybridFeedback:
    """`Feedback` by a model and by people.

    Args:
        people: Ask them.
        chooser: Says which groups they see.
        model: Scores every group.
        journal: Puts an event on disk before it returns.
        affords: Whether the budget allows so many groups with people, beside the votes they gave; where it does not,
            the model answers.
        refresher: Refits the model on what people said; it is told of votes by whoever journals them.
        watch: Follows where model and people disagree.
        length_penalty: Taken from a completion's log-odds for every character where the model answers; people's votes,
            and what the model is compared with them by, know nothing of it.
    """

    def __init__(
        self,
        people: Asked,
        chooser: Chooser,
        model: LiveModel,
        journal: Callable[[Event], object],
        *,
        affords: Callable[[int], bool] = lambda groups: True,
        refresher: Refresher | None = None,
        watch: DriftWatch | None = None,
        length_penalty: float = 0.0,
    ) -> None:
        self._people, self._chooser, self._model, self._journal = people, chooser, model, journal
        self._affords = affords
        self._refresher, self._watch, self._length_penalty = refresher, watch, length_penalty
        self._decided: list[RankedGroup | Unranked] = []
        self._said: dict[str, GroupChosen] = {}
        """What the model said of groups that people look at, and why they do."""
        self._compared: deque[tuple[float, float]] = deque(maxlen=COMPARED)
        self._blind: deque[tuple[float, float]] = deque(maxlen=COMPARED)
        """The same of groups that were drawn at random."""

    @property
    def with_people(self) -> int:
        """Groups that people were asked about and whose outcome was not collected yet."""
        return len(self._said)

    def submit(self, group: Group) -> None:
        scored = self._model.score(group)
        if not scored.finite:
            self._journal(GroupSetAside(group_id=group.id, reason=NOT_FINITE))
            self._decided.append(Unranked(group, NOT_FINITE))
            return
        chosen = self._chooser.choose(group, scored, affordable=self._affords(self.with_people + 1))
        self._journal(chosen)
        if chosen.people:
            self._ask(group, chosen)
            self._people.submit(group)
        else:
            self._rank(group, scored)

    def resume(self, state: RunState, entries: Sequence[Entry]) -> None:
        """Go on from what the journal says: choices stay, versions stay, the others are made now."""
        states = list(state.groups.values())
        if self._refresher is not None:
            self._refresher.resume(state, entries)
        for known in sorted((s for s in states if s.ranked_seq >= 0), key=lambda s: s.ranked_seq):
            assert known.ranked is not None
            if known.chosen is not None and known.ranked.by_people:
                self._compare(known.chosen, known.ranked.matrix())
        self._chooser.resume(states)
        if self._watch is not None:
            for event in self._watch.resume(state):
                self._journal(event)
        by_people = {s.sampled.group_id for s in states if not s.open or (s.chosen is not None and s.chosen.people)}
        for known in states:
            if known.open and known.chosen is not None and known.chosen.people:
                self._ask(known.sampled.group(), known.chosen)
        self._people.resume(s for s in states if s.sampled.group_id in by_people)
        for known in states:
            group = known.sampled.group()
            if known.open and known.chosen is None:
                self.submit(group)
            elif known.open and known.chosen is not None and not known.chosen.people:
                self._rank(group, self._model.score(group))

    def collect(self) -> list[RankedGroup | Unranked]:
        by_people = self._people.collect()
        for verdict in by_people:
            self._heard(verdict)
        decided, self._decided = [*self._decided, *by_people], []
        if self._refresher is not None:
            outdated = self._watch.outdated if self._watch is not None else frozenset[str]()
            due = self._watch is not None and self._watch.refit_due
            if self._refresher.refresh(outdated, due=due) and self._watch is not None:
                self._watch.refit_due = False
        return decided

    def status(self) -> dict[str, float]:
        row = {**self._people.status(), **self._chooser.status(), "rm/version": float(self._model.version)}
        if self._refresher is not None:
            row |= self._refresher.status()
        if self._watch is not None:
            row |= self._watch.status()
        for name, compared in (("rm/agreement", self._compared), ("rm/agreement_random", self._blind)):
            if votes := sum(of for _, of in compared):
                row[name] = sum(agreed for agreed, _ in compared) / votes
        return row

    def _ask(self, group: Group, chosen: GroupChosen) -> None:
        self._said[group.id] = chosen
        if self._refresher is not None:
            self._refresher.asked(group)

    def _rank(self, group: Group, scored: Scored) -> None:
        ranked = model_ranked(group, scored, self._length_penalty)
        self._journal(ranked)
        self._decided.append(ranked.ranked(group))

    def _heard(self, verdict: RankedGroup | Unranked) -> None:
        """Compare what people said with what the model had said before."""
        said, wins = self._said.pop(verdict.group.id), verdict.wins if isinstance(verdict, RankedGroup) else None
        if wins is not None:
            self._compare(said, wins)
        if self._watch is not None:
            for event in self._watch.decided(verdict.group.id, wins):
                self._journal(event)

    def _compare(self, said: GroupChosen, wins: WinMatrix) -> None:
        assert said.scores is not None
        agreed = agreed_votes(np.array(said.scores), wins)
        self._compared.append(agreed)
        if said.why == "random":
            self._blind.append(agreed)
