"""Starting over leaves groups behind that people still vote on: their items are ended, because votes cost money."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rlhf_cli.errors import FlowRefused
from rlhf_cli.feedback.items import Shown
from rlhf_cli.flow.base import BadAnswer, Flow, ItemState
from rlhf_cli.journal.events import Event, GroupSetAside, ItemEnded, ItemStopped
from rlhf_cli.journal.replay import GroupState

AT_ONCE = 8
REASON = "started over with --fresh"


async def abandon(flow: Flow, flow_id: str, groups: Sequence[GroupState], journal: Callable[[Event], object]) -> int:
    """End the items of `groups`, keep what was voted as paid, set the groups aside. Returns how many items ended.

    Raises:
        FlowUnavailable, CredentialsError: Some items may go on until their time is over.
    """
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one(group: GroupState) -> int:
        async with at_once:
            stopped = 0
            for item_id in await _items(flow, flow_id, group):
                stopped += await _end(flow, group, item_id, journal)
            journal(GroupSetAside(group_id=group.sampled.group_id, reason=REASON))
            return stopped

    counts = await asyncio.gather(*map(one, groups), return_exceptions=True)
    for count in counts:
        if isinstance(count, BaseException):
            raise count
    return sum(count for count in counts if isinstance(count, int))


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


async def _end(flow: Flow, group: GroupState, item_id: str, journal: Callable[[Event], object]) -> bool:
    group_id = group.sampled.group_id
    shown = Shown.of(group_id, [c.text for c in group.sampled.completions])
    try:
        await flow.stop(item_id)
    except FlowRefused:
        return False  # over already, or forgotten
    journal(ItemStopped(group_id=group_id, item_id=item_id, reason=REASON))
    try:
        wins = await flow.vote_matrix(item_id, shown.texts)
    except BadAnswer:
        wins = None
    if wins is not None and wins.votes:
        state = str(ItemState.STOPPED)
        journal(ItemEnded(group_id=group_id, item_id=item_id, state=state, votes=wins.votes, wins=shown.rows(wins)))
    return True
