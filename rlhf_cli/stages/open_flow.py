"""`rlhf open-flow`: make the flow that people vote in, or find the one that is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.flow.base import FlowSpec
from rlhf_cli.journal.events import FlowOpened
from rlhf_cli.journal.observe import Observer
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.stages.service import Connect, flow_service, flow_spec
from rlhf_cli.stages.session import Result, open_session


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Open the recipe's flow at its service; a flow that asks the same already is adopted, unless `fresh`."""
    section = loaded.recipe.flow
    if section is None:
        raise UsageError(f"{loaded.path} has no section `flow`; there is nothing to do for `rlhf open-flow`")
    with open_session("open-flow", loaded, path, observers) as session:
        if not fresh and (done := session.done(session.run.path)):
            return done
        session.start()
        spec = flow_spec(loaded.recipe)
        with flow_service(loaded.recipe, session.run) as connect:
            flow_id, adopted = asyncio.run(open_or_adopt(connect, spec, fresh))
        session.journal.append(
            FlowOpened(
                flow_id=flow_id,
                service=section.service,
                fingerprint=spec.fingerprint(),
                instruction=spec.instruction,
                min_votes=spec.responses.min,
                desired_votes=spec.responses.desired,
                max_votes=spec.responses.max,
                ttl_s=spec.ttl_s,
            )
        )
        return session.finish({"flow_id": flow_id, "service": section.service, "adopted": str(adopted).lower()})


async def open_or_adopt(connect: Connect, spec: FlowSpec, fresh: bool = False) -> tuple[str, bool]:
    """The id of the flow for `spec`, and whether it was there already."""
    flow = connect()
    try:
        if not fresh and (found := await flow.find_flow(spec)):
            return found, True
        return await flow.open_flow(spec), False
    finally:
        await flow.close()
