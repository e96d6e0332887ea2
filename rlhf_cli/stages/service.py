"""The flow service that a recipe names, and what this recipe asks there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.feedback.recorded import Recording
from rlhf_cli.flow.base import Flow, FlowSpec, Responses
from rlhf_cli.flow.bodies import keep_bodies
from rlhf_cli.flow.client import FlowClient
from rlhf_cli.flow.credentials import Credentials, credentials_from_environment
from rlhf_cli.flow.http import PATIENT, Patience
from rlhf_cli.journal.run_dir import RunDir
from rlhf_cli.recipe import schema
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.server.crowd import CrowdSettings
from rlhf_cli.server.embedded import EmbeddedFlow

Connect = Callable[[], Flow]
"""Makes a client; called in the thread that uses it."""


def flow_spec(recipe: Recipe) -> FlowSpec:
    """What people are asked, and how often."""
    section = recipe.flow
    assert section is not None
    responses = Responses(section.responses.min, section.responses.desired, section.responses.max)
    segments = recipe.run_online is not None and recipe.run_online.segments is not None
    return FlowSpec(recipe.name, section.instruction, responses, section.ttl_s, segments)


@contextmanager
def flow_service(recipe: Recipe, run: RunDir, *, outage_s: float = PATIENT.outage_s) -> Iterator[Connect]:
    """Reach the recipe's service for the length of the block; `embedded` is started, and stopped at its end.

    Args:
        outage_s: How long the service may be unreachable before the stage ends; a run has time, a command has not.

    Raises:
        CredentialsError: The environment does not hold them.
    """
    section = recipe.flow
    assert section is not None
    on_body, patience = keep_bodies(run.flow_bodies), Patience(outage_s=min(outage_s, section.outage_s))
    if section.service == "embedded":
        with EmbeddedFlow(run.flow_store, crowd_settings(section.crowd), recipe.seed) as server:
            credentials = Credentials(server.client_id, server.client_secret)
            yield lambda: FlowClient(server.url, credentials, patience=patience, on_body=on_body)
        return
    credentials = credentials_from_environment(
        section.client_id_env or "RAPIDATA_CLIENT_ID",
        section.client_secret_env or "RAPIDATA_CLIENT_SECRET",
        section.token_env,
        auth_url="https://auth.rapidata.ai" if section.service == "rapidata" else None,
    )
    if section.service == "rapidata":
        yield lambda: FlowClient.rapidata(credentials, patience=patience, on_body=on_body)
    else:
        yield lambda: FlowClient(section.service, credentials, patience=patience, on_body=on_body)


def recording_at(folder: Path, run: RunDir) -> Recording:
    """The votes that the run in `folder` recorded, to be given again in `run`.

    Raises:
        UsageError: A run cannot be its own recording.
        DataError, RunDamaged: As `Recording.read`.
    """
    if folder.samefile(run.path):
        raise UsageError(f"{run.path} cannot be its own recording; choose another folder with --run-dir")
    return Recording.read(folder / "journal.jsonl")


def crowd_settings(section: schema.Crowd | None) -> CrowdSettings | None:
    """The recipe's simulated raters as the server takes them."""
    if section is None:
        return None
    return CrowdSettings(
        raters=section.raters,
        taste=section.taste,
        latency_p50_s=section.latency_s.p50,
        latency_p95_s=section.latency_s.p95,
        agreement=section.agreement,
        position_bias=section.position_bias,
        dropout=section.dropout,
        marks=section.marks,
    )
