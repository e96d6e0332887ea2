"""Who we are to a flow service. Secrets come from the environment, stay in memory and never reach a message."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_cli.errors import CredentialsError


@dataclass(frozen=True, slots=True)
class Credentials:
    """Either a client id with its secret, which buy short-lived tokens, or a token as it is."""

    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    origin: str = "the credentials given"
    """Where they came from, for messages."""

    def redact(self, text: str) -> str:
        """`text` without the secrets, should a service send them back."""
        for secret in (self.client_secret, self.token):
            text = text.replace(secret, "[redacted]") if secret else text
        return text


def credentials_from_environment(
    client_id_env: str = "RAPIDATA_CLIENT_ID",
    client_secret_env: str = "RAPIDATA_CLIENT_SECRET",
    token_env: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Credentials:
    """Read credentials from the named environment variables; a token, where its variable is named, goes first.

    Raises:
        CredentialsError: A variable is not set or empty; the message names it.
    """
    if token_env is not None:
        if token := environment.get(token_env, "").strip():
            return Credentials(token=token, origin=f"${token_env}")
        raise CredentialsError(f"The environment variable {token_env} is not set. Set it to the flow service's token.")
    missing = [name for name in (client_id_env, client_secret_env) if not environment.get(name, "").strip()]
    if missing:
        raise CredentialsError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. "
            "Set the client id and secret of the flow service in the environment."
        )
    return Credentials(
        client_id=environment[client_id_env].strip(),
        client_secret=environment[client_secret_env].strip(),
        origin=f"${client_id_env} and ${client_secret_env}",
    )
