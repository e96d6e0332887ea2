"""The page of promises names tests; a promise whose test is gone is an empty one."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "guarantees.md"


def test_every_test_that_a_guarantee_names_exists() -> None:
    named = re.findall(r"`([a-z]+/test_\w+\.py)::(test_\w+)`", PAGE.read_text())
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`" in line.split("|")[-2]]
    assert len(named) >= len(rows) > 15
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (TESTS / file).read_text()]
    assert not missing
