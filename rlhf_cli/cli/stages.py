"""`rlhf sft`, `train-rm`, `open-flow`, `run-online`, `eval`, and `run` for all of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from rlhf_cli.cli.crash import crash_goes_to
from rlhf_cli.cli.options import AsJson, Fresh, Output, RecipeFile, Resume, RunFolder, Sets
from rlhf_cli.cli.show import out_result
from rlhf_cli.errors import DataError, GateFailed, RecipeError, Stopped, UsageError

_STAGES = {
    "sft": "Fine-tune the model on example conversations.",
    "train-rm": "Fit a reward model to votes.",
    "open-flow": "Open the flow that people vote in, or find the one that is open already.",
    "run-online": "Improve the policy from votes, step by step, while people vote.",
    "eval": "Measure the trained policy against the model it started from.",
    "run": "All stages of the recipe in order, skipping those that are done.",
}
_SECTIONS = {"sft": "sft", "train-rm": "train_rm", "open-flow": "flow", "run-online": "run_online", "eval": "eval"}


def add_to(app: typer.Typer) -> None:
    for name, description in _STAGES.items():
        app.command(name, help=description)(_command(name))


def _command(name: str) -> Callable[..., None]:
    def command(
        recipe_file: RecipeFile,
        sets: Sets = None,
        run_dir: RunFolder = None,
        output: Output = "auto",
        resume: Resume = False,
        fresh: Fresh = False,
        as_json: AsJson = False,
    ) -> None:
        if resume and fresh:
            raise UsageError("--resume and --fresh exclude each other: go on, or start again")
        from rlhf_cli.recipe.data import check_files
        from rlhf_cli.recipe.load import load_recipe

        loaded = load_recipe(recipe_file, sets or [])
        section = _SECTIONS.get(name)
        if section is not None and getattr(loaded.recipe, section) is None:
            raise RecipeError([f"{recipe_file}: {section}: missing section; `rlhf {name}` works from it"])
        complaints = check_files(loaded.recipe)
        if complaints:
            raise DataError("\n".join(map(str, complaints)))
        folder = run_dir or Path("runs") / loaded.recipe.name
        crash_goes_to(folder)

        from rlhf_cli.live.open import open_display

        with stoppable(), open_display(output, f"{loaded.recipe.name} {name}") as display:
            stage = import_module(f"rlhf_cli.stages.{name.replace('-', '_')}")
            result = stage.run(loaded, folder, observers=[display], resume=resume, fresh=fresh)
            if name == "run":
                from rlhf_cli.report.build import build_report

                result = {**result, "report": str(build_report(folder))}
        _show(result, as_json)
        _check_gates(result)

    return command


def _check_gates(result: dict[str, Any]) -> None:
    failed = [
        f"{name}: measured {gate['value']}, limit {gate['limit']}"
        for name, gate in result.get("gates", {}).items()
        if not gate["passed"]
    ]
    if failed:
        raise GateFailed("finished, but a gate was not met:\n" + "\n".join(failed))


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends a stage as Ctrl-C does, so that everything is closed; the exit code tells them apart.

    The loop of run-online has its own way while it runs: it finishes the step first.
    """
    number: int = signal.SIGINT

    def terminate(got: int, _frame: FrameType | None) -> None:
        nonlocal number
        number = got
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        what = "what is finished is kept; run the same command again (run-online goes on with --resume)"
        raise Stopped(f"stopped by {signal.Signals(number).name}; {what}", number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json or "win_rate" not in result:
        out_result(result, as_json)
    else:
        from rlhf_cli.live.results import print_results

        print_results(result, sys.stdout)
