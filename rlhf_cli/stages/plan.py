"""`rlhf plan`: what a recipe will ask, cost and be able to show, before anything is spent. No torch, no network."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sized
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_cli.errors import CredentialsError, FlowUnavailable
from rlhf_cli.flow.base import FlowSpec
from rlhf_cli.journal.events import FlowOpened
from rlhf_cli.journal.journal import read
from rlhf_cli.journal.replay import RunState, replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.ranking.intervals import detectable_win_rate
from rlhf_cli.recipe.data import Dataset, Heldout, parts_of, read_conversations, read_prompts, read_votes
from rlhf_cli.recipe.fingerprint import Stage, stage_fingerprint
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.online import RunOnline, Selection
from rlhf_cli.recipe.schema import Crowd, Recipe
from rlhf_cli.server.store import Store
from rlhf_cli.stages.asking import changes, expected_votes, find, flow_facts, known_capabilities, reason, usd
from rlhf_cli.stages.service import flow_service, flow_spec

NORMAL_95 = 1.6449
"""Standard normal quantile: between the median and the 95th percentile of a lognormal lie so many deviations."""


def plan(loaded: LoadedRecipe, path: Path) -> dict[str, Any]:
    """The plan as one JSON document; figures that cannot be known are None or left out, and a note says so.

    Raises:
        FlowRefused: The service would refuse a number of the recipe.
    """
    recipe, state = loaded.recipe, replay(read(RunDir(path).journal))
    document: dict[str, Any] = {
        "name": recipe.name,
        "run_dir": str(path),
        "stages": _stages(loaded, state),
        "data": _data(recipe),
    }
    notes: list[str] = []
    if recipe.flow is not None:
        document["flow"] = {
            "service": recipe.flow.service,
            "would": would(recipe, state),
            **flow_facts(recipe),
        }
    asks_online = recipe.run_online is not None and recipe.run_online.asks_people
    asks_eval = recipe.eval is not None and recipe.eval.judge in ("crowd", "flow")
    if recipe.run_online is not None:
        groups = recipe.run_online.steps * recipe.run_online.prompts_per_step
        again = recipe.run_online.incomplete == "resubmit_once"
        document["run_online"] = {
            "steps": recipe.run_online.steps,
            "groups": groups,
            "completions": groups * recipe.run_online.group_size,
            "sampled": groups
            * sum(r.best_of for r in recipe.run_online.sampling.of_group(recipe.run_online.group_size)),
            "rounds_of_prompts": groups / document["data"]["prompts"],
            **(_votes(recipe, _for_people(recipe.run_online, groups), again) if asks_online else {}),
            **(_judge(recipe, groups, recipe.run_online.group_size) if recipe.run_online.feedback == "judge" else {}),
        }
    if recipe.eval is not None:
        prompts = document["data"]["heldout_prompts"]
        pairs = prompts * recipe.eval.answers_per_prompt
        document["eval"] = {
            "prompts": prompts,
            "pairs": pairs,
            **(_votes(recipe, pairs) if asks_eval else {}),
            **(_judge(recipe, pairs, 2) if recipe.eval.judge == "judge" else {}),
        }
        each = document["eval"].get("votes", {}).get("expected", pairs) / pairs * recipe.eval.answers_per_prompt
        document["eval"]["detectable_win_rate"] = {
            "votes_independent": detectable_win_rate(prompts, each),
            "prompt_decides": detectable_win_rate(prompts, 1),
        }
        notes.append(
            "eval finds a true win rate of detectable_win_rate with 80 % probability: the first where every vote is a "
            "new opinion, the second where all votes on a prompt agree; the truth lies between"
        )
    if any("judge_requests" in document.get(part, {}) for part in ("run_online", "eval")):
        notes.append(
            "what a judge costs depends on the tokens it takes: not known before; budget.usd bounds run-online"
        )
    asked = [document[part] for part in ("run_online", "eval") if "votes" in document.get(part, {})]
    if asked:
        document["total"] = _total(asked)
        document["time"] = _time(recipe, document["total"]["votes"]["expected"], notes)
        if recipe.flow is not None and recipe.flow.service == "replay":
            notes.append("replay: these votes were given before; nobody is asked, nothing is paid")
        elif document["total"]["usd"]["max"] is None:
            notes.append("unknown price: set budget.usd_per_1k_votes to see the cost")
        if recipe.flow is not None and recipe.flow.stop_when_decided is not None:
            notes.append("flow.stop_when_decided ends items early: fewer votes than expected, by how many is not known")
        if recipe.run_online is not None and recipe.run_online.drift is not None:
            notes.append("groups of targeted rounds, where a drift is found, come on top of the share for people")
        if asks_online:
            notes += _budget(recipe, document["run_online"])
    document["notes"] = [*notes, "not checked: memory, tokenizer and chat template, which need the model"]
    return document


def would(recipe: Recipe, state: RunState) -> str:
    """What open-flow would do, by the journal alone."""
    assert recipe.flow is not None
    if recipe.flow.service == "replay":
        return f"give the votes of {recipe.flow.recording} again"
    if state.flow is None:
        return "open a flow, or adopt one that asks the same"
    if changed := changes(state.flow, flow_spec(recipe), recipe.flow.service):
        return f"open another flow, or adopt one that asks the same: {'; '.join(changed)}"
    return f"adopt flow {state.flow.flow_id}, if it is still at the service"


def flow_plan(loaded: LoadedRecipe, path: Path, *, new: bool = False) -> dict[str, Any]:
    """What open-flow would do; the service is asked where that creates nothing and the credentials are there."""
    recipe, run = loaded.recipe, RunDir(path)
    section, state = recipe.flow, replay(read(run.journal))
    assert section is not None
    facts = {"service": section.service, **flow_facts(recipe)}
    if section.service == "replay":
        return {"would": would(recipe, state), **facts}
    try:
        found = None if new else _look(recipe, run, state.flow)
    except (CredentialsError, FlowUnavailable) as error:
        return {"would": would(recipe, state), "not_asked": str(error), **facts}
    why = reason(state.flow, flow_spec(recipe), section.service, found, new=new)
    return {"would": f"adopt flow {found}" if found else "open a new flow", "why": why, **facts}


def _look(recipe: Recipe, run: RunDir, before: FlowOpened | None) -> str | None:
    """The id of a flow at the service that asks the same."""
    assert recipe.flow is not None
    spec, service = flow_spec(recipe), recipe.flow.service
    if service == "embedded":
        return _in_store(run.flow_store, spec, before)

    async def look() -> str | None:
        flow = connect()
        try:
            return await find(flow, spec, service, before)
        finally:
            await flow.close()

    with flow_service(recipe, run) as connect:
        return asyncio.run(look())


def _in_store(path: Path, spec: FlowSpec, before: FlowOpened | None) -> str | None:
    """The same for an embedded server, which need not run, and may run for somebody else."""
    if not path.exists():
        return None
    with closing(Store(path)) as store:
        _, flows = store.flows(spec.title, 0, 1000, newest_first=True)
    wanted = (spec.title, spec.instruction, spec.responses)
    same = [flow.id for flow in flows if (flow.name, flow.instruction, flow.responses) == wanted]
    return before.flow_id if before is not None and before.flow_id in same else next(iter(same), None)


def _stages(loaded: LoadedRecipe, state: RunState) -> dict[str, str]:
    recipe, found = loaded.recipe, dict[str, str]()
    sections: list[tuple[Stage, object]] = [
        ("sft", recipe.sft),
        ("train-rm", recipe.train_rm),
        ("open-flow", recipe.flow),
        ("run-online", recipe.run_online),
        ("eval", recipe.eval),
    ]
    for name, section in sections:
        if section is None:
            continue
        done = state.stages.get(name)
        attempt = f"/{state.attempt}" if name == "eval" else ""
        if done is None:
            found[name] = "started, not finished" if state.current and state.current.stage == name else "to do"
        else:
            same = done.fingerprint == stage_fingerprint(loaded, name) + attempt
            found[name] = "done" if same else "to do again: its inputs changed"
    return found


def _data(recipe: Recipe) -> dict[str, int]:
    """Rows of the data files."""
    prompts = {"prompts": recipe.data.prompts, "heldout_prompts": recipe.data.heldout_prompts} if recipe.data else {}
    found = {name: len(read_prompts(path)) for name, path in prompts.items() if path is not None}
    if recipe.sft is not None:
        found |= _rows("sft", read_conversations, recipe.sft.dataset, recipe.sft.heldout, recipe.seed)
    if recipe.train_rm is not None and recipe.train_rm.dataset is not None:
        found |= _rows("train_rm", read_votes, recipe.train_rm.dataset, recipe.train_rm.heldout, recipe.seed)
    return found


def _rows(
    name: str, read: Callable[..., tuple[Sized, Sized]], dataset: Dataset, heldout: Heldout, seed: int
) -> dict[str, int]:
    if any(isinstance(source, str) for source in [*(source for source, _ in parts_of(dataset)), heldout]):
        return {}  # of the hub: a plan fetches nothing
    train, kept_apart = read(dataset, heldout, seed=seed)
    return {name: len(train), **({f"{name}_heldout": len(kept_apart)} if len(kept_apart) else {})}


def _votes(recipe: Recipe, items: int, asked_again: bool = False) -> dict[str, Any]:
    """Votes and money for so many items; `expected` where all get enough time, and so need not be asked again."""
    assert recipe.flow is not None
    responses = recipe.flow.responses
    each = {
        "min": responses.min,
        "expected": expected_votes(recipe, known_capabilities(recipe.flow.service)),
        "max": responses.max + (responses.min - 1 if asked_again else 0),
    }
    return {
        "votes": {name: items * count for name, count in each.items()},
        "usd": {name: usd(recipe, items * count) for name, count in each.items()},
    }


def _for_people(online: RunOnline, groups: int) -> int:
    """How many of the groups people are to see."""
    if online.feedback == "votes" and online.selection is None:
        return groups
    return math.ceil(groups * (online.selection or Selection()).share)


def _judge(recipe: Recipe, groups: int, size: int) -> dict[str, int]:
    """Questions to the judge: each pair in both orders."""
    assert recipe.run_online is not None
    assert recipe.run_online.judge is not None
    pairs = size * (size - 1) // 2
    return {"judge_requests": 2 * groups * min(pairs, recipe.run_online.judge.comparisons or pairs)}


def _total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    votes = {name: sum(part["votes"][name] for part in parts) for name in ("min", "expected", "max")}
    costs = {name: [part["usd"][name] for part in parts] for name in votes}
    return {
        "votes": votes,
        "usd": {name: None if None in values else sum(values) for name, values in costs.items()},
    }


def _time(recipe: Recipe, votes: int, notes: list[str]) -> dict[str, float | None]:
    """Seconds that voting takes, where that can be known."""
    assert recipe.flow is not None
    longest: float | None = None
    if recipe.run_online is not None and recipe.run_online.asks_people:
        online = recipe.run_online
        ahead = min(online.max_in_flight, (online.staleness.max_steps + 1) * online.prompts_per_step)
        longest = math.ceil(online.steps * online.prompts_per_step / ahead) * recipe.flow.ttl_s
    notes.append("time of generation and training is not known before the first steps; it overlaps with voting")
    if recipe.flow.service == "replay":
        return {"voting_s": 0.0, "voting_longest_s": 0.0}
    if recipe.flow.crowd is None:
        notes.append(f"how fast people vote is not known: {votes} votes at 10 a minute take {votes / 600:.1f} h")
        return {"voting_s": None, "voting_longest_s": longest}
    return {"voting_s": votes / _votes_per_s(recipe.flow.crowd), "voting_longest_s": longest}


def _votes_per_s(crowd: Crowd) -> float:
    """Of simulated raters who always have a pair: their answer times are lognormal."""
    p50, p95 = max(crowd.latency_s.p50, 1e-3), max(crowd.latency_s.p95, 1e-3)
    mean_s = p50 * math.exp((math.log(p95 / p50) / NORMAL_95) ** 2 / 2)
    return crowd.raters * (1 - crowd.dropout) / mean_s


def _budget(recipe: Recipe, online: dict[str, Any]) -> list[str]:
    """What of `budget` the votes of run-online would reach; the loop counts the maximum of what is in flight."""
    assert recipe.run_online is not None
    budget, found = recipe.budget, []
    limits = {"votes": (budget.votes, online["votes"]), "usd": (budget.usd, online["usd"])}
    for name, (limit, planned) in limits.items():
        if limit is None or planned["max"] is None:
            continue
        per_step = planned["max"] / online["steps"]
        if recipe.run_online.feedback == "hybrid":
            if planned["expected"] > limit:
                found.append(
                    f"budget.{name} of {limit:g} is less than the expected {planned['expected']:g}: once it is used up "
                    "the reward model answers alone"
                )
        elif per_step > limit:
            found.append(
                f"budget.{name} of {limit:g} is less than the {per_step:g} that the groups of one step may use: "
                "nothing would train"
            )
        elif planned["expected"] > limit:
            steps = 1 + int((limit - per_step) / (planned["expected"] / online["steps"]))
            found.append(
                f"budget.{name} of {limit:g} is less than the {planned['expected']:g} that run-online is expected to "
                f"use: it ends (exit code 6) after about step {steps} of {recipe.run_online.steps}"
            )
        elif planned["max"] > limit:
            found.append(
                f"budget.{name} of {limit:g} pays for the expected {planned['expected']:g}, "
                f"not for the most that run-online may use, {planned['max']:g}"
            )
    return found
