"""What becomes of a recipe's numbers at a service, said before anything is paid for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.errors import FlowRefused
from rlhf_cli.flow.base import Capabilities, FlowSpec


@dataclass(frozen=True, slots=True)
class Mapped:
    """One number of the recipe: what was asked for, what the service is told, and what comes of it."""

    key: str
    asked: str
    sent: str
    note: str


def mapping(
    service: str,
    capabilities: Capabilities,
    spec: FlowSpec,
    group_size: int,
    stop_when_decided: float | None = None,
) -> tuple[Mapped, ...]:
    """What `service` makes of the thresholds of `spec`, of groups of `group_size` completions and of an early stop.

    Raises:
        FlowRefused: The service would refuse a number, or what it did would not be what the recipe says.
    """
    problems = _problems(capabilities, spec, group_size, stop_when_decided)
    if problems:
        raise FlowRefused("\n".join(f"{service}: {problem}" for problem in problems))
    return (
        *_responses(capabilities, spec),
        _time(capabilities, spec),
        _early(capabilities, stop_when_decided),
        _group(capabilities, group_size),
        _lost_answers(capabilities),
        *_segments(spec),
    )


def _problems(can: Capabilities, spec: FlowSpec, group_size: int, early: float | None) -> list[str]:
    problems = []
    if not can.ttl_min_s <= spec.ttl_s <= can.ttl_max_s:
        problems.append(f"flow.ttl_s is {spec.ttl_s:g}; an item may live for {_bounds(can)} here.")
    if can.max_candidates is not None and group_size > can.max_candidates:
        problems.append(f"groups have {group_size} completions; an item may have {can.max_candidates} here.")
    if group_size < 2:
        problems.append("groups have 1 completion; there is nothing to compare.")
    if early is not None and not can.live_votes:
        problems.append(
            "flow.stop_when_decided is set, and votes are not shown before an item has ended here; leave it out."
        )
    if spec.segments and not can.segments:
        problems.append("run_online.segments is set, and raters cannot mark anything here; leave it out.")
    return problems


def _responses(can: Capabilities, spec: FlowSpec) -> tuple[Mapped, ...]:
    asked = spec.responses
    least = Mapped(
        "responses.min",
        str(asked.min),
        f"minResponses {asked.min}",
        "below it at the end of its time an item is Incomplete; its votes are read all the same",
    )
    if can.desired:
        return (
            least,
            Mapped("responses.desired", str(asked.desired), f"serveResponses {asked.desired}", "an item ends here"),
            Mapped("responses.max", str(asked.max), f"maxResponses {asked.max}", "answers under way may bring so many"),
        )
    note = "as the maximum" if asked.desired == asked.max else "not known here: an item goes on to the maximum"
    ends = "an item ends here, or at the end of its time; most end by time"
    return (
        least,
        Mapped("responses.desired", str(asked.desired), "nothing", note),
        Mapped("responses.max", str(asked.max), f"maxResponses {asked.max}", ends),
    )


def _time(can: Capabilities, spec: FlowSpec) -> Mapped:
    fraction = spec.ttl_s != int(spec.ttl_s) and not can.idempotency
    ttl = math.ceil(spec.ttl_s) if fraction else spec.ttl_s
    note = f"{_bounds(can)} are possible" + ("; whole seconds only, rounded up" if fraction else "")
    return Mapped("ttl_s", f"{spec.ttl_s:g} s", f"timeToLiveInSeconds {ttl:g}", note)


def _early(can: Capabilities, early: float | None) -> Mapped:
    if not can.live_votes:
        return Mapped("stop_when_decided", "off", "nothing", "not possible: votes are shown only at the end")
    if early is None:
        return Mapped("stop_when_decided", "off", "nothing", "votes are shown as they come in; no item is ended early")
    return Mapped(
        "stop_when_decided", f"{early:g}", "stop", f"we end an item once its leader is best with probability {early:g}"
    )


def _group(can: Capabilities, group_size: int) -> Mapped:
    limit = "no limit is known" if can.max_candidates is None else f"at most {can.max_candidates}"
    return Mapped("group_size", str(group_size), f"{group_size} datapoints", f"{limit}; equal texts are shown once")


def _lost_answers(can: Capabilities) -> Mapped:
    if can.idempotency:
        return Mapped("creation", "once", "Idempotency-Key", "a repeated creation makes nothing new")
    note = "no keys here: after a lost answer we wait flow.settle_s and look in the list before asking again"
    return Mapped("creation", "once", "nothing", note)


def _segments(spec: FlowSpec) -> tuple[Mapped, ...]:
    note = "raters may mark spans of the texts; marks are read at an item's end"
    return (Mapped("segments", "marked", "markSegments true", note),) if spec.segments else ()


def _bounds(can: Capabilities) -> str:
    if math.isinf(can.ttl_max_s):
        return f"{can.ttl_min_s:g} s and more"
    return f"{can.ttl_min_s:g} to {can.ttl_max_s:g} s"
