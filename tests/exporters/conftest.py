"""Certificates for the tests of TLS, made anew in every session."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Certificate(NamedTuple):
    """PEM files of a certificate and its key."""

    certfile: Path
    keyfile: Path


def _make(folder: Path, name: str, *options: str) -> Certificate:
    certificate = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={name}", "-days", "2", *options]
    command += ["-keyout", str(certificate.keyfile), "-out", str(certificate.certfile)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate


@pytest.fixture(scope="session")
def tls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH: no certificate to test TLS with")
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="session")
def certificate(tls_folder: Path) -> Certificate:
    """Of the server, self-signed, for 127.0.0.1."""
    return _make(tls_folder, "server", "-addext", "subjectAltName=IP:127.0.0.1")


@pytest.fixture(scope="session")
def client_certificate(tls_folder: Path) -> Certificate:
    """Of a client, self-signed: its own authority."""
    return _make(tls_folder, "client")


@pytest.fixture(scope="session")
def stranger_certificate(tls_folder: Path) -> Certificate:
    """Of a client that no server knows."""
    return _make(tls_folder, "stranger")


@pytest.fixture
def client_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificate.certfile)
    context.check_hostname = False
    return context


@pytest.fixture
def tls_server_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context
