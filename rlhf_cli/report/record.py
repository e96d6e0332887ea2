"""Everything a report says about a run, read from its folder. What is missing or damaged is noted, never fatal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rlhf_cli.errors import RunDamaged
from rlhf_cli.evaluation.verdict import read_report
from rlhf_cli.journal.events import StageStarted
from rlhf_cli.journal.journal import Entry, read
from rlhf_cli.journal.metrics import read_metrics
from rlhf_cli.journal.replay import ONLINE, GroupState, RunState, replay
from rlhf_cli.journal.run_dir import RunDir

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    state: RunState
    rows: list[dict[str, Any]]
    """metrics.jsonl, one row per step."""
    recipe: str
    kl_caps: dict[str, float]
    """`soft` and `hard` in nats, as far as the recipe sets them."""
    environment: dict[str, Any]
    results: dict[str, Any]
    honesty: dict[str, Any]
    """Of the reward model; empty where there is none."""
    samples: list[dict[str, Any]]
    supervised: list[dict[str, Any]]
    """Prompts answered before and after `rlhf sft`."""
    resumed_after: list[int]
    """Steps after which the run was picked up again."""
    seconds: float
    """From the first to the last entry of the journal."""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.state.started.name if self.state.started else "a run that has not begun"

    @property
    def rolled_back_to(self) -> list[int]:
        return [event.to_step for event in self.state.rollbacks]

    @property
    def trained(self) -> list[GroupState]:
        """Groups behind the steps, in the order they trained."""
        ids = [group_id for step in sorted(self.state.steps) for group_id in self.state.steps[step].group_ids]
        return [self.state.groups[group_id] for group_id in ids]

    def measured(self, name: str) -> bool:
        return any(row.get(name) is not None for row in self.rows)

    def fates(self) -> list[tuple[str, int]]:
        """How many groups were sampled, ranked, trained on, are still open, and set aside for which reason."""
        groups = list(self.state.groups.values())
        reasons = Counter(g.set_aside for g in groups if g.set_aside is not None)
        return [
            ("sampled", len(groups)),
            ("ranked", sum(g.ranked is not None for g in groups)),
            ("trained on", sum(g.step is not None for g in groups)),
            ("ranked, waiting for a step", sum(g.ready for g in groups)),
            ("waiting for votes", sum(g.open for g in groups)),
            *((f"set aside: {reason}", count) for reason, count in reasons.most_common()),
        ]


def load(run: RunDir) -> Record:
    """Read a run folder, in whatever state it is. Writes nothing and takes no lock."""
    problems: list[str] = []
    entries: list[Entry] = []
    state = RunState()
    try:
        entries = read(run.journal)
        state = replay(entries)
    except RunDamaged as error:
        problems.append(f"The journal cannot be trusted, so nothing here comes from it: {error}")
    recipe = run.recipe.read_text(errors="replace") if run.recipe.exists() else ""
    return Record(
        state=state,
        rows=read_metrics(run.metrics),
        recipe=recipe,
        kl_caps=_kl_caps(run.resolved if run.resolved.exists() else run.recipe, problems),
        environment=_parsed(run.environment, _object, {}, problems),
        results=_parsed(run.eval_results, _object, {}, problems),
        honesty=_parsed(run.train_rm_report, read_report, {}, problems),
        samples=_parsed(run.heldout_samples, _objects, [], problems),
        supervised=_parsed(run.sft_samples, _objects, [], problems),
        resumed_after=_resumes(entries),
        seconds=entries[-1].at - entries[0].at if entries else 0.0,
        problems=problems,
    )


def _parsed(path: Path, parse: Callable[[str], T], default: T, problems: list[str]) -> T:
    if not path.exists():
        return default
    try:
        return parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be read ({error}); it is left out.")
        return default


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _objects(text: str) -> list[dict[str, Any]]:
    return [_object(line) for line in text.split("\n") if line.strip()]


def _kl_caps(path: Path, problems: list[str]) -> dict[str, float]:
    try:
        kl = yaml.safe_load(path.read_text(encoding="utf-8"))["run_online"]["kl"] if path.exists() else {}
        return {name: float(kl[f"{name}_nats"]) for name in ("soft", "hard") if kl.get(f"{name}_nats") is not None}
    except (KeyError, TypeError, AttributeError):  # a recipe without these sections has no caps
        return {}
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({error}); the KL chart has no caps.")
        return {}


def _resumes(entries: list[Entry]) -> list[int]:
    starts = [e.event for e in entries if isinstance(e.event, StageStarted) and e.event.stage == ONLINE]
    newest = starts[-1].attempt if starts else 0
    return [s.resumed_from_step for s in starts if s.attempt == newest and s.resumed_from_step is not None]
