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
    for event in events:
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


def ages_section(record: Record) -> str:
    """How many steps lay between a vote's completions and the step that learned from it; nothing before the first."""
    ages: dict[int, list[float]] = {}
    for group in record.trained:
        assert group.step is not None  # of a group that trained
        assert group.ranked is not None
        ages.setdefault(group.step - 1 - group.sampled.policy_step, []).append(group.ranked.matrix().votes)
    if not ages:
        return ""
    total = sum(map(sum, ages.values()))
    rows = [
        [str(age), str(len(votes)), f"{sum(votes):,.0f}", f"{sum(votes) / total:.1%}" if total else ""]
        for age, votes in sorted(ages.items())
    ]
    lead = (
        "Steps that the policy had taken since it sampled what was voted on. 0 is the policy that trained; older votes "
        "are about completions that it may no longer write."
    )
    head = ["age in steps", "groups", "votes", "share of votes"]
    return section("Age of every trained vote", lead, f'<div class="card">{table(head, rows)}</div>')
