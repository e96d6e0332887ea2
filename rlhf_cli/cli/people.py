"""`rlhf raters` and `rlhf tokens`: who may use a server. Both work on its folder, whether it runs or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf_cli.cli.options import AsJson, Data
from rlhf_cli.cli.show import err, out, out_json, out_rows
from rlhf_cli.errors import UsageError

if TYPE_CHECKING:
    from rlhf_cli.server.tokens import Token, Tokens

_raters = typer.Typer(help="People who vote on a server.", no_args_is_help=True)
_tokens = typer.Typer(help="Machines that ask for votes, and owners.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="As you know them; raters never see it.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    app.add_typer(_raters, name="raters")
    app.add_typer(_tokens, name="tokens")


@_raters.command("add")
def add_rater(
    name: Name,
    data: Data,
    days: Annotated[float, typer.Option(min=0.01, help="How long the link is good for.")] = 7,
    as_json: AsJson = False,
) -> None:
    """Add a person, or give one a new link; it lets in one browser, once."""
    from rlhf_cli.server.data_dir import DataDir
    from rlhf_cli.server.tokens import JOIN_PATH

    folder = DataDir(data)
    with folder.store(create=True) as store:
        known = [token.id for token in _of(store.tokens, name, "rater") if token.revoked_at is None]
        rater_id = known[0] if known else store.tokens.add("rater", name)[0]
        link = f"{folder.url()}{JOIN_PATH}/{store.tokens.add_link(rater_id, days * 86400)}"
    if as_json:
        out_json({"name": name, "link": link})
    else:
        out(link)
        err(f"good once, for {days:g} days; another link: rlhf raters add {name} --data {data}")


@_raters.command("ls")
def list_raters(data: Data, as_json: AsJson = False) -> None:
    """List people, and the pseudonyms under which their votes are kept."""
    _list(data, ("rater",), as_json)


@_raters.command("revoke")
def revoke_rater(name: Name, data: Data) -> None:
    """Let a person no longer in; votes that were cast stay."""
    _revoke(data, name, ("rater",))


@_raters.command("stats")
def stats(data: Data, as_json: AsJson = False) -> None:
    """Votes, pace, sides and agreement of every rater, to look at; no vote is weighted by any of it."""
    from rlhf_cli.server.data_dir import DataDir
    from rlhf_cli.server.figures import rater_figures

    with DataDir(data).store() as store:
        rows = rater_figures(store)
    if as_json:
        out_json(rows)
    else:
        out_rows([{key: "-" if value is None else value for key, value in row.items()} for row in rows])


@_tokens.command("add")
def add_token(
    name: Name,
    data: Data,
    role: Annotated[Literal["client", "owner"], typer.Option(help="Clients ask for votes, owners see everything.")],
    days: Annotated[
        float | None, typer.Option(min=0.01, help="How long it is good for.  [default: until revoked]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an id and a secret, which is shown this once."""
    from rlhf_cli.server.data_dir import DataDir

    with DataDir(data).store(create=True) as store:
        if any(token.revoked_at is None for token in _of(store.tokens, name, "client", "owner")):
            raise UsageError(f"there is a token {name!r} already; revoke it first, or take another name")
        token_id, secret = store.tokens.add(role, name, ttl_s=None if days is None else days * 86400)
    made = {"name": name, "role": role, "id": token_id, "secret": secret}
    if as_json:
        out_json(made)
    else:
        out("\n".join(f"{key}: {value}" for key, value in made.items()))
        err("the secret is kept nowhere; it will not be shown again")


@_tokens.command("ls")
def list_tokens(data: Data, as_json: AsJson = False) -> None:
    """List clients and owners; secrets are not known to the server."""
    _list(data, ("client", "owner"), as_json)


@_tokens.command("revoke")
def revoke_token(name: Name, data: Data) -> None:
    """Refuse a token from now on, and what was issued for it."""
    _revoke(data, name, ("client", "owner"))


def _list(data: Data, roles: tuple[str, ...], as_json: bool) -> None:
    from rlhf_cli.server.data_dir import DataDir
    from rlhf_cli.server.times import iso

    with DataDir(data).store() as store:
        rows = [
            {
                "name": token.label,
                "role": token.role,
                "id": token.id,
                "state": "revoked" if token.revoked_at is not None else "simulated" if token.simulated else "active",
                "created": iso(token.created_at),
                "expires": None if token.expires_at is None else iso(token.expires_at),
            }
            for token in store.tokens.all()
            if token.role in roles
        ]
    if as_json:
        out_json(rows)
    else:
        out_rows([{**row, "expires": row["expires"] or "-"} for row in rows])


def _revoke(data: Data, name: str, roles: tuple[str, ...]) -> None:
    from rlhf_cli.server.data_dir import DataDir

    with DataDir(data).store() as store:
        found = [token for token in _of(store.tokens, name, *roles) if token.revoked_at is None]
        if not found:
            raise UsageError(f"there is no active {' or '.join(roles)} {name!r} in {data}")
        for token in found:
            store.tokens.revoke(token.id)
    out(f"revoked: {', '.join(token.id for token in found)}")


def _of(tokens: Tokens, name: str, *roles: str) -> list[Token]:
    """Tokens by name or id."""
    return [token for token in tokens.all() if token.role in roles and name in (token.label, token.id)]
