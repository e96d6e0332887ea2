"""Who we are to a flow service. Secrets stay in memory and never reach a message."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from rlhf_cli.errors import CredentialsError

CLIENT_ID, CLIENT_SECRET, TOKEN_FILE = "RAPIDATA_CLIENT_ID", "RAPIDATA_CLIENT_SECRET", "RAPIDATA_TOKEN_FILE"
STORED = Path(".config/rapidata/credentials.json")
"""Where the vendor's login leaves credentials, under the home folder."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A client id with its secret, which buy short-lived tokens; or a token as it is; or a file that holds one."""

    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    """Kept fresh by another process, and read again whenever the token in memory is near its end or refused."""
    origin: str = "the credentials given"
    """Where they came from, for messages."""

    @property
    def basic(self) -> str:
        """Id and secret as HTTP Basic authentication wants them."""
        return base64.b64encode(f"{self.client_id}:{self.client_secret}".encode()).decode()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown, in every form in which it is sent."""
        return (
            *((self.basic, self.client_secret) if self.client_secret else ()),
            *((self.token,) if self.token else ()),
        )

    def redact(self, text: str) -> str:
        """`text` without the secrets, should a service send them back."""
        for secret in self.secrets:
            text = text.replace(secret, "[redacted]")
        return text


def credentials_from_environment(
    client_id_env: str = CLIENT_ID,
    client_secret_env: str = CLIENT_SECRET,
    token_env: str | None = None,
    environment: Mapping[str, str] = os.environ,
    auth_url: str | None = None,
) -> Credentials:
    """Read credentials from the named environment variables; a token, where its variable is named, goes first.

    Args:
        auth_url: Of the vendor's identity service. With it, and no variable named otherwise, the vendor's order holds:
            the file named by RAPIDATA_TOKEN_FILE, the two variables, then what the vendor's login stored for this URL.

    Raises:
        CredentialsError: There are none, or those found cannot be used; the message names where.
    """
    if token_env is not None:
        if token := environment.get(token_env, "").strip():
            if not usable(token):
                raise CredentialsError(f"The environment variable {token_env} holds something that is no token.")
            return Credentials(token=token, origin=f"${token_env}")
        raise CredentialsError(f"The environment variable {token_env} is not set. Set it to the flow service's token.")
    vendors_order = auth_url is not None and (client_id_env, client_secret_env) == (CLIENT_ID, CLIENT_SECRET)
    if vendors_order and (name := environment.get(TOKEN_FILE, "").strip()):
        path = Path(name).expanduser()
        read_token_file(path)
        return Credentials(token_file=path, origin=f"${TOKEN_FILE} ({path})")
    missing = [name for name in (client_id_env, client_secret_env) if not environment.get(name, "").strip()]
    if auth_url is not None and vendors_order and len(missing) == 2 and (stored := _stored(auth_url)):
        return stored
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


def read_token_file(path: Path) -> tuple[str, float | None]:
    """The token in a file of the vendor's form, and the Unix time at which it ends, if the file says.

    Raises:
        CredentialsError: The file cannot be read or holds no token.
    """
    try:
        held = _TokenFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CredentialsError(f"The token file {path} (${TOKEN_FILE}) cannot be read: {error.strerror}.") from error
    except ValidationError:
        held = None
    if held is None or not usable(held.access_token):
        # The cause would hold the file's content.
        raise CredentialsError(
            f'The token file {path} (${TOKEN_FILE}) holds no token, {{"access_token": ..., "expires_at": ...}}. '
            "Is the process that writes it running?"
        )
    return held.access_token, held.expires_at


def usable(token: str) -> bool:
    """Whether a token can stand in a header."""
    return token.isascii() and token.isprintable() and " " not in token and bool(token)


class _TokenFile(BaseModel):
    access_token: str
    expires_at: FiniteFloat | None = None


class _Entry(BaseModel):
    client_id: str = Field(min_length=1)
    client_secret: str = Field(min_length=1)
    last_used: str | None = None
    """ISO 8601, so that the order of texts is that of times."""


_entries: TypeAdapter[dict[str, list[_Entry]]] = TypeAdapter(dict[str, list[_Entry]])


def _stored(auth_url: str) -> Credentials | None:
    """What the vendor's login stored for `auth_url`, the one used last; None where there is nothing."""
    path = Path.home() / STORED
    try:
        content = path.read_bytes()
        shared = os.name == "posix" and path.stat().st_mode & 0o077
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CredentialsError(f"{path} cannot be read: {error.strerror}.") from error
    if shared:
        raise CredentialsError(f"{path} holds a secret that others on this machine may read. Run: chmod 600 {path}")
    try:
        by_url = _entries.validate_json(content)
    except ValidationError:
        raise CredentialsError(  # the cause would hold the file's content
            f"{path} is not what the vendor's login writes. Log in again, or set {CLIENT_ID} and {CLIENT_SECRET}."
        ) from None
    found = [entry for url, entries in by_url.items() if url.rstrip("/") == auth_url.rstrip("/") for entry in entries]
    if not found:
        return None
    entry = max(found, key=lambda entry: entry.last_used or "")
    return Credentials(client_id=entry.client_id, client_secret=entry.client_secret, origin=str(path))
