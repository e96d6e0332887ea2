"""`rlhf sft`, `train-rm`, `open-flow`, `run-online`, `eval`, and `run` for all of them."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_cli.cli.crash import crash_goes_to
from rlhf_cli.cli.options import AsJson, DryRun, Fresh, Output, RecipeFile, Resume, RunFolder, Sets, Simulate
from rlhf_cli.cli.show import out_result
from rlhf_cli.errors import DataError, GateFailed, RecipeError, Stopped, UsageError

if TYPE_CHECKING:
    from rlhf_cli.recipe.load import LoadedRecipe

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
    app.command()(plan)
    for name, description in _STAGES.items():
        app.command(name, help=description)(open_flow if name == "open-flow" else _command(name))


def plan(
    recipe_file: RecipeFile,
    sets: Sets = None,
    run_dir: RunFolder = None,
    simulate: Simulate = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe will ask, cost and be able to show, before anything is spent."""
    loaded, folder = _checked("run", recipe_file, sets, run_dir, simulate)
    _plan(loaded, folder, as_json)


def _command(name: str) -> Callable[..., None]:
    def command(
        recipe_file: RecipeFile,
        sets: Sets = None,
        run_dir: RunFolder = None,
        output: Output = "auto",
        resume: Resume = False,
        fresh: Fresh = False,
        dry_run: DryRun = False,
        simulate: Simulate = None,
        as_json: AsJson = False,
    ) -> None:
        if resume and fresh:
            raise UsageError("--resume and --fresh exclude each other: go on, or start again")
        loaded, folder = _checked(name, recipe_file, sets, run_dir, simulate)
        if dry_run:
            _plan(loaded, folder, as_json)
            return
        result = _run(name, loaded, folder, output, resume=resume, fresh=fresh)
        _show(result, as_json)
        _check_gates(result)

    return command


def open_flow(
    recipe_file: RecipeFile,
    sets: Sets = None,
    run_dir: RunFolder = None,
    output: Output = "auto",
    new: Annotated[bool, typer.Option("--new", help="Open a new flow even where one asks the same.")] = False,
    resume: Resume = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    simulate: Simulate = None,
    as_json: AsJson = False,
) -> None:
    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other: go on, or start again")
    loaded, folder = _checked("open-flow", recipe_file, sets, run_dir, simulate)
    if dry_run:
        from rlhf_cli.stages.plan import flow_plan

        result = flow_plan(loaded, folder, new=new)
    else:
        result = _run("open-flow", loaded, folder, output, resume=resume, fresh=fresh, new=new)
    _show(result, as_json)


def _checked(
    name: str, recipe_file: Path, sets: list[str] | None, run_dir: Path | None, simulate: str | None
) -> tuple[LoadedRecipe, Path]:
    """The recipe and the run folder of a command, with every mistake in recipe and data files found.

    A rehearsal has a run folder of its own: what simulated raters said must never stand in for people.
    """
    from rlhf_cli.recipe.data import check_files
    from rlhf_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe_file, sets or [], simulate)
    section = _SECTIONS.get(name)
    if section is not None and getattr(loaded.recipe, section) is None:
        raise RecipeError([f"{recipe_file}: {section}: missing section; `rlhf {name}` works from it"])
    complaints = check_files(loaded.recipe)
    if complaints:
        raise DataError("\n".join(map(str, complaints)))
    name_of_folder = loaded.recipe.name + ("-simulated" if simulate is not None else "")
    return loaded, run_dir or Path("runs") / name_of_folder


def _run(name: str, loaded: LoadedRecipe, folder: Path, output: Output, **options: bool) -> dict[str, Any]:
    crash_goes_to(folder)

    from rlhf_cli.journal.run_dir import RunDir
    from rlhf_cli.live.open import open_display

    with stoppable(), open_display(output, f"{loaded.recipe.name} {name}") as display:
        if loaded.simulate is not None:
            display.on_note(
                "simulated raters stand in for whoever compares, nothing is paid; the result is a rehearsal"
            )
        stage = import_module(f"rlhf_cli.stages.{name.replace('-', '_')}")
        result: dict[str, Any] = stage.run(loaded, folder, observers=[display], **options)
        if name == "run":
            from rlhf_cli.report.build import build_report

            result = {**result, "report": str(build_report(folder))}
        elif name == "train-rm":
            report = RunDir(folder).train_rm_report
            result = {**result, "honesty": json.loads(report.read_bytes()) if report.exists() else None}
    return result


def _plan(loaded: LoadedRecipe, folder: Path, as_json: bool) -> None:
    from rlhf_cli.stages.plan import plan

    _show(plan(loaded, folder), as_json)


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

    def terminate(got: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(got)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = int(interrupt.args[0]) if interrupt.args else signal.SIGINT
        what = "what is finished is kept; run the same command again (run-online goes on with --resume)"
        raise Stopped(f"stopped by {signal.Signals(number).name}; {what}", number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        out_result(result, as_json)
    elif "win_rate" not in result:
        honesty = result.get("honesty")
        out_result(_in_words({k: v for k, v in result.items() if k != "honesty"}), as_json)
        if honesty is not None:
            from rlhf_cli.live.honesty import print_honesty

            print_honesty(honesty, sys.stdout)
    else:
        from rlhf_cli.live.results import print_results

        print_results(result, sys.stdout)


def _in_words(result: dict[str, Any]) -> dict[str, Any]:
    """A plan or a flow as lines for people: what the service makes of each number, notes, costs that are not known."""
    words = {**result}
    if "flow" in words:
        words["flow"] = _in_words(words["flow"])
    if "mapping" in words:
        rows = words["mapping"]
        words["mapping"] = {row["key"]: f"{row['asked']} -> {row['sent']}; {row['note']}" for row in rows}
    for name, section in words.items():
        if isinstance(section, dict):
            words[name] = {k: _priced(v) if k == "usd" else v for k, v in section.items()}
    if "usd_per_item" in words:
        words["usd_per_item"] = _priced(words["usd_per_item"])
    if "notes" in words:
        words["notes"] = {str(n): note for n, note in enumerate(words["notes"], 1)}
    return words


def _priced(costs: dict[str, Any]) -> Any:
    return "unknown price" if None in costs.values() else costs
