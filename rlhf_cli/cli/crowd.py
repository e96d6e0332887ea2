"""`rlhf crowd`: simulated raters who vote on a server of ours, over HTTP and marked as such."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_cli.cli.show import err
from rlhf_cli.cli.stages import stoppable
from rlhf_cli.errors import CredentialsError, FlowRefused, FlowUnavailable, RlhfError, UsageError

if TYPE_CHECKING:
    import httpx

    from rlhf_cli.server.tastes import Taste

TOKEN_ENV = "RLHF_OWNER_TOKEN"


def add_to(app: typer.Typer) -> None:
    app.command()(crowd)


def crowd(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server.", show_default=False)],
    token: Annotated[
        str | None, typer.Option(metavar="SECRET", help=f"An owner's secret; or set {TOKEN_ENV}, which no `ps` shows.")
    ] = None,
    raters: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 40,
    taste: Annotated[
        str, typer.Option(metavar="NAME", help="brief, kind, letters; a reward model's folder; or module:function.")
    ] = "kind",
    seed: Annotated[int, typer.Option(help="Of their decisions; the same seed is the same people.")] = 0,
    agreement: Annotated[float, typer.Option(min=0.5, max=1, help="How often two of them agree.")] = 0.72,
    skill_sd: Annotated[float, typer.Option(min=0, max=3, help="How far their skills are apart (log scale).")] = 0.25,
    latency_p50_s: Annotated[float, typer.Option(min=0.001, help="Seconds for an answer, median.")] = 2,
    latency_p95_s: Annotated[float, typer.Option(min=0.001, help="The same, 95th percentile.")] = 8,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs taken and never answered.")] = 0.02,
    position_bias: Annotated[float, typer.Option(help="Extra logit for the left side.")] = 0,
    spammers: Annotated[float, typer.Option(min=0, max=1, help="Share of raters who do not read.")] = 0,
) -> None:
    """Let simulated raters vote on a server until stopped; their votes are marked as simulated."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is no address of a server; it must start with http:// or https://")
    if latency_p95_s < latency_p50_s:
        raise UsageError("--latency-p95-s is below --latency-p50-s: more than half of the answers cannot be slower")
    secret = token or os.environ.get(TOKEN_ENV)
    if not secret:
        raise CredentialsError(f"give an owner's secret with --token, or in {TOKEN_ENV}; `rlhf tokens add` makes one.")
    likes = find_taste(taste)

    import asyncio

    import httpx

    from rlhf_cli.server.crowd import Crowd, CrowdSettings, simulated_raters

    settings = CrowdSettings(
        raters=raters,
        latency_p50_s=latency_p50_s,
        latency_p95_s=latency_p95_s,
        agreement=agreement,
        position_bias=position_bias,
        dropout=dropout,
        skill_sd=skill_sd,
        spammers=spammers,
    )
    with stoppable():
        try:
            secrets = simulated_raters(url, secret, raters, f"crowd-{seed}")
            people = Crowd(url, secrets, settings, seed, likes=likes)
            err(f"{raters} simulated raters are voting on {url}")
            try:
                asyncio.run(people.run())
            finally:
                err(f"{people.votes} votes counted")
        except* httpx.HTTPStatusError as group:
            raise _refusal(group, url) from None
        except* httpx.TransportError as group:
            raise FlowUnavailable(f"{url} cannot be reached: {group.exceptions[0]}") from None


def find_taste(name: str) -> Taste:
    """A taste by its name: built in, a reward model's folder, or a Python function of prompt and completion."""
    from rlhf_cli.server.tastes import TASTES

    if name in TASTES:
        return TASTES[name]
    if Path(name).is_dir():
        return _reward_model(Path(name))
    module, colon, function = name.partition(":")
    if not colon:
        raise UsageError(
            f"no taste {name!r}: built in are {', '.join(TASTES)}; else a reward model's folder, or module:function"
        )
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--taste {name}: {error}") from error
    if not callable(found):
        raise UsageError(f"--taste {name} is no function of a prompt and a completion")
    taste: Taste = found
    return taste


def _reward_model(folder: Path) -> Taste:
    from functools import lru_cache

    from rlhf_cli.policy.scoring import RewardModel, open_reward_model
    from rlhf_cli.types import Message

    model = open_reward_model(str(folder))
    if not isinstance(model, RewardModel):
        raise UsageError(f"--taste {folder} is a pairwise model; a rater needs one that scores a completion by itself")

    @lru_cache(maxsize=4096)  # every completion of a group is judged many times
    def likes(prompt: str, completion: str) -> float:
        return model.score((Message("user", prompt),), [completion])[0]

    return likes


def _refusal(group: BaseExceptionGroup[httpx.HTTPStatusError], url: str) -> RlhfError:
    """What the first refusal means to who started the crowd."""
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    status = error.response.status_code
    if status == 401:
        return CredentialsError(f"{url} does not know this secret, or another crowd of the same --seed took over.")
    if status == 403:
        return CredentialsError(f"{url}: this is not an owner's secret; `rlhf tokens add NAME --role owner` makes one.")
    if status == 404:
        return FlowRefused(f"{url} is no server of ours: simulated raters vote nowhere else.")
    return FlowRefused(f"{url} answered {status} to {error.request.method} {error.request.url.path}.")
