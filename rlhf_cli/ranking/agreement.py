"""How far raters agree, with each other, with gold pairs and with the model, and who seems not to look.

Everything here is shown to the owner of the votes; nothing here weighs or drops a vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_cli.ranking.bradley_terry import TAU, Floats, difference_spread, fit

REACTION_S = 0.3
WORDS_PER_S = 12.0
"""Three times the pace of silent reading (about 4 words a second, Brysbaert 2019): skimming, not reading."""


class PairAgreement(NamedTuple):
    """How often two raters of the same pair gave the same answer, and how often the ranking says they would."""

    observed: float
    expected: float
    pairs: int
    """Pairs with two votes or more."""


class Share(NamedTuple):
    """So many out of so many."""

    part: int
    total: int

    @property
    def value(self) -> float | None:
        """None, not 0, where there is nothing to count."""
        return self.part / self.total if self.total else None


class SideBias(NamedTuple):
    """How often a rater preferred what was shown on the left."""

    left: Share
    p_value: float
    """How likely a rater without a favourite side is to be at least this one-sided."""


class PairVote(NamedTuple):
    """One vote that is not a tie: in group `group`, a rater preferred completion `winner` over `loser`."""

    rater: str
    group: int
    winner: int
    loser: int


def krippendorff_alpha(answers_by_unit: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal answers: 1 is agreement, 0 is chance, below 0 is disagreement.

    With near-equal completions a low value is what to expect; `pair_agreement` says how low.

    Args:
        answers_by_unit: The answers to each question, one per rater. Here a question is a pair of completions, and an
            answer says which of the two, whatever side it was shown on, or a tie.

    Returns:
        None where alpha is undefined: no question has two answers, or all those answers are the same.

    Source: Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", case of nominal data and missing answers.
    """
    counts_by_unit = [Counter(answers) for answers in answers_by_unit if len(answers) > 1]
    totals: Counter[Hashable] = Counter()
    disagreeing = 0.0
    for counts in counts_by_unit:
        size = counts.total()
        totals.update(counts)
        disagreeing += (size**2 - sum(count**2 for count in counts.values())) / (size - 1)
    answers = totals.total()
    by_chance = answers**2 - sum(count**2 for count in totals.values())
    if by_chance == 0:
        return None
    return 1 - (answers - 1) * disagreeing / by_chance


def pair_agreement(wins_BGG: Floats, tau: float = TAU) -> PairAgreement | None:
    """The chance that two votes on the same pair agree, as counted and as Bradley-Terry expects it.

    Close to each other they say that the raters differ by chance and by nothing else. They do not tell careless raters
    from near-equal completions: both bring the scores together, and with them the expected agreement.

    Args:
        wins_BGG: Whole votes, ties left out, shape (B, G, G).
        tau: Prior standard deviation of a score in logits.

    Returns:
        The mean over pairs, each counting by its votes beyond the first; None where no pair has two votes.
    """
    i_P, j_P = np.triu_indices(wins_BGG.shape[-1], 1)
    won_BP, lost_BP = wins_BGG[:, i_P, j_P], wins_BGG[:, j_P, i_P]
    votes_BP = won_BP + lost_BP
    twice_BP = votes_BP > 1
    if not twice_BP.any():
        return None
    scores_BG, covariance_BGG = fit(wins_BGG, tau)
    # p^2 + q^2 = (1 + tanh^2(d / 2)) / 2, averaged over the posterior of d rather than taken at its middle.
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    spread_BP = difference_spread(covariance_BGG)[:, i_P, j_P]
    ahead_BPN = (scores_BG[:, i_P] - scores_BG[:, j_P])[..., None] + spread_BP[..., None] * nodes
    expected_BP = 0.5 + 0.5 * np.tanh(ahead_BPN / 2) ** 2 @ (weights / weights.sum())

    votes_P, won_P, lost_P = votes_BP[twice_BP], won_BP[twice_BP], lost_BP[twice_BP]
    observed_P = (won_P * (won_P - 1) + lost_P * (lost_P - 1)) / (votes_P * (votes_P - 1))
    observed, expected = (np.average(x_P, weights=votes_P - 1) for x_P in (observed_P, expected_BP[twice_BP]))
    return PairAgreement(float(observed), float(expected), len(votes_P))


def gold_accuracy(answers: Iterable[tuple[str, bool]]) -> dict[str, Share]:
    """How many of the gold pairs each rater got right; `answers` are rater and whether the answer was the known one.

    Ten gold pairs, three quarters right, separate people who look from people who click.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for rater, is_right in answers:
        total[rater] += 1
        right[rater] += is_right
    return {rater: Share(right[rater], total[rater]) for rater in total}


def side_bias(left: int, right: int) -> SideBias:
    """Does a rater favour a side? Answers for the left and for the right go in, ties are left out.

    Among many raters some small probabilities are due: at 40 raters, worry below about 0.001.

    Raises:
        ValueError: A count is negative.

    Source: the two-sided exact binomial test at 1/2.
    """
    if left < 0 or right < 0:
        raise ValueError(f"votes are counted from 0, not {left} and {right}")
    votes, fewer = left + right, min(left, right)
    term, tail = 1, 0
    for k in range(fewer + 1):
        tail += term
        term = term * (votes - k) // (k + 1)
    return SideBias(Share(left, votes), min(1.0, 2 * tail / 2**votes))


def response_floor_s(words: int) -> float:
    """Seconds in which nobody can skim `words` new words and press a key; one fast answer alone proves nothing."""
    return REACTION_S + words / WORDS_PER_S


def rater_reliability(votes: Sequence[PairVote], tau: float = TAU, rounds: int = 50) -> dict[str, float]:
    """How far each rater's votes follow the common ranking (1), rather than nothing (0.5) or its reverse (0).

    A number to look at, never a weight: as a weight it gained next to nothing where ten gold pairs a rater gained a
    lot, and who differs from the others is not always wrong. Everybody begins with five votes' worth of 0.8.

    Source: expectation-maximisation for the one-coin rater of Dawid and Skene (1979), with pairwise scores as in
    Chen et al. (2013), "Pairwise Ranking Aggregation in a Crowdsourced Setting".
    """
    if not votes:
        return {}
    raters, rater_V = np.unique([vote.rater for vote in votes], return_inverse=True)
    groups, group_V = np.unique([vote.group for vote in votes], return_inverse=True)
    winner_V, loser_V = np.array([vote.winner for vote in votes]), np.array([vote.loser for vote in votes])
    size = int(max(winner_V.max(), loser_V.max())) + 1
    cast_R = np.bincount(rater_V)
    reliability_R = np.full(len(raters), 0.8)
    sincere_V = reliability_R[rater_V]
    for _ in range(rounds):
        wins_BGG = np.zeros((len(groups), size, size))
        np.add.at(wins_BGG, (group_V, winner_V, loser_V), sincere_V)
        np.add.at(wins_BGG, (group_V, loser_V, winner_V), 1 - sincere_V)
        scores_BG, _ = fit(wins_BGG, tau)
        p_V = 1 / (1 + np.exp(scores_BG[group_V, loser_V] - scores_BG[group_V, winner_V]))
        r_V = reliability_R[rater_V]
        sincere_V = r_V * p_V / (r_V * p_V + (1 - r_V) * (1 - p_V))
        reliability_R = (4 + np.bincount(rater_V, sincere_V)) / (5 + cast_R)
    return dict(zip(raters.tolist(), reliability_R.tolist(), strict=True))
