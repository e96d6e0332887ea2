"""What guards did in a run, and how old the votes were that it learned from."""

from __future__ import annotations

from rlhf_cli.journal.events import GuardTripped, RolledBack
from rlhf_cli.report.markup import esc, section, table
from rlhf_cli.report.record import Record

_WORDS = {
    "kl": "KL to the reference, nats a completion",
    "length_growth": "length against that of the first step",
    "length_correlation": "correlation of score and length within groups",
}


def guards_section(record: Record) -> str:
    """Every guard that tripped; nothing where none did."""
    rows = []
    events: list[GuardTripped | RolledBack] = [*record.state.tripped, *record.state.rollbacks]
    for event in sorted(events, key=_ended):  # the end comes last
        if isinstance(event, RolledBack):
            step = event.from_step
            what = f"rolled back to step {event.to_step}, beta {event.beta_scale:g} times the recipe's from there on"
        else:
            step, what = event.step, "the run ended" if event.action == "stop" else "noted"
        words = _WORDS.get(event.guard, event.guard)
        rows.append([str(step), esc(words), f"{event.value:.2f}", f"{event.limit:g}", esc(what)])
    if not rows:
        return ""
    void = sum(group.void for group in record.state.groups.values())
    lead = "Limits of the recipe that the run went beyond."
    if void:
        lead += (
            f" {void} groups were sampled by policies that were given up; they never train, and their votes are kept."
        )
    head = ["after step", "what", "was", "limit", "done"]
    return section("Guards", lead, f'<div class="card">{table(head, rows)}</div>')


def _ended(event: GuardTripped | RolledBack) -> bool:
    return isinstance(event, GuardTripped) and event.action == "stop"


def ages_section(record: Record) -> str:
    """How many steps lay between what was sampled and the step that learned from it; nothing before the first.

    The votes are people's: what a model expected of them is not counted.
    """
    ages: dict[int, list[float]] = {}
    for group in record.trained:
        assert group.step is not None  # of a group that trained
        assert group.ranked is not None
        votes = group.ranked.matrix().votes if group.ranked.by_people else 0.0
        ages.setdefault(group.step - 1 - group.sampled.policy_step, []).append(votes)
    if not ages:
        return ""
    total, groups = sum(map(sum, ages.values())), sum(map(len, ages.values()))
    rows = []
    for age, votes_of in sorted(ages.items()):
        row = [str(age), str(len(votes_of)), f"{len(votes_of) / groups:.1%}"]
        rows.append(row + ([f"{sum(votes_of):,.0f}", f"{sum(votes_of) / total:.1%}"] if total else []))
    head = ["age in steps", "groups", "share of groups", *(["votes of people", "share of votes"] if total else [])]
    lead = (
        "Steps that the policy had taken since it sampled what was compared. 0 is the policy that trained; older votes "
        "are about completions that it may no longer write."
    )
    title = "Age of every trained vote" if total else "Age of every trained group"
    return section(title, lead, f'<div class="card">{table(head, rows)}</div>')
