"""Simulated raters. They vote over HTTP like everybody else and see what a person sees: prompt, left, right.

A rater prefers left with probability logistic(skill * sharpness * (taste of left - taste of right) + position bias), so
votes follow Bradley-Terry on the taste, with disagreement, habit and absence as people have them.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import httpx
import numpy as np

from rlhf_cli.flow import wire
from rlhf_cli.flow.http import LOOPBACK
from rlhf_cli.server.tastes import Taste, taste

TIE_BELOW = 0.05
"""Differences in taste that nobody can see."""
MOST_SPANS = 24
"""How finely a rater looks at an answer to mark something."""
RETRY_S = 0.5
IDLE_S = (0.1, 0.5)
"""How often the crowd asks for work when there is none, at first and in the end."""


@dataclass(frozen=True, slots=True)
class CrowdSettings:
    """A population of raters.

    `agreement` is the probability that two raters agree on a pair whose taste difference is drawn from a standard
    normal distribution; completions that differ more (less) in taste are agreed on more (less) often. `position_bias`
    is an extra logit for the left side, `dropout` the probability that a pair is taken and never answered, `skill_sd`
    the spread of the log of a rater's skill. A share `spammers` of the raters does not read: half of them answer at
    random, half of them always left, all ten times as fast as the others. A share `marks` of the votes comes with marks
    in the answers, where the flow asks for them.
    """

    raters: int = 40
    taste: str = "kind"
    latency_p50_s: float = 2.0
    latency_p95_s: float = 8.0
    agreement: float = 0.72
    position_bias: float = 0.0
    dropout: float = 0.02
    skill_sd: float = 0.25
    spammers: float = 0.0
    marks: float = 0.0

    @property
    def patience_s(self) -> float:
        """A lease that hardly any of these raters outlasts: past it, the pair is better given to somebody else."""
        return min(90.0, max(1.0, 4 * self.latency_p95_s))


def sharpness(agreement: float) -> float:
    """Logits per unit of taste at which two raters agree on a pair with a standard normal difference this often.

    Two raters agree with probability E[p^2 + (1 - p)^2], p = logistic(k d), d ~ N(0, 1); this is solved for k. At 0.5
    every vote is a coin flip; at 1 no vote is ever wrong, which is taken as k = 100.
    """
    d, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = weight / weight.sum()
    low, high = 0.0, 100.0
    for _ in range(50):
        k = (low + high) / 2
        p = 0.5 + 0.5 * np.tanh(0.5 * k * d)
        low, high = (k, high) if float(weight @ (p**2 + (1 - p) ** 2)) < agreement else (low, k)
    return high


class Rater:
    """One simulated person: a skill, a pace and habits. Decides; does not know HTTP.

    Args:
        likes: A taste; by default the built-in one that the settings name.
        spams: Votes without reading: "random", or "left" whatever is there.
    """

    def __init__(
        self,
        settings: CrowdSettings,
        seed: str,
        likes: Taste | None = None,
        spams: Literal["random", "left"] | None = None,
    ) -> None:
        self._rng = random.Random(seed)
        self._settings = settings
        self._taste = likes or taste(settings.taste)
        self._spams = spams
        self._logits_per_taste = sharpness(settings.agreement) * self._rng.lognormvariate(0, settings.skill_sd)

    def outcome(self, prompt: str, left: str, right: str) -> wire.Outcome:
        if self._spams is not None:
            return "left" if self._spams == "left" or self._rng.random() < 0.5 else "right"
        difference = self._taste(prompt, left) - self._taste(prompt, right)
        if abs(difference) < TIE_BELOW:
            return "tie"
        logit = self._logits_per_taste * difference + self._settings.position_bias
        return "left" if self._rng.random() < 0.5 + 0.5 * math.tanh(0.5 * logit) else "right"

    def segments(self, prompt: str, left: str, right: str) -> list[wire.CastSegment]:
        """What this rater marks, if anything: the words of each answer that its taste is best and worst served by."""
        if self._spams is not None or self._rng.random() >= self._settings.marks:
            return []
        sides: tuple[tuple[Literal["left", "right"], str], ...] = (("left", left), ("right", right))
        return [segment for side, text in sides for segment in self._marked(prompt, side, text)]

    def _marked(self, prompt: str, side: Literal["left", "right"], text: str) -> list[wire.CastSegment]:
        words = [match.span() for match in re.finditer(r"\S+", text)]
        if len(words) < 2:
            return []
        step = -(-len(words) // MOST_SPANS)
        spans = [(words[i][0], words[min(i + step, len(words)) - 1][1]) for i in range(0, len(words), step)]
        whole = self._taste(prompt, text)
        gains = [(whole - self._taste(prompt, f"{text[:start]}{text[end:]}"), start, end) for start, end in spans]
        found = [(max(gains), True), (min(gains), False)]
        return [
            wire.CastSegment(side=side, start=start, end=end, good=good)
            for (gain, start, end), good in found
            if (gain if good else -gain) >= TIE_BELOW
        ]

    def latency_s(self) -> float:
        """Seconds until an answer: lognormal, by its median and its 95th percentile."""
        spread = math.log(max(1.0, self._settings.latency_p95_s / self._settings.latency_p50_s)) / 1.6449
        pace = 0.1 if self._spams else 1.0
        return pace * self._settings.latency_p50_s * math.exp(self._rng.gauss(0, spread))

    def drops_out(self) -> bool:
        return self._rng.random() < self._settings.dropout


def simulated_raters(url: str, owner_secret: str, count: int, population: str) -> list[str]:
    """Secrets of simulated raters, made by the server at `url` for its owner.

    Raises:
        httpx.HTTPError: It cannot be reached, or refuses.
    """
    with httpx.Client(trust_env=httpx.URL(url).host not in LOOPBACK, timeout=30) as http:
        reply = http.post(
            f"{url.rstrip('/')}/owner/simulated-raters",
            json={"count": count, "population": population},
            headers={"Authorization": f"Bearer {owner_secret}"},
        )
        reply.raise_for_status()
        return [rater["secret"] for rater in reply.json()["raters"]]


class Crowd:
    """Raters voting on a server, one token each, until `run` is cancelled.

    Args:
        url: Of the server.
        tokens: Bearer tokens of role rater, one per person.
        seed: Of their decisions; which pairs they get is up to the server.
        likes: Their taste; by default the built-in one that the settings name.
    """

    def __init__(
        self,
        url: str,
        tokens: Sequence[str],
        settings: CrowdSettings,
        seed: int,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        likes: Taste | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._likes = likes
        self._verify = verify
        self.votes = 0
        """Votes that counted."""
        self._url = url
        self._tokens = tokens
        self._settings = settings
        self._seed = seed
        self._transport = transport
        self._nothing_open = 0
        """Answers in a row that said there is nothing to vote on."""
        self._door = asyncio.Lock()

    async def run(self) -> None:
        connections = httpx.Limits(max_connections=8, max_keepalive_connections=8, keepalive_expiry=60)
        async with (
            httpx.AsyncClient(
                base_url=self._url,
                transport=self._transport,
                limits=connections,
                timeout=30,
                verify=self._verify,
                trust_env=httpx.URL(self._url).host not in LOOPBACK,
            ) as http,
            asyncio.TaskGroup() as people,
        ):
            for number, token in enumerate(self._tokens):
                rater = Rater(self._settings, f"{self._seed}/{number}", self._likes, self._spams(number))
                people.create_task(self._vote(http, rater, {"Authorization": f"Bearer {token}"}))

    def _spams(self, number: int) -> Literal["random", "left"] | None:
        """The last raters are the spammers, so that more of them leave the others as they are."""
        place = len(self._tokens) - 1 - number
        return None if place >= round(self._settings.spammers * len(self._tokens)) else ("random", "left")[place % 2]

    async def _vote(self, http: httpx.AsyncClient, rater: Rater, headers: dict[str, str]) -> None:
        while True:
            pair = await self._next_pair(http, headers)
            latency_s = rater.latency_s()
            await asyncio.sleep(latency_s)
            if rater.drops_out():
                continue
            outcome = rater.outcome(pair.prompt, pair.left, pair.right)
            vote: dict[str, object] = {"outcome": outcome, "response_ms": round(1000 * latency_s)}
            if pair.segments:
                segments = rater.segments(pair.prompt, pair.left, pair.right)
                vote["segments"] = [segment.model_dump() for segment in segments]
            reply = await _post(http, f"/vote/{pair.lease}", headers, vote)
            if reply.status_code not in (409, 410):  # answered before a lost reply; or somebody was faster
                reply.raise_for_status()
            self.votes += reply.status_code == 204

    async def _next_pair(self, http: httpx.AsyncClient, headers: dict[str, str]) -> wire.Lease:
        """Wait for a pair. One rater at a time asks, so that a crowd with nothing to do costs next to nothing."""
        while True:
            async with self._door:
                reply = await _post(http, "/vote/lease", headers)
                if reply.status_code == 200:
                    self._nothing_open = 0
                    return wire.Lease.model_validate_json(reply.content)
                reply.raise_for_status()
                self._nothing_open += 1
                idle_rounds = self._nothing_open - len(self._tokens)
                if idle_rounds >= 0:  # everybody has asked in vain
                    await asyncio.sleep(min(IDLE_S[1], IDLE_S[0] * 1.1**idle_rounds))


async def _post(
    http: httpx.AsyncClient, path: str, headers: dict[str, str], body: dict[str, object] | None = None
) -> httpx.Response:
    """Send until there is an answer: people do not leave for good because a server is slow or restarting."""
    while True:
        try:
            reply = await http.post(path, json=body, headers=headers)
        except httpx.TransportError:
            await asyncio.sleep(RETRY_S)
            continue
        if reply.status_code not in (429, 503):
            return reply
        await asyncio.sleep(RETRY_S)
