"""One item per ask, never two, whatever dies and whenever.

Creating an item costs money, and a service may make one without its answer reaching us. Three facts are journalled on
the way, each before the next step, so a restart knows where to go on:

1. intended: nothing exists yet, but from here on it may.
2. dataset created: all candidates are at the service. Its id is the tag by which the item can be recognised.
3. submitted: the item's id.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_cli.flow.base import BadAnswer, EffectUnknown, Flow
from rlhf_cli.journal.events import DatasetCreated, Event, GroupIntended, GroupSubmitted
from rlhf_cli.journal.replay import Ask
from rlhf_cli.types import Group

CREATE_ATTEMPTS = 8
DATASET_ATTEMPTS = 8
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class Buyer:
    """Buys items for one run in one flow; `settle_s` is how long the service may take to list what it has made."""

    flow: Flow
    flow_id: str
    run_id: str
    ttl_s: float
    settle_s: float
    journal: Callable[[Event], object]

    async def item_of(self, group: Group, texts: Sequence[str], ask: Ask, number: int) -> tuple[str, str]:
        """Ids of dataset and item that ask about `group` for the `number`-th time: bought now, or found at the service.

        Args:
            texts: What people are shown of the group.
            ask: What the journal knows of this ask.
        """
        if ask.dataset_id is not None and ask.item_id is not None:
            return ask.dataset_id, ask.item_id
        key = ask.key
        if key is None:
            again = "" if number == 1 else f"/{number}"
            key = hashlib.sha256(f"{self.run_id}/{group.id}{again}".encode()).hexdigest()
            self.journal(GroupIntended(group_id=group.id, key=key))
        dataset_id = ask.dataset_id
        if dataset_id is None:
            dataset_id = await self._dataset(group, texts, key)
            self.journal(DatasetCreated(group_id=group.id, dataset_id=dataset_id))
        item_id = await self._one_item(group, dataset_id, key, doubt=ask.dataset_id is not None)
        self.journal(GroupSubmitted(group_id=group.id, dataset_id=dataset_id, item_id=item_id))
        return dataset_id, item_id

    async def _one_item(self, group: Group, dataset_id: str, key: str, *, doubt: bool) -> str:
        """Create the item of a dataset, unless it exists.

        It may exist whenever there is `doubt`: after a restart, or when the answer to a creation was lost. A service
        with idempotency keys sorts that out itself. With any other: wait until the item would show in the list, adopt
        it if it does, and create it only if it does not.
        """
        has_keys = (await self.flow.capabilities()).idempotency
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            if doubt and not has_keys:
                await asyncio.sleep(max(self.settle_s, _pause_s(attempt - 1)))
                if found := await self.flow.find_item(self.flow_id, dataset_id):
                    return found.item_id
            try:
                return await self.flow.create_item(self.flow_id, dataset_id, group.prompt.text, self.ttl_s, key)
            except (EffectUnknown, BadAnswer):
                if has_keys or attempt == CREATE_ATTEMPTS:
                    raise
                doubt = True
        raise AssertionError("unreachable")

    async def _dataset(self, group: Group, texts: Sequence[str], key: str) -> str:
        """A dataset with all candidates. It costs nothing, so one that may be half filled is left behind."""
        for attempt in range(1, DATASET_ATTEMPTS + 1):
            dataset_id = await self.flow.create_dataset(f"group {group.id} of run {self.run_id}", f"{key}-dataset")
            try:
                await self.flow.fill_dataset(dataset_id, texts)
                return dataset_id
            except (EffectUnknown, BadAnswer):
                if attempt == DATASET_ATTEMPTS:
                    raise
            await asyncio.sleep(_pause_s(attempt))
        raise AssertionError("unreachable")


def _pause_s(attempt: int) -> float:
    """After so many attempts that failed: the service may be down for creations and well otherwise."""
    return 0.0 if attempt == 0 else min(float(2 ** (attempt - 1)), LONGEST_PAUSE_S)
