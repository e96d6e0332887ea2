"""What a recipe asks people, what a service makes of it, and what an item costs: said before anything is paid."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rlhf_cli.flow.base import RAPIDATA, Capabilities, Flow, FlowSpec
from rlhf_cli.flow.mapping import mapping
from rlhf_cli.flow.wire import OURS
from rlhf_cli.journal.events import FlowOpened
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.service import flow_spec


def known_capabilities(service: str) -> Capabilities:
    """What `service` offers, as far as that is known without asking: an address is taken to be a server of ours."""
    return RAPIDATA if service == "rapidata" else OURS


def flow_facts(recipe: Recipe, capabilities: Capabilities | None = None) -> dict[str, Any]:
    """Thresholds, cost of an item, where to look, and what the service makes of the recipe's numbers; fit for JSON.

    Raises:
        FlowRefused: The service would refuse a number of the recipe.
    """
    section = recipe.flow
    assert section is not None
    facts: dict[str, Any] = {
        "instruction": section.instruction,
        "min_votes": section.responses.min,
        "desired_votes": section.responses.desired,
        "max_votes": section.responses.max,
        "ttl_s": section.ttl_s,
    }
    if section.service == "replay":
        return {**facts, "usd_per_item": {"desired": 0.0, "max": 0.0}, "links": {}, "mapping": []}
    capabilities = capabilities or known_capabilities(section.service)
    group_size = recipe.run_online.group_size if recipe.run_online else 2
    rows = mapping(section.service, capabilities, flow_spec(recipe), group_size, section.stop_when_decided)
    return {
        **facts,
        "usd_per_item": {
            "desired": usd(recipe, expected_votes(recipe, capabilities)),
            "max": usd(recipe, section.responses.max),
        },
        "links": links(section.service),
        "mapping": [asdict(row) for row in rows],
    }


def expected_votes(recipe: Recipe, capabilities: Capabilities) -> int:
    """Votes of an item that has time enough: a service that knows no desired number goes on to the maximum."""
    assert recipe.flow is not None
    responses = recipe.flow.responses
    return responses.desired if capabilities.desired else responses.max


def usd(recipe: Recipe, votes: float) -> float | None:
    """What so many votes cost; simulated and recorded ones nothing, and None where the recipe names no price."""
    price = recipe.budget.usd_per_1k_votes
    if recipe.flow is not None and recipe.flow.service in ("embedded", "replay"):
        return 0.0
    return votes * price / 1000 if price else None


def links(service: str) -> dict[str, str]:
    """Pages of a server of ours; the others have none that an id leads to."""
    return {"vote": f"{service}/vote", "owner": f"{service}/owner"} if service.startswith("http") else {}


async def find(flow: Flow, spec: FlowSpec, service: str, before: FlowOpened | None) -> str | None:
    """The flow that asks `spec`: the one of `before` where it still does, for its items are there; else the newest."""
    same = before is not None and (before.service, before.fingerprint) == (service, spec.fingerprint())
    if before is not None and same and await flow.asks(before.flow_id, spec):
        return before.flow_id
    return await flow.find_flow(spec)


def changes(before: FlowOpened, spec: FlowSpec, service: str) -> list[str]:
    """What the recipe asks otherwise than the flow that was opened before, in words."""
    pairs = {
        "service": (before.service, service),
        "instruction": (before.instruction, spec.instruction),
        "responses.min": (before.min_votes, spec.responses.min),
        "responses.desired": (before.desired_votes, spec.responses.desired),
        "responses.max": (before.max_votes, spec.responses.max),
        "ttl_s": (before.ttl_s, spec.ttl_s),
        "segments": (before.segments, spec.segments),
    }
    said = [f"{key} changed from {old!r} to {new!r}" for key, (old, new) in pairs.items() if old != new]
    if not said and before.fingerprint != spec.fingerprint():
        return [f"the recipe's name changed to {spec.name!r}"]
    return said


def reason(before: FlowOpened | None, spec: FlowSpec, service: str, found: str | None, *, new: bool) -> str:
    """Why a flow is opened, or why the one `found` is used."""
    there = "a flow that asks the same is at the service already"
    if new:
        return "a new one was asked for with --new"
    if before is None:
        return there if found else "none was opened for this run yet"
    if found == before.flow_id:
        return "it asks the same"
    if changed := "; ".join(changes(before, spec, service)):
        return f"{changed}; {there}" if found else changed
    gone = f"flow {before.flow_id} of this run is no longer at the service"
    return f"{gone}; {there}" if found else gone
