"""Fixtures of a flow server in memory, for every test that wants one."""

from flow_world import clock, store, world  # noqa: F401
