"""Versions that identify a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def installed_versions() -> dict[str, str]:
    """Versions of this package, torch and Python; "unknown" for a package that runs without being installed."""
    versions = {"python": platform.python_version()}
    for name, distribution in (("ess_monitor", "ess-monitor"), ("torch", "torch")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
