"""The nouns that every part of `rlhf` shares. Nothing here knows torch, HTTP or files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a completion answers: a conversation that ends with the user's turn."""

    id: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """What a rater reads above the completions: the last user turn."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer and what the models thought of it at the moment it was sampled.

    `logps` and `ref_logps` are natural-log probabilities of each token of `token_ids` under the policy that sampled it
    and under the frozen reference; `ended` is False where the token limit cut the answer off.
    """

    text: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    ref_logps: tuple[float, ...]
    ended: bool
    role: str = ""
    """The name of the role that sampled it; empty where a recipe names none."""
    start_logp: float | None = None
    """Of the whole completion under the model that training started from; None where that is the reference."""

    @property
    def kl_nats(self) -> float:
        """How much likelier the policy makes it than the model that training started from: one sample of their KL."""
        return sum(self.logps) - (sum(self.ref_logps) if self.start_logp is None else self.start_logp)


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one prompt, sampled together by the policy as it was after `policy_step` steps.

    `index` counts the groups of a run from 0; the prompt and the random numbers of a group follow from it alone.
    """

    id: str
    index: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    policy_step: int


class WinMatrix:
    """Votes within one group: `wins[i, j]` votes preferred completion i over j, a tie is half a vote each way.

    Raises:
        ValueError: Not square, negative, not finite, or votes of a completion against itself.
    """

    __slots__ = ("wins",)

    def __init__(self, wins: object) -> None:
        array = np.array(wins, dtype=np.float64)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ValueError(f"a win matrix is square, this one has shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("a win matrix holds finite counts, this one has NaN or infinity")
        if (array < 0).any():
            raise ValueError("a win matrix holds counts of votes, this one has a negative entry")
        if np.diagonal(array).any():
            raise ValueError("a completion cannot win against itself: the diagonal must be 0")
        array.setflags(write=False)
        self.wins = array

    @property
    def size(self) -> int:
        return int(self.wins.shape[0])

    @property
    def votes(self) -> float:
        """The number of votes; fractional where a service weights them."""
        return float(self.wins.sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WinMatrix) and np.array_equal(self.wins, other.wins)

    def __hash__(self) -> int:
        return hash(self.wins.tobytes())

    def __repr__(self) -> str:
        return f"WinMatrix({self.wins.tolist()})"


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of a completion that a rater marked: characters `start` (included) to `end` (excluded) of its text."""

    completion: int
    start: int
    end: int
    good: bool


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """A group with the votes that came back for it and where they came from."""

    group: Group
    wins: WinMatrix
    source: str
    """Provenance: `item:<id>` for people, `reward_model:<version>` and so on for the others."""
    latency_s: float
    """Seconds from asking to the answer."""
    complete: bool
    """False where the time to live ended below the minimum number of votes."""
    scores: tuple[float, ...] | None = None
    """One per completion, where the source gives scores of its own, NaN for one that it gave none. Else they follow
    from the ranking of the votes."""
    segments: tuple[Segment, ...] = ()
    """What raters marked."""

    @property
    def votes_paid(self) -> float:
        """Votes that people gave; 0 where a model answered in their place."""
        return self.wins.votes if self.source.startswith("item:") else 0.0


@dataclass(frozen=True, slots=True)
class Unranked:
    """A group that will never be trained on, and why; written to the journal, never turned into a number."""

    group: Group
    reason: str


class Feedback(Protocol):
    """Who compares the completions of a group. Nothing here ever blocks the caller."""

    def submit(self, group: Group) -> None:
        """Ask for votes on `group`; the group is already in the journal."""

    def collect(self) -> list[RankedGroup | Unranked]:
        """Return what was decided since the last call, in the order it was decided.

        Raises:
            RlhfError: What ended the asking for good (credentials, service gone past the retry deadline).
        """

    def status(self) -> dict[str, float]:
        """Metrics of the asking as it stands: `flow/in_flight`, `flow/votes_total`, `flow/latency_p50_s`, ..."""
