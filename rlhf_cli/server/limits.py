"""How often somebody may ask: token buckets, by token and by address."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf_cli.server.problems import TooMany
from rlhf_cli.server.tokens import Role, Token

_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests a second in the long run, and how many at once after a rest."""

    per_s: float
    burst: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What one token of each role, and one address, may ask.

    Simulated raters are the owner's own machines and have no limit. Neither have addresses of this machine: a proxy in
    front of the server is one, and everybody would share it.
    """

    rater: Rate = field(default=Rate(20, 60))
    client: Rate = field(default=Rate(500, 2000))
    owner: Rate = field(default=Rate(100, 500))
    address: Rate = field(default=Rate(500, 1000))
    refused: Rate = field(default=Rate(1, 20))
    """Wrong secrets from one address, this machine's too."""


class Guard:
    """Counts requests; with `limits` None it lets everything pass.

    Every method raises:
        TooMany: Come back later.
    """

    def __init__(self, limits: Limits | None, clock: Callable[[], float]) -> None:
        self._limits = limits
        if limits is not None:
            self._addresses = Buckets(limits.address, clock)
            self._refused = Buckets(limits.refused, clock)
            self._tokens: dict[Role, Buckets] = {
                "rater": Buckets(limits.rater, clock),
                "client": Buckets(limits.client, clock),
                "owner": Buckets(limits.owner, clock),
            }

    def address(self, address: str) -> None:
        """A request from there."""
        if self._limits is not None and address not in ("127.0.0.1", "::1"):
            self._addresses.take(address)

    def token(self, token: Token) -> None:
        """A request with this token; those issued to one client count together."""
        if self._limits is not None and not token.simulated:
            self._tokens[token.role].take(token.parent or token.id)

    def refused(self, address: str) -> None:
        """A secret from there that was wrong."""
        if self._limits is not None:
            self._refused.take(address)


class Buckets:
    """One bucket per key, full at first; `clock` gives seconds that never jump."""

    def __init__(self, rate: Rate, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Take one.

        Raises:
            TooMany: The bucket of this key is empty.
        """
        now, rate = self._clock(), self._rate
        level, since = self._levels.get(key, (rate.burst, now))
        level = min(rate.burst, level + (now - since) * rate.per_s)
        if level < 1:
            raise TooMany(math.ceil((1 - level) / rate.per_s))
        if len(self._levels) >= _KEPT:
            self._levels = {
                other: (left, at)
                for other, (left, at) in self._levels.items()
                if left + (now - at) * rate.per_s < rate.burst
            }
        self._levels[key] = (level - 1, now)
