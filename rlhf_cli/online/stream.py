"""The loop: sample groups, ask for votes, hand ranked groups to the learner, while the next ones are being voted on."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf_cli.errors import BudgetReached, Diverged
from rlhf_cli.feedback.selection import NOT_SELECTED
from rlhf_cli.journal.events import GroupSampled, GroupSetAside, GuardTripped
from rlhf_cli.journal.journal import Journal
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.replay import RunState
from rlhf_cli.learner.batch import Batch
from rlhf_cli.online.degenerate import degenerate, unasked
from rlhf_cli.online.guards import Guards, RollBack, Trip
from rlhf_cli.online.roles import RoleFigures
from rlhf_cli.online.stop import StopRequest
from rlhf_cli.policy.policy import Policy
from rlhf_cli.recipe.online import Sampling
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.types import Feedback, Group, Prompt, RankedGroup, Unranked

Reward = Callable[[Prompt, Sequence[str]], list[float]]
"""Scores completions of a prompt, for display; never a label."""

POLL_S = 0.02
"""Pause between two looks at the feedback while there is nothing else to do."""


@dataclass(slots=True)
class Fresh:
    """Figures of the completions sampled since the last step; of the policy's own, where a recipe has roles."""

    rewards: list[float] = field(default_factory=list)
    kl_nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    chars: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    roles: dict[str, RoleFigures] = field(default_factory=dict)
    """Of every role by its name; empty where the recipe has none."""

    def add(self, group: Group, rewards: Sequence[float] | None, sampling: Sampling) -> None:
        for k, completion in enumerate(group.completions):
            reward = None if rewards is None else rewards[k]
            if sampling.roles is not None:
                self.roles.setdefault(completion.role, RoleFigures()).add(completion, reward)
            if completion.role not in sampling.own:
                continue
            self.kl_nats.append(completion.kl_nats)
            self.tokens.append(len(completion.token_ids))
            self.chars.append(len(completion.text))
            self.ended.append(completion.ended)
            if reward is not None:
                self.rewards.append(reward)


class Stream:
    """Yields one `Batch` per learner step; TRL's trainer pulls.

    The policy samples in here, so one thread touches the model. People's time is overlapped by sampling ahead: as many
    groups are out for votes as their latency asks for, bounded by `max_in_flight` and by the staleness that training
    accepts. Pacing comes before discarding, because what people have judged is paid for.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        feedback: Feedback,
        journal: Journal,
        state: RunState,
        prompts: Sequence[Prompt],
        recipe: Recipe,
        stop: StopRequest,
        observers: Sequence[Observer] = (),
        reward: Reward | None = None,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        assert recipe.run_online is not None
        self.policy, self.feedback, self.journal, self.stop = policy, feedback, journal, stop
        self.recipe, self.online, self.prompts = recipe, recipe.run_online, prompts
        self.observers, self.reward, self.clock = observers, reward, clock
        self.prefix = f"{state.run_id}-{state.attempt}"
        self.step = 0
        """Learner steps taken; the recorder counts it up."""
        self.next_index = state.next_index
        self._out = {g.sampled.group_id: g.sampled.policy_step for g in state.open_groups}
        """Groups without an outcome, and the steps that the policy had taken when it sampled them."""
        self.ready: deque[RankedGroup] = deque()
        self.fresh = Fresh()
        self.batch: Batch | None = None
        self.guards = Guards(self.online, state)
        self.beta, self.rollbacks = self.online.learner.beta * state.beta_scale, len(state.rollbacks)
        self._noted = {event.guard for event in state.tripped if event.action == "note"}
        self.unasked = unasked(state)
        """Groups of this attempt that were set aside because nobody could learn from them."""
        self.degenerate_in_a_row = self.unranked_in_a_row = 0
        """Counted apart: while people take their time, one that they will rank may lie behind many degenerate ones."""
        self.started = clock() if started is None else started
        """Clock time from which the deadline counts; of the run where a roll-back made another stream."""
        self._sampled_after = max((g.sampled.policy_step for g in state.groups.values() if not g.void), default=-1)
        """Steps that the policy had taken when it sampled last; also before a restart, which must not sample again."""
        self._recorded = [state.steps[s] for s in sorted(state.steps)]
        self._known = state.groups
        self.ready.extend(self._ranked(g.sampled.group_id) for g in state.ready_groups)

    def __iter__(self) -> Iterator[Batch]:
        since_checkpoint = self._recorded[self.step :]
        for recorded in since_checkpoint:  # after a crash: exactly as they were
            groups = [self._ranked(group_id) for group_id in recorded.group_ids]
            yield self._deliver(Batch(groups, recorded.beta or self.beta))
        while True:
            yield self._deliver(Batch(self._next_groups(), self._beta()))

    def _ranked(self, group_id: str) -> RankedGroup:
        known = self._known[group_id]
        assert known.ranked is not None  # replay lets no step train on a group without votes
        return known.ranked.ranked(known.sampled.group())

    def _next_groups(self) -> list[RankedGroup]:
        """Sample, ask and wait until a step's worth of groups is ranked; the oldest sampled go first."""
        wanted = self.online.prompts_per_step
        enough = min(self.online.min_ready or wanted, wanted)
        sampled = self._sampled_after == self.step
        while True:
            self.stop.check()
            self._collect()
            self._heed_guards()
            self._check_deadline()
            well_fed = len(self.ready) >= 2 * wanted
            full = len(self.ready) >= enough and (sampled or well_fed or not self._room())
            if full and not self._leaves_people_behind():
                break
            if not full and (count := self._room()):
                self._sample(count)
                sampled = True
            elif self.outstanding:
                with self.policy.phase("wait"):
                    self._report_status()
                    time.sleep(POLL_S)
            elif self.ready:
                break  # the budget allows no more groups; learn from what has been paid for
            else:
                raise BudgetReached(f"the budget allows no further group: {self._spent()}; raise it and --resume")
        return [self.ready.popleft() for _ in range(min(wanted, len(self.ready)))]

    @property
    def outstanding(self) -> int:
        """Groups that were asked about and have no outcome."""
        return len(self._out)

    def _leaves_people_behind(self) -> bool:
        """Whether another step now would make a group that people still look at too old to train on.

        Only where a model answers beside them can steps outrun people; else all groups wait for the same.
        """
        by_both = self.online.feedback == "hybrid" and bool(self._out)
        return by_both and self.step - min(self._out.values()) >= self.online.staleness.max_steps

    def _room(self) -> int:
        """How many groups may be sampled now: a step's worth at a time, and never more than the run still needs."""
        per_step, unused = self.online.prompts_per_step, self.outstanding + len(self.ready)
        # In whole steps' worths: what replaces a group that was set aside must not leave others to grow old.
        count = min(per_step - unused % per_step, (self.online.steps - self.step) * per_step - unused)
        # A group with n steps' worth of groups before it will be n steps old when its turn comes.
        ahead = min(self.online.max_in_flight, (self.online.staleness.max_steps + 1) * per_step)
        if unused + count > ahead:
            count = per_step - unused  # what the next step lacks, where some groups were set aside
        return count if count > 0 and self._affordable(count) else 0

    def _affordable(self, groups: int) -> bool:
        budget = self.recipe.budget
        if self.online.feedback == "judge" and budget.usd is not None:
            each = self.feedback.status().get("judge/usd_per_group", 0.0)
            return self.usd() + (self.outstanding + groups) * each <= budget.usd
        if self.online.feedback != "votes":
            return True  # with hybrid feedback the chooser minds the budget: where it ends, the model answers
        # With a selection it is not known yet who sees the next ones, and the chooser looks again at each.
        more = 1 if self.online.selection else groups
        return self.recipe.affords(self._votes(), self.outstanding + more)

    def _sample(self, count: int) -> None:
        """Sample the next `count` groups with the policy as it is now, record them, ask for votes."""
        self.policy.sync()
        first, self._sampled_after = self.next_index, self.step
        prompts = [self._prompt(first + i) for i in range(count)]
        groups = self.policy.sample_groups(
            prompts,
            self.online.sampling,
            self.online.group_size,
            first_index=first,
            prefix=self.prefix,
            step=self.step,
            seed=self.recipe.seed,
        )
        self.guards.sampled(groups)
        self._heed_guards()  # before anybody is asked about what a policy beyond its limits wrote
        for group in groups:
            self.journal.append(GroupSampled.of(group, batch=first))
            self.next_index += 1
            if (why := degenerate(group, self.online.cut_off)) is not None:
                self.journal.append(GroupSetAside(group_id=group.id, reason=why))
                self.unasked += 1
                self.degenerate_in_a_row += 1
                self._check_hopeless(self.degenerate_in_a_row, why)
                continue
            self.degenerate_in_a_row = 0
            self._out[group.id] = group.policy_step
            self.feedback.submit(group)
        self._measure(groups)

    def _prompt(self, index: int) -> Prompt:
        """Every prompt once per round, each round in its own order."""
        round_, place = divmod(index, len(self.prompts))
        order = random.Random(f"{self.recipe.seed}/{round_}").sample(range(len(self.prompts)), len(self.prompts))
        return self.prompts[order[place]]

    def _measure(self, groups: Sequence[Group]) -> None:
        for group in groups:
            rewards = None if self.reward is None else self.reward(group.prompt, [c.text for c in group.completions])
            if rewards is not None:
                self.guards.shown(group, rewards)
            self.fresh.add(group, rewards, self.online.sampling)

    def _heed_guards(self) -> None:
        """Do what the recipe wants done where a guard has tripped.

        Raises:
            RollBack: Steps are given up.
            Diverged: The run ends.
        """
        for trip in self.guards.trips(self.step):
            if trip.action == "note":
                if trip.guard not in self._noted:
                    self._noted.add(trip.guard)
                    self._record(trip, "note")
            elif trip.action == "stop" or self.rollbacks == self.online.kl.max_rollbacks:
                self._record(trip, "stop")
                after = f" after {self.rollbacks} roll-backs" if self.rollbacks else ""
                raise Diverged(
                    f"{trip}{after}; the last checkpoint is kept. "
                    "Raise learner.beta or lower learner.learning_rate, and start over with --fresh."
                )
            elif self.step:  # with no step taken there is none to give up
                raise RollBack(trip)

    def _record(self, trip: Trip, action: Literal["note", "stop"]) -> None:
        for observer in self.observers:
            observer.on_note(str(trip))
        self.journal.append(
            GuardTripped(guard=trip.guard, step=trip.step, value=trip.value, limit=trip.limit, action=action)
        )

    def _beta(self) -> float:
        """Beta grows with the square of how far KL is beyond its soft limit, and comes back with it."""
        soft, now = self.online.kl.soft_nats, self.guards.kl_latest_nats
        if soft is None or now is None:
            return self.beta
        return self.beta * max(1.0, now / soft) ** 2

    def _collect(self) -> None:
        for verdict in self.feedback.collect():
            del self._out[verdict.group.id]
            if isinstance(verdict, Unranked):
                self.unranked_in_a_row += verdict.reason != NOT_SELECTED
                self._check_hopeless(self.unranked_in_a_row, verdict.reason)
            else:
                self.unranked_in_a_row = 0
                self.guards.ranked(verdict)
                self.ready.append(verdict)
        limit = self.online.staleness.max_steps
        fresh: deque[RankedGroup] = deque()
        # By age of sampling, not of ranking: a slow group must not go stale behind newer ones.
        for ranked in sorted(self.ready, key=lambda r: r.group.index):
            age = self.step - ranked.group.policy_step
            if age <= limit:
                fresh.append(ranked)
            else:
                reason = f"stale: sampled {age} steps ago, staleness.max_steps is {limit}"
                self.journal.append(GroupSetAside(group_id=ranked.group.id, reason=reason))
        self.ready = fresh

    def _check_hopeless(self, in_a_row: int, reason: str) -> None:
        if in_a_row >= 10 * self.online.prompts_per_step:
            raise Diverged(
                f"the last {in_a_row} groups all had to be set aside, the latest because: {reason}. "
                "Nothing can be learned like this."
            )

    def _check_deadline(self) -> None:
        deadline_s = self.recipe.budget.deadline_s
        if deadline_s is not None and self.clock() - self.started > deadline_s:
            raise BudgetReached(
                f"budget.deadline of {deadline_s:g} s is reached after step {self.step}; resume goes on"
            )

    def _deliver(self, batch: Batch) -> Batch:
        self.batch = batch
        self._report_status()
        return batch

    def _votes(self) -> float:
        return self.feedback.status().get("flow/votes_total", 0.0)

    def usd(self) -> float:
        """What votes and a judge have cost."""
        judge = self.feedback.status().get("judge/usd", 0.0)
        return self._votes() * self.recipe.budget.usd_per_1k_votes / 1000 + judge

    def _spent(self) -> str:
        return f"{self._votes():.0f} votes, {self.usd():.2f} USD"

    def _report_status(self) -> None:
        if not self.observers:
            return
        row = {**self.feedback.status(), "cost/usd": self.usd()}
        for observer in self.observers:
            observer.on_status(row)
