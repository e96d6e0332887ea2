"""Fixtures of the browser tests."""

from __future__ import annotations

from browser_world import browser, site, until  # noqa: F401
