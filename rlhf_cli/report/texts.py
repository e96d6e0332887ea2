"""What people read first: answers before and after, and the votes behind some of the steps."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rlhf_cli.journal.metrics import ROLE_METRICS
from rlhf_cli.journal.replay import GroupState
from rlhf_cli.ranking.bradley_terry import rank
from rlhf_cli.report.markup import esc, interval_bar, model_text, section, table
from rlhf_cli.report.record import Record

MOST_SAMPLES = 24
MOST_GROUPS = 6


def samples_section(record: Record) -> str:
    """Held-out prompts, answered by the SFT model and by the trained policy."""
    if not record.samples:
        lead = "None yet: held-out prompts are answered by <code>rlhf eval</code>."
        return section("Before and after", lead, "")
    shown = record.samples[:MOST_SAMPLES]
    lead = (
        f"The first {len(shown)} of {len(record.samples)} held-out prompts, in the order of their file: "
        "nothing was picked, and neither model was trained on them."
    )
    return section("Before and after", lead, "\n".join(_sample(sample) for sample in shown))


def supervised_section(record: Record) -> str:
    """Prompts answered by the model that `rlhf sft` started from and by what it made; nothing without it."""
    if not record.supervised:
        return ""
    lead = (
        "The first rows, held-out ones where there are any, answered with the most likely tokens before and after "
        "<code>rlhf sft</code>."
    )
    return section("Supervised fine-tuning", lead, "\n".join(map(_supervised, record.supervised[:MOST_SAMPLES])))


def _supervised(sample: dict[str, Any]) -> str:
    columns = [("Before", "before"), ("After", "after"), ("In the data", "answer")]
    cells = "".join(
        f'<div><h3>{title}</h3><div class="answer">{model_text(str(sample.get(key, "")))}</div></div>'
        for title, key in columns
    )
    asked = model_text(str(sample.get("prompt", "")), "model prompt")
    return f'<article class="card sample">{asked}<div class="pair">{cells}</div></article>'


def _sample(sample: dict[str, Any]) -> str:
    before, after = _answers(sample.get("before")), _answers(sample.get("after"))
    rewards = [[a["reward"] for a in side if isinstance(a.get("reward"), int | float)] for side in (before, after)]
    change = ""
    if all(rewards):
        gain = fmean(rewards[1]) - fmean(rewards[0])
        change = f' <span class="chip {"up" if gain > 0 else "down"}">{gain:+.2f}</span>'
    return (
        f'<article class="card sample">{model_text(str(sample.get("prompt", "")), "model prompt")}<div class="pair">'
        f"<div><h3>SFT model</h3>{''.join(map(_answer, before))}</div>"
        f"<div><h3>Trained policy{change}</h3>{''.join(map(_answer, after))}</div></div></article>"
    )


def _answers(value: object) -> list[dict[str, Any]]:
    return [answer for answer in value if isinstance(answer, dict)] if isinstance(value, list) else []


def _answer(answer: dict[str, Any]) -> str:
    reward = answer.get("reward")
    chip = f'<span class="chip">reward {reward:.2f}</span>' if isinstance(reward, int | float) else ""
    return f'<div class="answer">{model_text(str(answer.get("text", "")))}{chip}</div>'


def groups_section(record: Record) -> str:
    """Some trained groups with the votes on them and the ranking that follows."""
    trained = record.trained
    if not trained:
        return section("Votes behind the steps", "No group has been trained on yet.", "")
    count = min(MOST_GROUPS, len(trained))
    spread = [trained[k * (len(trained) - 1) // max(count - 1, 1)] for k in range(count)]
    lead = (
        f"{count} of {len(trained)} trained groups, evenly spread over the run. Scores are in logits, relative to the "
        "group, with 95% intervals (Bradley-Terry with a Gaussian prior); of two answers one logit apart, 73 of 100 "
        "raters prefer the better one. Wide bars mean few votes."
    )
    return section("Votes behind the steps", lead, "\n".join(map(_group, spread)))


def roles_section(record: Record) -> str:
    """What each role of the recipe added, over all steps; nothing where it has no roles."""
    names = [name.split("/")[1] for row in record.rows for name in row if name.startswith("role/")]
    if not names:
        return ""
    rows = []
    for role in dict.fromkeys(names):
        values = {key: [row.get(f"role/{role}/{key}") for row in record.rows] for key in ROLE_METRICS}
        numbers = {key: [v for v in column if isinstance(v, int | float)] for key, column in values.items()}
        cells = [format(fmean(n), ROLE_METRICS[key].form) if n else "\u2013" for key, n in numbers.items()]
        rows.append([esc(role), *cells])
    lead = (
        "Means over all steps. <em>Won</em> is the share of the votes between a completion of this role and one of "
        "another that it won; with two roles the shares add up to 1. All other figures of this report are of the "
        "policy's own completions: neither those of an earlier policy nor those that a reward model chose."
    )
    head = ["role", *(f'<span title="{esc(m.help)}">{esc(m.label)}</span>' for m in ROLE_METRICS.values())]
    return section("Roles", lead, f'<div class="card">{table(head, rows)}</div>')


def _group(group: GroupState) -> str:
    assert group.ranked is not None  # replay lets no step train on a group without votes
    wins = group.ranked.matrix()
    ranking = rank(wins)
    reach = max(1.0, float(abs(ranking.interval95).max()))
    rows = []
    for i in ranking.order:
        low, high = ranking.interval95[i]
        flags = [
            ("never lost", ranking.never_lost[i]),
            ("never won", ranking.never_won[i]),
            ("no votes", ranking.no_votes[i]),
        ]
        chips = "".join(f'<span class="chip warn">{name}</span>' for name, on in flags if on)
        if role := group.sampled.completions[i].role:
            chips += f'<span class="chip">{esc(role)}</span>'
        rows.append(
            f"<tr><td>{interval_bar(low, ranking.scores[i], high, (-reach, reach), 0)}</td>"
            f"<td>{ranking.scores[i]:+.2f}</td><td>{ranking.p_best[i]:.0%}</td>"
            f"<td>{wins.wins[i].sum():g}\u2013{wins.wins[:, i].sum():g}</td>"
            f'<td class="text">{model_text(group.sampled.completions[i].text)}{chips}</td></tr>'
        )
    about = (
        f'<span class="chip">step {group.step}</span><span class="chip">{wins.votes:g} votes</span>'
        f'<span class="chip">{group.ranked.latency_s:.1f} s</span><span class="chip">{esc(group.ranked.source)}</span>'
    )
    if not group.ranked.complete:
        about += '<span class="chip warn">below the minimum of votes</span>'
    if ranking.disconnected:
        about += '<span class="chip warn">not all compared with one another</span>'
    prompt = next((text for role, text in reversed(group.sampled.messages) if role == "user"), "")
    return (
        f'<article class="card sample">{model_text(prompt, "model prompt")}{about}<div class="scroll"><table>'
        "<tr><th></th><th>score</th><th>P(best)</th><th>won\u2013lost</th>"
        f'<th class="text">completion</th></tr>{"".join(rows)}</table></div></article>'
    )
