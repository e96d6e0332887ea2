"""`rlhf open-flow`: make the flow that people vote in, or find the one that is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import FlowRefused, UsageError
from rlhf_cli.flow.base import Capabilities, FlowSpec
from rlhf_cli.journal.events import FlowOpened
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.asking import find, flow_facts, reason
from rlhf_cli.stages.service import Connect, flow_service, flow_spec, recording_at
from rlhf_cli.stages.session import Result, Session, open_session


@dataclass(frozen=True, slots=True)
class AtService:
    """A flow there, and whether it was there before we came."""

    flow_id: str
    adopted: bool
    capabilities: Capabilities | None = None
    """None where nobody was asked."""
    refusal: str | None = None
    """Why people were not told that work is coming, at a service that offers that."""


def run(
    loaded: LoadedRecipe,
    path: Path,
    observers: Sequence[Observer] = (),
    *,
    resume: bool = False,
    fresh: bool = False,
    new: bool = False,
    ask: bool = True,
) -> Result:
    """Open the recipe's flow at its service; one that asks the same already is adopted, unless `new`.

    That the journal has it open is not enough, flows can be deleted: the service is asked, unless `ask` is False.
    """
    section = loaded.recipe.flow
    if section is None:
        raise UsageError(f"{loaded.path} has no section `flow`; there is nothing to do for `rlhf open-flow`")
    with open_session("open-flow", loaded, path, observers) as session:
        spec, before = flow_spec(loaded.recipe), session.state.flow
        if not ask and not fresh and (done := session.done(session.run.path)):
            return done
        if section.recording is not None:
            recorded = recording_at(section.recording, session.run).state
            flow = AtService(recorded.flow.flow_id if recorded.flow else "recorded", adopted=True)
            why = f"the votes of run {recorded.run_id} are given again"
            judge = loaded.recipe.eval.judge if loaded.recipe.eval else None
            if judge in ("crowd", "flow") and not RunDir(section.recording).eval_journal.exists():
                session.note(f"{section.recording} has no eval: `rlhf eval` will find no votes there")
        else:
            with flow_service(loaded.recipe, session.run) as connect:
                flow = asyncio.run(_open_or_adopt(connect, loaded.recipe, before, new=new))
            found = flow.flow_id if flow.adopted else None
            why = reason(before, spec, section.service, found, new=new)
        if flow.refusal is not None:
            session.note(f"preheating was refused: {flow.refusal}")
        said = {"why": why, **flow_facts(loaded.recipe, flow.capabilities)}
        known = flow.adopted and before is not None and before.flow_id == flow.flow_id
        if known and not fresh and (done := session.done(session.run.path)):
            return {**done, "adopted": True, **said}
        session.start()
        _record(session, spec, section.service, flow.flow_id)
        summary = {"flow_id": flow.flow_id, "service": section.service, "adopted": str(flow.adopted).lower()}
        return {**session.finish({**summary}), "adopted": flow.adopted, **said}


def _record(session: Session, spec: FlowSpec, service: str, flow_id: str) -> None:
    session.journal.append(
        FlowOpened(
            flow_id=flow_id,
            service=service,
            fingerprint=spec.fingerprint(),
            instruction=spec.instruction,
            min_votes=spec.responses.min,
            desired_votes=spec.responses.desired,
            max_votes=spec.responses.max,
            ttl_s=spec.ttl_s,
            segments=spec.segments,
        )
    )


async def open_or_adopt(connect: Connect, recipe: Recipe, before: FlowOpened | None) -> str:
    """The id of the recipe's flow: that of `before`, the newest that asks the same, or else a new one."""
    return (await _open_or_adopt(connect, recipe, before, new=False)).flow_id


async def _open_or_adopt(connect: Connect, recipe: Recipe, before: FlowOpened | None, *, new: bool) -> AtService:
    assert recipe.flow is not None
    spec = flow_spec(recipe)
    flow = connect()
    try:
        capabilities = await flow.capabilities()
        flow_facts(recipe, capabilities)  # refuses what the service would, before anything is made there
        found = None if new else await find(flow, spec, recipe.flow.service, before)
        flow_id = found or await flow.open_flow(spec)
        refusal = None
        try:
            await flow.preheat()
        except FlowRefused as error:
            refusal = str(error)
        return AtService(flow_id, found is not None, capabilities, refusal)
    finally:
        await flow.close()
