"""Which groups people see: those worth their time, and a random share that keeps figures about all groups unbiased.

Every choice is made once, when a group is sampled, from the seed, the group and the choices before it; it is in the
journal before anybody acts on it, so a run that was killed goes on with the same choices.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.feedback.at_once import AnswersAtOnce
from rlhf_cli.feedback.drift import DriftWatch
from rlhf_cli.feedback.reward_model import NOT_FINITE
from rlhf_cli.feedback.scores import Scored
from rlhf_cli.journal.events import Event, GroupChosen
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.recipe.online import Selection
from rlhf_cli.types import Feedback, Group, Prompt, RankedGroup, Unranked

Array = NDArray[np.float64]

COMPARED = 64
"""Latest groups that a group has to stand out from."""
CATCH_UP = 16
"""Groups within which a share that was missed, or overdrawn, is made good."""

NOT_SELECTED = "not selected: people were not asked, see run_online.selection"
"""Why a group is set aside that people do not see."""


def uncertainty(scored: Scored) -> float:
    """How unsure a model is which completion is best, from 0 to 1.

    With an ensemble: how far its heads are apart on the probability of a pair, as twice the standard deviation, mean
    over pairs; where all heads agree that a pair is even, no vote teaches anything. Without one: how close the best two
    are, twice the probability that the second is better than the first.
    """
    if scored.heads is not None and len(scored.heads) > 1:
        first, second = np.triu_indices(scored.heads.shape[1], 1)
        wins_KP = 0.5 + 0.5 * np.tanh(0.5 * (scored.heads[:, first] - scored.heads[:, second]))
        return float(2 * wins_KP.std(0).mean())
    best, second_best = np.argsort(-scored.log_odds.sum(1), kind="stable")[:2]
    return float(min(1.0, 2 * scored.probabilities[second_best, best]))


class Chooser:
    """Decides group by group, in the order they are sampled, whether people see it.

    A share is drawn at random, blind to the group. Of the others those are taken whose value stands out among the
    latest ones, so many that the share holds in the long run whatever the values do. Groups of a targeted round come on
    top.

    Args:
        selection: By what, and how many.
        seed: With the index of a group it fixes what is random about it.
        embed: A unit vector for a prompt; needed by `diverse`.
        watch: Knows which clusters drift; needed by `drifting`.
    """

    def __init__(
        self,
        selection: Selection,
        seed: int,
        *,
        embed: Callable[[Prompt], Array] | None = None,
        watch: DriftWatch | None = None,
    ) -> None:
        self.selection, self.watch = selection, watch
        self._seed, self._embed = seed, embed
        self._values: deque[float] = deque(maxlen=COMPARED)
        self._compared = self._taken = 0
        self._groups = self._people = self._random = 0
        self._shown: dict[str, Array] = {}

    def choose(self, group: Group, scored: Scored | None = None, *, affordable: bool = True) -> GroupChosen:
        """Decide about `group`; the caller journals the decision before it acts on it.

        Args:
            scored: What the reward model says; needed by `uncertainty`, and by a drift watch.
            affordable: Whether the budget allows people one more group.
        """
        draw = random.Random(f"{self._seed}/selection/{group.index}")
        chance, tie = draw.random(), draw.random()
        by = self.selection.by
        why: Literal["random", "uncertainty", "diverse", "drifting", "round", "not selected", "budget"]
        value = self._value(group, scored)
        if chance < self.selection.share * self.selection.random_share:
            why = "random"  # first: what a targeted round took would be missing from figures about all groups
        elif self.watch is not None and self.watch.wanted(group):
            why = "round"
        else:
            why = by if self._stands_out(value, tie) else "not selected"
        if why != "not selected" and not affordable:
            why = "budget"
        chosen = GroupChosen(
            group_id=group.id,
            people=why not in ("not selected", "budget"),
            why=why,
            value=value,
            version=scored.version if scored is not None else None,
            scores=None if scored is None or scored.scores is None else tuple(scored.scores.tolist()),
            cluster=self.watch.cluster(group.prompt) if self.watch is not None else None,
        )
        self._remember(group, chosen)
        if self.watch is not None:
            self.watch.chosen(group, chosen)
        return chosen

    def resume(self, groups: Iterable[GroupState]) -> None:
        """Go on from the choices of an earlier process, given in the order they were sampled.

        The drift watch goes on by itself, with `DriftWatch.resume`.
        """
        for state in groups:
            if state.chosen is not None:
                self._remember(state.sampled.group(), state.chosen)

    def status(self) -> dict[str, float]:
        if not self._groups:
            return {}
        return {
            "selection/people_total": float(self._people),
            "selection/random_total": float(self._random),
            "selection/people_frac": self._people / self._groups,
        }

    def _value(self, group: Group, scored: Scored | None) -> float:
        match self.selection.by:
            case "uncertainty":
                assert scored is not None
                return uncertainty(scored)
            case "diverse":
                return self._distance(group.prompt)
            case "drifting":
                assert self.watch is not None
                return self.watch.z(self.watch.cluster(group.prompt))

    def _distance(self, prompt: Prompt) -> float:
        """To the nearest prompt that people saw, as in greedy k-centre; 2, the longest there is, before the first."""
        assert self._embed is not None
        if not self._shown:
            return 2.0
        cosine = float((np.stack(list(self._shown.values())) @ self._embed(prompt)).max())
        return float(np.sqrt(max(0.0, 2 - 2 * cosine)))

    def _stands_out(self, value: float, tie: float) -> bool:
        """Whether it is in the wanted share of the latest values; `tie` places it among equals."""
        above, equal = sum(v > value for v in self._values), sum(v == value for v in self._values)
        wanted = self._wanted() + (self._wanted() * self._compared - self._taken) / CATCH_UP
        return (above + tie * (equal + 1)) / (len(self._values) + 1) < wanted

    def _wanted(self) -> float:
        """Share of the groups that were not drawn at random, so that both together make the share of the recipe."""
        share, drawn = self.selection.share, self.selection.share * self.selection.random_share
        return (share - drawn) / (1 - drawn) if drawn < 1 else 0.0

    def _remember(self, group: Group, chosen: GroupChosen) -> None:
        self._groups += 1
        self._people += chosen.people
        self._random += chosen.why == "random"
        if chosen.why not in ("round", "random"):
            self._compared += 1
            self._taken += chosen.why != "not selected"
        if chosen.value is not None:
            self._values.append(chosen.value)
        if chosen.people and self._embed is not None:
            self._shown[group.prompt.id] = self._embed(group.prompt)


class Asked(Feedback, Protocol):
    """People who can be asked again about what was open when an earlier process ended."""

    def resume(self, groups: Iterable[GroupState]) -> None: ...


class SelectedVotes(AnswersAtOnce):
    """People's votes on the groups that a chooser picks; the others are set aside before anything is bought.

    Args:
        people: Asks them.
        affords: Whether the budget allows so many groups with people, beside the votes they gave.
        score: What a reward model says of a group; needed where the chooser looks at it.
    """

    def __init__(
        self,
        people: Asked,
        chooser: Chooser,
        journal: Callable[[Event], object],
        *,
        affords: Callable[[int], bool] = lambda groups: True,
        score: Callable[[Group], Scored | None] = lambda group: None,
    ) -> None:
        super().__init__(journal)
        self._people, self._chooser, self._affords, self._score = people, chooser, affords, score
        self._with_people = 0

    def submit(self, group: Group) -> None:
        scored = self._score(group)
        if scored is not None and not scored.finite:
            self._set_aside(group, NOT_FINITE)
            return
        chosen = self._chooser.choose(group, scored, affordable=self._affords(self._with_people + 1))
        self._journal(chosen)
        if chosen.people:
            self._with_people += 1
            self._people.submit(group)
        else:
            self._set_aside(group, NOT_SELECTED)

    def resume(self, groups: Iterable[GroupState]) -> None:
        """Go on with what the journal says of all groups: what was chosen stays chosen, the others are chosen now."""
        states = list(groups)
        self._chooser.resume(states)
        asked = [s for s in states if not s.open or (s.chosen is not None and s.chosen.people)]
        self._with_people = sum(s.open for s in asked)
        self._people.resume(asked)
        for state in states:
            if state.open and state.chosen is None:
                self.submit(state.sampled.group())
            elif state.open and state.chosen is not None and not state.chosen.people:
                self._set_aside(state.sampled.group(), NOT_SELECTED)

    def collect(self) -> list[RankedGroup | Unranked]:
        by_people = self._people.collect()
        self._with_people -= len(by_people)
        return super().collect() + by_people

    def status(self) -> dict[str, float]:
        return {**self._people.status(), **self._chooser.status()}
