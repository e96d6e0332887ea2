"""Promises of recipes/: every recipe that comes along is valid, and says in its header what it takes to run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_cli.recipe.load import check_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
DATA = ("pairs_train", "pairs_heldout", "rated_snippets", "sft_train", "sft_heldout")
"""Files of the folder that RLHF_DATA names; real ones are not part of the project."""
ROWS = {
    "pairs": '{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}\n',
    "rated": '{"text": "Good.", "ratings": [3, 2]}\n{"text": "Bad.", "ratings": [-3, -2]}\n',
    "sft": '{"prompt": "Why?", "completion": "Because."}\n',
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DATA:
        (tmp_path / f"{name}.jsonl").write_text(ROWS[name.split("_")[0]])
    monkeypatch.setenv("RLHF_DATA", str(tmp_path))


def header(recipe: Path) -> str:
    """The comment at the top, as running text."""
    lines = recipe.read_text("utf-8").splitlines()
    end = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def test_there_are_recipes() -> None:
    assert {"quickstart", "rm-snippets", "rlhf-workflow-rm"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_is_valid_with_its_data(recipe: Path) -> None:
    loaded, problems = check_recipe(recipe)

    assert problems == []
    assert loaded is not None
    assert loaded.recipe.name == recipe.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_says_what_hardware_and_cost_it_takes(recipe: Path) -> None:
    said = header(recipe)

    assert re.search(r"Hardware: \S", said)
    assert re.search(r"Cost[^.]*: \S", said)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "workflow" in r.stem], ids=lambda recipe: recipe.stem)
def test_a_recipe_that_nobody_ran_says_so(recipe: Path) -> None:
    assert "NOT RUN HERE" in header(recipe)
