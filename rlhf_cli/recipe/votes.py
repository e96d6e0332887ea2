"""Votes as people hand them in: pairs, matrices, one vote at a time, or many ratings per text. All become groups.

A row is one of, with `"source"` as it likes:

    {"prompt", "chosen", "rejected"}                                          one vote
    {"chosen": turns, "rejected": turns}                                      the same; all turns but the last agree
    {"prompt", "completions", "wins"}                                         wins[i][j] votes preferred i over j
    {"prompt", "completions", "votes": [{"rater"?, "better": i, "worse": j} or {"rater"?, "tie": [i, j]}]}
    {"prompt", "response_1", "response_2", "votes": [{"annotator"?, "choice": 1, 2 or "tie"}]}
    {"text", "ratings": [numbers], "domain"?, "prompt"?}                      one number per rater, higher is better

Completions are counted from 0. Parsing needs no numpy, so `rlhf validate` stays quick.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_cli.recipe.rows import Row, Turn, completion_of, prompt_of, text_of, wrong

if TYPE_CHECKING:
    from rlhf_cli.types import Message, WinMatrix

P = TypeVar("P")

GROUP_SIZE = 8
"""Rated texts of one domain are compared in groups of so many."""

PairVote = tuple[str, int, int, float]
"""Rater (empty where unknown), two completions, and 1 where the first is better, 0.5 for a tie."""


@dataclass(frozen=True, slots=True)
class VotedGroup:
    """Completions of one prompt and the votes between them."""

    prompt: tuple[Message, ...]
    """Empty where the texts stand for themselves."""
    completions: tuple[str, ...]
    wins: WinMatrix
    source: str = ""
    """Where the votes come from: a data set, a domain, a run."""
    rater_wins: tuple[WinMatrix, ...] = ()
    """The votes of each rater, where it is known who cast which; they add up to `wins`."""
    ratings: tuple[tuple[float, ...], ...] = ()
    """For rated texts, the ratings of each completion that `wins` was made of."""
    where: str = field(default="", compare=False)
    """File and line, for messages."""

    @property
    def key(self) -> str:
        """What the group shares its luck with: its prompt, or itself where texts are rated one by one.

        Held-out shares and halves are chosen by this hash, so that they are the same on every machine.
        """
        turns = [[m.role, m.content] for m in self.prompt]
        said = json.dumps([turns, sorted(self.completions)] if self.ratings or not turns else turns)
        return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CountedVotes:
    """A row that says all about its group."""

    prompt: tuple[Turn, ...]
    completions: tuple[str, ...]
    wins: list[list[float]]
    votes: tuple[PairVote, ...] = ()
    source: str | None = None


@dataclass(frozen=True, slots=True)
class RatedText:
    """A row that is compared with others of its prompt and domain."""

    prompt: tuple[Turn, ...]
    text: str
    ratings: tuple[float, ...]
    domain: str | None = None


VoteRow = CountedVotes | RatedText


def voted_row(row: Row) -> VoteRow:
    """One row of votes, checked.

    Raises:
        Wrong: What is wrong with it.
    """
    row = {key: value for key, value in row.items() if value is not None}  # what a table has in an empty cell
    if "ratings" in row:
        return _rated(row)
    source = text_of(row["source"], "'source'") if "source" in row else None
    if source is not None and source.startswith("item:"):  # as `rlhf votes export` has it: a source for every group
        source = None
    if "response_1" in row:
        # An answer such as 42 or true has lost its quotes in files of this shape.
        row |= {k: json.dumps(row[k]) for k in ("response_1", "response_2") if isinstance(row.get(k), int | float)}
        answers = (completion_of(row, "response_1"), completion_of(row, "response_2"))
        votes = tuple(_choice(vote, n) for n, vote in enumerate(_list(row, "votes"), 1))
        return _counted(prompt_of(row), answers, votes, source)
    if "completions" not in row:
        row = _prompt_apart(row)
        pair = (completion_of(row, "chosen"), completion_of(row, "rejected"))
        return CountedVotes(prompt_of(row), pair, [[0.0, 1.0], [0.0, 0.0]], (), source)
    prompt, completions = prompt_of(row), _list(row, "completions")
    if len(completions) < 2:
        wrong("'completions' has to be a list of at least two texts")
    texts = tuple(text_of(text, f"completion {n}", empty=True) for n, text in enumerate(completions, 1))
    if "votes" in row and "wins" not in row:
        cast = tuple(_pair_vote(vote, n, len(texts)) for n, vote in enumerate(_list(row, "votes"), 1))
        return _counted(prompt, texts, cast, source)
    return CountedVotes(prompt, texts, _wins(row, len(texts)), (), source)


def _prompt_apart(row: Row) -> Row:
    """A pair of whole conversations, as datasets of the hub have them: what both begin with is the prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row or not isinstance(chosen, list) or not isinstance(rejected, list):
        return row
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        wrong("'prompt' is missing, and 'chosen' and 'rejected' do not part at their last turn alone")
    return {**row, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def alone(rows: Iterable[tuple[int, VoteRow]]) -> Iterator[tuple[int, str]]:
    """Rated texts, by line, that there is nothing to compare with."""
    for members in _together((line, row) for line, row in rows if isinstance(row, RatedText)).values():
        if len(members) == 1:
            yield members[0][0], "is the only text of its domain and prompt, so there is nothing to compare it with"


def voted_groups(rows: Sequence[tuple[str, VoteRow]], source: str) -> list[VotedGroup]:
    """Groups from rows with their places; `source` is the name for rows that do not name theirs.

    Rated texts come after the others, in groups of eight of one prompt and domain (nine where one would be left over),
    put together by a hash of the text, so that the order of the rows does not matter.
    """
    counted = [_group(row, row.source or source, where) for where, row in rows if isinstance(row, CountedVotes)]
    rated = _together((where, row) for where, row in rows if isinstance(row, RatedText))
    for members in rated.values():
        shuffled = sorted(members, key=lambda member: hashlib.sha256(member[1].text.encode()).digest())
        starts = list(range(0, max(1, len(shuffled) - 1), GROUP_SIZE))
        for start, end in zip(starts, [*starts[1:], len(shuffled)], strict=True):
            if end - start > 1:
                counted.append(_compared(shuffled[start:end], source))
    return counted


def _group(row: CountedVotes, source: str, where: str) -> VotedGroup:
    from rlhf_cli.types import Message, WinMatrix

    prompt = tuple(Message(*turn) for turn in row.prompt)
    raters: dict[object, list[PairVote]] = {}
    for n, vote in enumerate(row.votes):
        raters.setdefault(vote[0] or n, []).append(vote)
    each = tuple(WinMatrix(_matrix(votes, len(row.completions))) for votes in raters.values())
    return VotedGroup(prompt, row.completions, WinMatrix(row.wins), source, each, where=where)


def _compared(members: Sequence[tuple[str, RatedText]], source: str) -> VotedGroup:
    from rlhf_cli.types import Message

    texts = [row for _, row in members]
    return VotedGroup(
        tuple(Message(*turn) for turn in texts[0].prompt),
        tuple(row.text for row in texts),
        rated_wins([row.ratings for row in texts]),
        texts[0].domain or source,
        ratings=tuple(row.ratings for row in texts),
        where=members[0][0],
    )


def rated_wins(ratings: Sequence[Sequence[float]]) -> WinMatrix:
    """Votes between texts that were rated by different people, one list of ratings per text.

    Of all pairs of a rating of i and one of j, the share where i is higher, ties half, times the smaller number of
    raters: two people's ratings make one vote, and nobody votes twice on a pair.
    """
    import numpy as np

    from rlhf_cli.types import WinMatrix

    levels = np.unique(np.concatenate([np.asarray(row, dtype=float) for row in ratings]))
    counts_GL = np.array([(np.asarray(row, dtype=float)[:, None] == levels).sum(0) for row in ratings])
    below_GL = np.cumsum(counts_GL, axis=1) - counts_GL
    halves_GG = counts_GL @ (2 * below_GL + counts_GL).T  # whole numbers, so that equal texts stay exactly equal
    raters_G = counts_GL.sum(1)
    wins_GG = halves_GG * np.minimum.outer(raters_G, raters_G) / (2 * np.multiply.outer(raters_G, raters_G))
    np.fill_diagonal(wins_GG, 0)
    return WinMatrix(wins_GG)


def _together(rows: Iterable[tuple[P, RatedText]]) -> dict[tuple[object, ...], list[tuple[P, RatedText]]]:
    found: dict[tuple[object, ...], list[tuple[P, RatedText]]] = {}
    for place, row in rows:
        found.setdefault((row.prompt, row.domain), []).append((place, row))
    return found


def _counted(
    prompt: tuple[Turn, ...], texts: tuple[str, ...], votes: tuple[PairVote, ...], source: str | None
) -> VoteRow:
    if not votes:
        wrong("'votes' holds no vote")
    return CountedVotes(prompt, texts, _matrix(votes, len(texts)), votes, source)


def _matrix(votes: Iterable[PairVote], size: int) -> list[list[float]]:
    wins = [[0.0] * size for _ in range(size)]
    for _, i, j, won in votes:
        wins[i][j] += won
        wins[j][i] += 1 - won
    return wins


def _pair_vote(vote: object, n: int, size: int) -> PairVote:
    shape = f'vote {n} has to be {{"rater", "better", "worse"}} or {{"rater", "tie": [i, j]}}'
    if not isinstance(vote, dict):
        wrong(shape)
    tie = vote.get("tie")
    pair = [vote.get("better"), vote.get("worse")] if tie is None else tie
    if not isinstance(pair, list) or len(pair) != 2 or (tie is not None and ("better" in vote or "worse" in vote)):
        wrong(shape)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size for i in pair):
        wrong(f"vote {n} has to name two completions by their number, 0 to {size - 1}")
    if pair[0] == pair[1]:
        wrong(f"vote {n} compares completion {pair[0]} with itself")
    return _rater(vote, "rater", n), pair[0], pair[1], 1.0 if tie is None else 0.5


def _choice(vote: object, n: int) -> PairVote:
    won = {"1": 1.0, "2": 0.0, "tie": 0.5}.get(str(vote.get("choice"))) if isinstance(vote, dict) else None
    if won is None or not isinstance(vote, dict):
        wrong(f'vote {n} has to be {{"annotator", "choice": 1, 2 or "tie"}}')
    return _rater(vote, "annotator", n), 0, 1, won


def _rater(vote: Row, key: str, n: int) -> str:
    rater = vote.get(key, "")
    if isinstance(rater, bool) or not isinstance(rater, str | int):
        wrong(f"'{key}' of vote {n} has to be text")
    return str(rater)


def _rated(row: Row) -> RatedText:
    ratings = _list(row, "ratings")
    if not ratings:
        wrong("'ratings' holds no rating")
    if any(isinstance(r, bool) or not isinstance(r, int | float) or not math.isfinite(r) for r in ratings):
        wrong("'ratings' holds numbers, one per rater")
    if "text" not in row:
        wrong("'text' is missing")
    domain = text_of(row["domain"], "'domain'") if "domain" in row else None
    return RatedText(
        prompt_of(row) if "prompt" in row else (), text_of(row["text"], "'text'"), tuple(map(float, ratings)), domain
    )


def _wins(row: Row, size: int) -> list[list[float]]:
    wins = _list(row, "wins", "'wins' has to be a square list of lists: wins[i][j] votes preferred completion i over j")
    if any(not isinstance(line, list) or len(line) != len(wins) for line in wins):
        wrong("'wins' has to be a square list of lists: wins[i][j] votes preferred completion i over j")
    if len(wins) != size:
        wrong(f"'wins' is {len(wins)} x {len(wins)} for {size} completions")
    counts = [count for line in wins for count in line]
    if any(isinstance(c, bool) or not isinstance(c, int | float) or not math.isfinite(c) or c < 0 for c in counts):
        wrong("'wins' holds counts of votes: numbers from 0 up")
    if any(wins[i][i] for i in range(size)):
        wrong("a completion cannot win against itself: the diagonal of 'wins' has to be 0")
    if not any(counts):
        wrong("'wins' holds no vote")
    return wins


def _list(row: Row, key: str, what: str = "") -> list[Any]:
    """A list, which a table such as CSV holds as JSON text."""
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            wrong(f"'{key}' is not valid JSON")
    if not isinstance(value, list):
        wrong(what or (f"'{key}' has to be a list" if key in row else f"'{key}' is missing"))
    return value
