"""`rlhf run`: every stage that the recipe has, in order; those done with the same inputs are skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_cli.journal.journal import read
from rlhf_cli.journal.observe import Observer
from rlhf_cli.journal.replay import replay
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe.fingerprint import Stage, stage_fingerprint
from rlhf_cli.recipe.load import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import eval, open_flow, run_online, sft, train_rm
from rlhf_cli.stages.session import Result

STAGES: list[tuple[str, Callable[[Recipe], object], Callable[..., Result]]] = [
    ("sft", lambda recipe: recipe.sft, sft.run),
    ("train-rm", lambda recipe: recipe.train_rm, train_rm.run),
    ("open-flow", lambda recipe: recipe.flow, open_flow.run),
    ("run-online", lambda recipe: recipe.run_online, run_online.run),
    ("eval", lambda recipe: recipe.eval, eval.run),
]


def run(
    loaded: LoadedRecipe, path: Path, observers: Sequence[Observer] = (), *, resume: bool = False, fresh: bool = False
) -> Result:
    """Run the stages; returns the figures of the last one, with the seconds, votes and cost of all."""
    results: dict[str, Result] = {}
    for name, section, stage in STAGES:
        if section(loaded.recipe) is not None:
            for observer in observers:
                observer.on_note(f"stage {name}")
            # A flow that nothing will be sent to need not be there any more.
            also = {"ask": fresh or not _is_done(loaded, path, "run-online")} if name == "open-flow" else {}
            results[name] = stage(loaded, path, observers, resume=resume, fresh=fresh, **also)
    price = loaded.recipe.budget.usd_per_1k_votes
    votes = sum(float(r["votes"]) for r in results.values() if r.get("votes") is not None)
    judge_usd = max((r.get("judge_usd") or 0.0 for r in results.values()), default=0.0)  # of the run folder
    last = list(results.values())[-1] if results else {}
    return {
        **last,
        "stages": results,
        "votes": votes,
        "cost_usd": votes * price / 1000 + judge_usd,
        "seconds": sum(r["seconds"] for r in results.values()),
    }


def _is_done(loaded: LoadedRecipe, path: Path, stage: Stage) -> bool:
    """Whether the journal says that a stage was finished with the inputs of this recipe."""
    done = replay(read(RunDir(path).journal)).stages.get(stage)
    return done is not None and done.fingerprint == stage_fingerprint(loaded, stage)
