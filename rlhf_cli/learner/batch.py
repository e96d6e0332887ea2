"""What a learner is given, whatever its algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.types import RankedGroup


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from, and how strongly the policy is held to the reference while it does."""

    groups: Sequence[RankedGroup]
    beta: float
