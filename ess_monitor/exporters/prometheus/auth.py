"""Checks and sends basic and bearer credentials (RFC 7617, RFC 6750). Secrets are never part of the settings."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr, model_validator

from ess_monitor.errors import ExporterError
from ess_monitor.validation.settings import Settings

_MAX_SECRET_BYTES = 4096


class AuthConfig(Settings):
    """Names the source of credentials: a password with a user name, or a bearer token.

    Settings end up in logs, checkpoints and experiment trackers. So the secret itself cannot be a setting: only the
    file or the environment variable that holds it can.
    """

    holds_secrets: ClassVar[bool] = True

    username: str | None = Field(default=None, min_length=1, pattern=r"^[^:\x00-\x1f\x7f]+$")
    """User of basic authentication, with the secret as the password. None: the secret is a bearer token."""
    secret_file: Path | None = None
    """File with the secret. Surrounding white space is ignored, as Prometheus does for `password_file` and
    `credentials_file`."""
    secret_env: str | None = Field(default=None, min_length=1)
    """Environment variable with the secret, if there is no file. The process's children inherit it."""

    @model_validator(mode="after")
    def _one_source(self) -> AuthConfig:
        if (self.secret_file is None) == (self.secret_env is None):
            raise ValueError("give one of secret_file (a path) and secret_env (the name of a variable), not both")
        return self


@dataclass(frozen=True)
class Credentials:
    """Holds the two words of an Authorization header: the scheme and the value."""

    scheme: Literal["Basic", "Bearer"]
    value: SecretStr

    @property
    def header(self) -> str:
        """The whole header, with the secret in plain text."""
        return f"{self.scheme} {self.value.get_secret_value()}"


def load_credentials(config: AuthConfig, environ: Mapping[str, str] = os.environ) -> Credentials:
    """Read the secret from its source.

    Raises:
        ExporterError: the source holds no secret, or one that cannot be sent in a header. The message never holds any
            part of it.
    """
    secret = _read(config, environ)
    if config.username is not None:
        encoded = base64.b64encode(f"{config.username}:{secret}".encode())
        return Credentials("Basic", SecretStr(encoded.decode("ascii")))
    if not all("!" <= character <= "~" for character in secret):
        raise ExporterError(
            f"auth: the token in {_source(config)} has blanks, control or non-ASCII characters. Give a token of "
            "printable ASCII characters, for example from `openssl rand -hex 32`."
        )
    return Credentials("Bearer", SecretStr(secret))


class Authenticator:
    """Admits requests with the right credentials.

    Only a digest is kept, and digests are compared in constant time: the time of a refusal reveals neither the length
    nor the content of the secret.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._scheme = credentials.scheme
        self._digest = _digest(credentials.value.get_secret_value())

    @property
    def challenge(self) -> dict[str, str]:
        """Header of a 401 that names the way to authenticate."""
        charset = ', charset="UTF-8"' if self._scheme == "Basic" else ""
        return {"WWW-Authenticate": f'{self._scheme} realm="ess_monitor"{charset}'}

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Return whether `headers` (lower-case names) carry the credentials."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(_digest(value.strip()), self._digest) and scheme.lower() == self._scheme.lower()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read(config: AuthConfig, environ: Mapping[str, str]) -> str:
    try:
        if config.secret_file is not None:
            with config.secret_file.open("rb") as file:
                raw = file.read(_MAX_SECRET_BYTES + 1)
            if len(raw) > _MAX_SECRET_BYTES:
                raise ExporterError(f"auth: {_source(config)} is larger than {_MAX_SECRET_BYTES} bytes. Give a secret.")
            secret = raw.decode("utf-8").strip()
        else:
            secret = environ.get(config.secret_env or "", "").strip()
    except OSError as error:
        raise ExporterError(
            f"auth: {_source(config)} cannot be read ({error.strerror}). Give a file that this process may read."
        ) from error
    except UnicodeDecodeError:
        # `from None`: the cause holds the bytes.
        raise ExporterError(f"auth: {_source(config)} is not UTF-8 text. Give a file of one line.") from None
    if not secret:
        raise ExporterError(
            f"auth: there is no secret in {_source(config)}. Set one: an empty secret protects nothing."
        )
    return secret


def _source(config: AuthConfig) -> str:
    if config.secret_file is not None:
        return f"secret_file={str(config.secret_file)!r}"
    return f"the environment variable secret_env={config.secret_env!r}"
