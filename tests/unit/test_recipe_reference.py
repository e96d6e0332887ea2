"""The schema describes itself: JSON Schema for editors, a page for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_files import RECIPE

from rlhf_cli.recipe.keys import all_paths
from rlhf_cli.recipe.reference import json_schema, reference_page
from rlhf_cli.recipe.schema import Crowd
from rlhf_cli.server.tastes import TASTES

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SAMPLE: dict[str, Any] = yaml.safe_load(RECIPE.replace("1e-5", "1.0e-5"))


_ABOUT: dict[str, type] = {
    **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"], float),
    **dict.fromkeys(["minLength", "maxLength", "pattern"], str),
    **dict.fromkeys(["properties", "additionalProperties", "required"], dict),
    "items": list,
}


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether `value` is valid, for the part of JSON Schema that a recipe needs; an unknown keyword fails the test."""
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
    }
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    for keyword, rule in schema.items():
        if keyword in _ABOUT and not (is_number if _ABOUT[keyword] is float else isinstance(value, _ABOUT[keyword])):
            continue  # a keyword says nothing about values of other types
        match keyword:
            case "title" | "description" | "default" | "format" | "$defs" | "$schema":
                ok = True
            case "$ref":
                ok = accepts(root["$defs"][rule.removeprefix("#/$defs/")], value, root)
            case "anyOf":
                ok = any(accepts(option, value, root) for option in rule)
            case "type":
                ok = isinstance(value, types[rule]) and (rule == "boolean" or not isinstance(value, bool))
            case "properties":
                ok = all(accepts(rule[key], item, root) for key, item in value.items() if key in rule)
            case "additionalProperties":
                ok = rule is False and set(value) <= set(schema["properties"])
            case "required":
                ok = set(rule) <= set(value)
            case "items":
                ok = all(accepts(rule, item, root) for item in value)
            case "enum":
                ok = value in rule
            case "const":
                ok = value == rule
            case "minimum":
                ok = value >= rule
            case "maximum":
                ok = value <= rule
            case "exclusiveMinimum":
                ok = value > rule
            case "exclusiveMaximum":
                ok = value < rule
            case "minLength":
                ok = len(value) >= rule
            case "maxLength":
                ok = len(value) <= rule
            case "pattern":
                ok = re.search(rule, value) is not None
            case _:
                raise AssertionError(f"unknown keyword {keyword}")
        if not ok:
            return False
    return True


def test_the_json_schema_accepts_a_recipe() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert accepts(schema, SAMPLE, schema)
    assert accepts(schema, {"extends": "base.yaml", **SAMPLE}, schema)


@pytest.mark.parametrize(
    "mistake",
    [
        {"sed": 1},
        {"seed": "a"},
        {"run_online": {"steps": 1, "group_size": 17}},
        {"eval": {"judge": "me"}},
        {"name": "a/b"},
    ],
)
def test_the_json_schema_refuses_mistakes(mistake: dict[str, Any]) -> None:
    schema = json_schema()
    assert not accepts(schema, {**SAMPLE, **mistake}, schema)


def test_the_json_schema_explains_every_key_to_an_editor() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    documented = {
        name for s in sections for name, key in s["properties"].items() if key.get("description") or "$ref" in key
    }
    tops = set(schema["properties"])
    assert {path[-1] for path in all_paths()} - tops <= documented


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == reference_page(), "run: python -m rlhf_cli.recipe.reference > docs/recipes.md"


def test_the_tastes_of_a_recipe_are_those_of_the_crowd() -> None:
    choices = Crowd.model_json_schema()["properties"]["taste"]["enum"]
    assert set(choices) == set(TASTES)
