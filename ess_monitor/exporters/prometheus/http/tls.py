"""Makes the server side of TLS from PEM files."""

from __future__ import annotations

import ssl
from pathlib import Path

from ess_monitor.errors import ExporterError, format_error


def server_context(certfile: Path, keyfile: Path | None = None, client_cafile: Path | None = None) -> ssl.SSLContext:
    """Make a context that presents `certfile` and, with `client_cafile`, requires a client certificate signed by it.

    TLS 1.2 or newer, with the ciphers of the Python in use.

    Raises:
        ExporterError: a file is missing, is not a PEM file or needs a password, or key and certificate do not match.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # Without a password function OpenSSL would ask for one on the terminal, and the run would hang there.
        context.load_cert_chain(certfile, keyfile, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ExporterError(
            f"prometheus.certfile={str(certfile)!r}, keyfile={str(keyfile)!r} cannot be used "
            f"({format_error(error)}). Give PEM files of a certificate and its key without a password."
        ) from error
    if client_cafile is not None:
        try:
            context.load_verify_locations(cafile=client_cafile)
        except (OSError, ValueError) as error:
            raise ExporterError(
                f"prometheus.client_cafile={str(client_cafile)!r} cannot be used ({format_error(error)}). "
                "Give a PEM file of the authority that signs the clients' certificates."
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
