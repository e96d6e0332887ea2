"""What is wrong with rows of training data before hours are spent on them; plain text, no model needed.

A finding that makes the numbers of a stage meaningless is fatal; all others are worth a line and the run goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlhf_cli.errors import DataError
from rlhf_cli.recipe.votes import VotedGroup
from rlhf_cli.types import Message, Prompt

MAX_LEAKED = 0.01
"""Share of held-out rows that may be known from training before the figures on them stop meaning anything."""
MAX_SHOWN = 5
ENOUGH = 20
"""So many completions of one length are no coincidence."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where, and what to do about it."""

    text: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the checks see it: where it stands, what is asked, the answers, and who beats whom among them."""

    where: str
    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    beats: tuple[tuple[int, int], ...] = ()

    @property
    def asked(self) -> str:
        """The prompt up to case and white space."""
        return "\n".join(f"{m.role}: {_plain(m.content)}" for m in self.prompt)


def settle(findings: Iterable[Finding]) -> list[str]:
    """The warnings among `findings`.

    Raises:
        DataError: There are fatal ones; it says them all.
    """
    found = list(findings)
    if fatal := [f.text for f in found if f.fatal]:
        raise DataError("\n".join(fatal))
    return [f.text for f in found]


def conversations(rows: Sequence[tuple[Message, ...] | str], wheres: Sequence[str]) -> list[Example]:
    """Supervised rows: the last turn is the answer; a raw text is an answer to nothing."""
    return [
        Example(where, (), (row,)) if isinstance(row, str) else Example(where, row[:-1], (row[-1].content,))
        for row, where in zip(rows, wheres, strict=True)
    ]


def voted(groups: Sequence[VotedGroup]) -> list[Example]:
    """Groups with votes; of two completions the one with more votes beats the other.

    Texts that were rated one by one are examples of their own, named by their words: the group is ours, not a row.
    """
    rows: list[Example] = []
    for g in groups:
        if g.ratings:
            file = g.where.rpartition(":")[0]
            rows += [Example(f"{file}: {text[:40]!r}", g.prompt, (text,)) for text in g.completions]
        else:
            rows.append(Example(g.where, g.prompt, g.completions, tuple(_winners(g.wins.wins))))
    return rows


def prompts_only(prompts: Sequence[Prompt]) -> list[Example]:
    """Prompts of online training and of eval, known by their ids."""
    return [Example(f"'{p.id}'", p.messages, ()) for p in prompts]


def check_rows(train: Sequence[Example], heldout: Sequence[Example]) -> Iterator[Finding]:
    """Everything that can be seen from the rows of a supervised stage alone."""
    for rows in filter(None, (train, heldout)):
        yield from same_answers(rows)
        yield from empty_answers(rows)
        yield from one_length(rows)
    yield from doubled(train)
    yield from contradicting(train)
    yield from leaked(train, heldout)


def leaked(train: Sequence[Example], heldout: Sequence[Example]) -> Iterator[Finding]:
    """Held-out rows that training has seen, up to case and white space."""
    if not heldout:
        return
    known = {key: row.where for row in train for key in _keys(row)}
    bad = [row for row in heldout if row.completions and all(key in known for key in _keys(row))]
    if bad:
        share = len(bad) / len(heldout)
        twin = known[next(_keys(bad[0]))]
        yield Finding(
            f"{places(bad)}: {_rows(len(bad))} of {len(heldout)} held-out ones ({share:.1%}) are in the training data "
            f"too, with prompt and completions (the first one at {twin}), so figures on them measure memory. Remove "
            "them from either side, or let the split be made by prompt: `heldout: 0.1`",
            fatal=share > MAX_LEAKED,
        )
        gone = set(map(id, bad))
        heldout = [row for row in heldout if id(row) not in gone]
    asked = {row.asked for row in train}
    again = [row for row in heldout if row.asked in asked]
    # One prompt for all rows says what the task is, not what is asked: there are only answers to tell rows apart.
    if again and len(asked) > 1:
        yield Finding(
            f"{places(again)}: {_rows(len(again))} of {len(heldout)} held-out ones ask what the training data ask, so "
            "figures on them say nothing about new prompts; let the split be made by prompt: `heldout: 0.1`"
        )


def shared_prompts(train: Sequence[Example], heldout: Sequence[Example]) -> Iterator[Finding]:
    """Prompts of eval that the policy is trained on."""
    asked = {row.asked for row in train}
    if again := [row for row in heldout if row.asked in asked]:
        yield Finding(
            f"data.heldout_prompts: {len(again)} of {len(heldout)} prompts are in data.prompts too ({places(again)}), "
            "so eval measures in part what was trained on; remove them from data.prompts"
        )


def doubled(rows: Sequence[Example]) -> Iterator[Finding]:
    """Rows that are there twice or more."""
    first: dict[int, Example] = {}
    again = [(row, twin) for row in rows if (twin := first.setdefault(_same(row), row)) is not row]
    if again:
        yield Finding(
            f"{places([row for row, _ in again])}: {_rows(len(again))} of {len(rows)} repeat an earlier one word for "
            f"word (the first one repeats {again[0][1].where}) and weigh double; remove them, unless they are votes of "
            "several raters"
        )


def contradicting(rows: Sequence[Example]) -> Iterator[Finding]:
    """Pairs of completions that are judged one way in one row and the other way in another."""
    first: dict[int, str] = {}
    against: list[tuple[Example, str]] = []
    for row in rows:
        for i, j in row.beats:
            won, lost = row.completions[i], row.completions[j]
            first.setdefault(hash((row.prompt, won, lost)), row.where)
            other = first.get(hash((row.prompt, lost, won)))
            if other is not None and won != lost:
                against.append((row, other))
    if against:
        judged = "1 pair is" if len(against) == 1 else f"{len(against)} pairs are"
        yield Finding(
            f"{places([row for row, _ in against])}: {judged} judged the other way elsewhere (the "
            f"first one at {against[0][1]}). With several raters that is their disagreement and belongs in the data; "
            "otherwise keep the judgement that is right, for the two cancel out"
        )


def same_answers(rows: Sequence[Example]) -> Iterator[Finding]:
    """Votes between two completions that are the same text: nothing can be learned from them."""
    bad = [row for row in rows if any(row.completions[i] == row.completions[j] for i, j in row.beats)]
    if bad:
        yield Finding(
            f"{places(bad)}: {_rows(len(bad))} of {len(rows)} prefer a completion to its own copy; no model can tell "
            "them apart. Remove them, or look whether 'chosen' and 'rejected' come from the right columns",
            fatal=2 * len(bad) > len(rows),
        )


def empty_answers(rows: Sequence[Example]) -> Iterator[Finding]:
    """Completions of nothing but white space."""
    bad = [row for row in rows if any(not c.strip() for c in row.completions)]
    if bad:
        yield Finding(
            f"{places(bad)}: {_rows(len(bad))} of {len(rows)} have an empty completion. If a model did answer with "
            "nothing, keep them; otherwise a text was lost where the file was made",
            fatal=2 * len(bad) > len(rows),
        )


def one_length(rows: Sequence[Example]) -> Iterator[Finding]:
    """Completions that were cut at one length before they came here."""
    lengths = Counter(len(c) for row in rows for c in row.completions)
    total = sum(lengths.values())
    if total < ENOUGH or 2 * lengths[longest := max(lengths)] <= total:
        return
    yield Finding(
        f"{rows[0].where.partition(':')[0]}: {lengths[longest]} of {total} completions have exactly {longest} "
        "characters, the longest there are: they look cut off. Make the file again without the limit, or the model "
        "learns to stop in mid-sentence"
    )


def places(rows: Sequence[Example]) -> str:
    """The first few places, `file:3, file:17 and 12 more`."""
    shown = ", ".join(row.where for row in rows[:MAX_SHOWN])
    return shown + (f" and {len(rows) - MAX_SHOWN} more" if len(rows) > MAX_SHOWN else "")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _same(row: Example) -> int:
    """A number that rows share which say the same."""
    return hash((row.prompt, row.completions, row.beats))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _keys(row: Example) -> Iterator[int]:
    """One number for each completion with its prompt."""
    asked = row.asked
    return (hash((asked, _plain(c))) for c in row.completions)


def _winners(wins: object) -> Iterator[tuple[int, int]]:
    import numpy as np

    wins_GG = np.asarray(wins)
    yield from ((int(i), int(j)) for i, j in zip(*np.nonzero(wins_GG > wins_GG.T), strict=True))
