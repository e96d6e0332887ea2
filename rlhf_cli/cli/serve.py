"""`rlhf serve`: the flow server for a team, with its voting page."""

from __future__ import annotations

import ipaddress
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.options import Data
from rlhf_cli.cli.show import err
from rlhf_cli.errors import Stopped, UsageError


def add_to(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    data: Data,
    bind: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:8080",
    url: Annotated[
        str | None,
        typer.Option(help="Address that people use, where a name or a proxy stands in front; links start with it."),
    ] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let other machines reach it.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    insecure_http: Annotated[
        bool, typer.Option("--insecure-http", help="Other machines without TLS: everybody on the way reads along.")
    ] = False,
    lease_s: Annotated[float, typer.Option(min=1, max=3600, help="Seconds that a rater may keep a pair.")] = 90,
) -> None:
    """Serve flows, and the page on which people vote, until stopped."""
    host, port = _address(bind)
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together")
    if not _is_loopback(host):
        if not allow_remote:
            raise UsageError(f"{host} can be reached by other machines; add --allow-remote if that is meant")
        if tls_cert is None and not insecure_http:
            raise UsageError("other machines need TLS: give --tls-cert and --tls-key, or accept --insecure-http")

    from rlhf_cli.server.data_dir import DataDir
    from rlhf_cli.server.serve import Address, run

    address = Address(host, port, url, tls_cert, tls_key)
    number = run(DataDir(data), address, lease_s, announce=err)
    raise Stopped(f"stopped by {signal.Signals(number).name}; everything acknowledged is in {data}", number)


def _address(bind: str) -> tuple[str, int]:
    host, _, port = bind.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--bind is HOST:PORT, such as 127.0.0.1:8080, not {bind!r}")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UsageError(f"--bind: {host!r} is no address of this machine: {error}") from error
    return all(ipaddress.ip_address(address).is_loopback for address in found)
