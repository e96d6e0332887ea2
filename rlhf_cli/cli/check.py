"""`rlhf validate`, `config` and `schema`: looking at a recipe, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf_cli.cli.options import AsJson, RecipeFile, Sets
from rlhf_cli.cli.show import err, out, out_json

if TYPE_CHECKING:
    from rlhf_cli.recipe.problems import Problem


def add_to(app: typer.Typer) -> None:
    app.command()(validate)
    app.command()(config)
    app.command()(schema)


def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files.", show_default=False)],
    sets: Sets = None,
    form: Annotated[
        Literal["text", "json", "github"],
        typer.Option("--format", help="Lines, one JSON document, or annotations of a GitHub workflow."),
    ] = "text",
) -> None:
    """Find every mistake in recipes and in the data files they name, all at once."""
    found = {str(file): _problems(file, sets or []) for file in recipes}
    if form == "json":
        out_json(
            {"recipes": [{"file": f, "valid": not p, "problems": list(map(_as_json, p))} for f, p in found.items()]}
        )
    for file, problems in found.items():
        for problem in problems:
            if form != "json":
                out(str(problem) if form == "text" else _as_annotation(problem))
        if not problems and form == "text":
            out(f"{file}: ok")
    count = sum(map(len, found.values()))
    if count:
        err(f"{count} mistake{'s' if count > 1 else ''}")
        raise typer.Exit(3)


def config(recipe_file: RecipeFile, sets: Sets = None, as_json: AsJson = False) -> None:
    """Print the recipe with every default filled in, and where each value came from."""
    from rlhf_cli.recipe.load import load_recipe
    from rlhf_cli.recipe.resolved import resolved_json, resolved_yaml

    loaded = load_recipe(recipe_file, sets or [])
    if as_json:
        out_json({"recipe": resolved_json(loaded), "origins": loaded.origins})
    else:
        out(resolved_yaml(loaded).rstrip())


def schema(
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write it here instead of printing it.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check as you type."""
    from rlhf_cli.recipe.reference import json_schema

    if file is None:
        out_json(json_schema())
    else:
        import json

        file.write_text(json.dumps(json_schema(), indent=2) + "\n", "utf-8")


def _problems(file: Path, sets: list[str]) -> list[Problem]:
    from rlhf_cli.recipe.data import check_files
    from rlhf_cli.recipe.load import check_recipe
    from rlhf_cli.recipe.problems import Place, Problem

    loaded, problems = check_recipe(file, sets)
    if loaded is None:
        return problems
    return [Problem(Place(0, c.line, 0, c.shown), "", c.what) for c in check_files(loaded.recipe)]


def _as_json(problem: Problem) -> dict[str, str | int]:
    place = problem.place
    return {"file": place.file, "line": place.line, "column": place.column, "key": problem.key, "what": problem.what}


def _as_annotation(problem: Problem) -> str:
    place = problem.place
    where = f"file={_escaped(place.file)}" + (f",line={place.line}" if place.line else "")
    where += f",col={place.column}" if place.column else ""
    what = f"{problem.key}: {problem.what}" if problem.key else problem.what
    return f"::error {where}::{_escaped(what, inside=False)}"


def _escaped(text: str, *, inside: bool = True) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if inside else text
