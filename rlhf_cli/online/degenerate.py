"""Groups that nobody could learn from, whoever compared them: found before anything is spent on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rlhf_cli.journal.events import GroupSetAside
from rlhf_cli.journal.replay import RunState
from rlhf_cli.types import Group

_MARK = "degenerate: "


def degenerate(group: Group, cut_off: Literal["use", "drop"]) -> str | None:
    """Why no comparison within `group` could say anything; None where one can.

    What raters are shown differs by its text alone, so completions of other tokens and the same text are equal too.

    Args:
        cut_off: Whether a group that the token limit cut off in every completion is to be used all the same.
    """
    texts = {completion.text.strip() for completion in group.completions}
    if texts == {""}:
        return f"{_MARK}all completions are empty"
    if len(texts) == 1:
        return f"{_MARK}all completions say the same"
    if cut_off == "drop" and not any(completion.ended for completion in group.completions):
        return f"{_MARK}the token limit cut off all completions"
    return None


def unasked(state: RunState) -> int:
    """How many groups of this attempt were set aside for that."""
    return sum((group.set_aside or "").startswith(_MARK) for group in state.groups.values())


def left_open(state: RunState, cut_off: Literal["use", "drop"]) -> Iterator[GroupSetAside]:
    """The verdicts that a process did not come to write down before it died; none where people were asked already."""
    for known in state.open_groups:
        why = degenerate(known.sampled.group(), cut_off)
        if why is not None and not known.asks:
            yield GroupSetAside(group_id=known.sampled.group_id, reason=why)
