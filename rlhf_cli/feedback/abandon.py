"""Starting over leaves groups behind that people still vote on: their items are ended, because votes cost money."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from rlhf_cli.errors import FlowRefused
from rlhf_cli.feedback.items import Shown
from rlhf_cli.flow.base import Flow, ItemState
from rlhf_cli.journal.events import Event, GroupSetAside, ItemEnded, ItemStopped
from rlhf_cli.journal.replay import GroupState

Got = TypeVar("Got")

AT_ONCE = 8
REASON = "started over with --fresh"
SHOWN_AFTER_S = (0.0, 1.0, 2.0, 4.0)
"""Pauses before looks for the votes of an item that was ended: a service may need a moment to end it."""


async def abandon(
    flow: Flow, flow_id: str, groups: Sequence[GroupState], journal: Callable[[Event], object], reason: str = REASON
) -> int:
    """End the items of `groups`, keep what was voted as paid, set the groups aside. Returns how many items ended.

    Raises:
        FlowUnavailable, CredentialsError: Some items may go on until their time is over.
    """
    at_once, stopped = asyncio.Semaphore(AT_ONCE), list[str]()

    async def end(group: GroupState) -> list[str]:
        async with at_once:
            item_ids = await _items(flow, flow_id, group)
            for item_id in item_ids:
                with suppress(FlowRefused):  # over already, or forgotten
                    await flow.stop(item_id)
                    journal(ItemStopped(group_id=group.sampled.group_id, item_id=item_id, reason=reason))
                    stopped.append(item_id)
            return item_ids

    async def keep(group: GroupState, item_ids: Sequence[str]) -> None:
        await _all(_keep(flow, group, item_id, journal) for item_id in item_ids)
        journal(GroupSetAside(group_id=group.sampled.group_id, reason=reason))

    # All of them first: while one waits for its votes, the others would cost more.
    await _all(map(keep, groups, await _all(map(end, groups))))
    return len(stopped)


async def _all(work: Iterable[Awaitable[Got]]) -> list[Got]:
    """Wait for all of it, also where some fails, so that as much as can be is ended; then the first error."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return [result for result in done if not isinstance(result, BaseException)]


async def _items(flow: Flow, flow_id: str, group: GroupState) -> list[str]:
    """Items of a group that may still be open, one that was made without our hearing of it too."""
    ended = {event.item_id for event in group.ended}
    item_ids = [item_id for double in group.doubles for item_id in double.item_ids]
    for ask in group.asks:
        if ask.item_id is not None:
            item_ids.append(ask.item_id)
        elif ask.dataset_id is not None and (found := await flow.find_item(flow_id, ask.dataset_id)):
            item_ids.append(found.item_id)
    return [item_id for item_id in dict.fromkeys(item_ids) if item_id not in ended]


async def _keep(flow: Flow, group: GroupState, item_id: str, journal: Callable[[Event], object]) -> None:
    """Record the votes on an item, of one that was over already too."""
    group_id = group.sampled.group_id
    shown = Shown.of(group_id, [c.text for c in group.sampled.completions])
    for pause_s in SHOWN_AFTER_S:
        await asyncio.sleep(pause_s)
        try:
            wins = await flow.vote_matrix(item_id, shown.texts)
        except FlowRefused:
            return  # unreadable or forgotten: there is nothing that could be kept
        if wins is not None:
            if wins.votes:
                state, rows = str(ItemState.STOPPED), shown.rows(wins)
                journal(ItemEnded(group_id=group_id, item_id=item_id, state=state, votes=wins.votes, wins=rows))
            return
