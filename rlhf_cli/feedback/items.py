"""What people are shown of a group, and how the items that ask about it stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_cli.flow.base import ItemState
from rlhf_cli.types import Group, Segment, WinMatrix

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """The completions worth showing: the first of each text; empty ones and repetitions are left out."""

    group_id: str
    indices: tuple[int, ...]
    texts: tuple[str, ...]
    """What raters read, and what the service calls the completions by."""
    size: int
    """Of the whole group."""
    skipped: tuple[int, ...]
    """Blank characters before each text, which are not shown."""

    @classmethod
    def of(cls, group_id: str, completions: Sequence[str]) -> Shown:
        first: dict[str, int] = {}
        for index, completion in enumerate(completions):
            text = completion.strip()
            if text:
                first.setdefault(text, index)
        skipped = [len(completions[index]) - len(completions[index].lstrip()) for index in first.values()]
        return cls(group_id, tuple(first.values()), tuple(first), len(completions), tuple(skipped))

    def none(self) -> WinMatrix:
        """No votes on what is shown."""
        return WinMatrix(np.zeros((len(self.texts), len(self.texts))))

    def over_all(self, wins: WinMatrix) -> WinMatrix:
        """Votes on what is shown as votes on the whole group; completions that are not shown have none."""
        whole = np.zeros((self.size, self.size))
        whole[np.ix_(self.indices, self.indices)] = wins.wins
        return WinMatrix(whole)

    def rows(self, wins: WinMatrix) -> Rows:
        """Votes on what is shown as the journal has them: over the whole group."""
        return tuple(tuple(row) for row in self.over_all(wins).wins.tolist())

    def marks_over_all(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Marks in what is shown as marks in the completions of the whole group."""
        places = [(self.indices[s.completion], self.skipped[s.completion], s) for s in segments]
        return tuple(Segment(index, s.start + skipped, s.end + skipped, s.good) for index, skipped, s in places)

    def read(self, rows: Rows) -> WinMatrix:
        """The inverse of `rows`."""
        return WinMatrix(np.array(rows)[np.ix_(self.indices, self.indices)])


@dataclass(slots=True)
class Item:
    """One item at the service. It is over with its first terminal snapshot, or once it is lost."""

    item_id: str
    since: float
    """Clock time at which this process began to wait for it, seconds."""
    seen_at: float
    """Clock time at which the service last knew it."""
    missed: int = 0
    """How many looks in a row it was unknown since."""
    state: ItemState | None = None
    votes: float = 0.0
    """As the service counts them while people vote; 0 where it does not."""
    hurried_at: float | None = None
    """Clock time at which we ended it because its service had not."""
    misread: int = 0
    """How often its votes could not be understood."""
    decided_early: bool = False
    ended: WinMatrix | None = None
    """The first terminal snapshot, over what is shown."""
    segments: tuple[Segment, ...] = ()
    """What raters had marked by then, over the whole group."""
    lost: str | None = None
    """Why there will be no snapshot."""
    recorded: bool = False
    """The journal has its end already."""

    @property
    def over(self) -> bool:
        return self.ended is not None or self.lost is not None

    @property
    def closed(self) -> bool:
        """Nobody can vote on it any more, as far as we know."""
        return self.ended is not None or self.state is ItemState.FAILED


@dataclass(slots=True)
class Asked:
    """A group that people vote on, by one item; by more where it was asked about again or a service made two."""

    group: Group
    shown: Shown
    since: float
    waited_s: float
    """How long earlier processes had waited."""
    items: list[Item] = field(default_factory=list)
    asks: int = 1
    buying: bool = False
    """An item is on its way."""

    @property
    def over(self) -> bool:
        return not self.buying and all(item.over for item in self.items)

    def votes(self) -> WinMatrix:
        """Of all items that ended."""
        return WinMatrix(sum((i.ended.wins for i in self.items if i.ended is not None), self.shown.none().wins))

    def segments(self) -> tuple[tuple[int, int, int, bool], ...]:
        """Marks of all items, as the journal has them."""
        return as_rows(segment for item in self.items for segment in item.segments)

    def names(self) -> str:
        """Ids of the items whose votes are in `votes`; of all where there are none."""
        return "+".join([i.item_id for i in self.items if i.ended is not None] or [i.item_id for i in self.items])


def as_rows(segments: Iterable[Segment]) -> tuple[tuple[int, int, int, bool], ...]:
    """Marks as the journal has them."""
    return tuple((s.completion, s.start, s.end, s.good) for s in segments)
