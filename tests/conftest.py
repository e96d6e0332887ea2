"""Fixtures that many tests share, and the settings of the model libraries: they must stand before torch is imported."""

from __future__ import annotations

import os
import sys

import pytest
from cli_world import smoke  # noqa: F401
from flow_world import clock, store, world  # noqa: F401
from tiny_world import recipe, tiny, tiny_encoder  # noqa: F401

for name, value in {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads on busy cores cost up to twenty times the work itself
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}.items():
    os.environ.setdefault(name, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    asked = sys.modules.get("asking_world")  # only where its tests ran
    if asked is not None and asked.scenarios:
        terminalreporter.write_line(f"flow fault scenarios: {asked.scenarios}")
