"""The libraries whose layers are known, and the versions that they were tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from torch import nn

TESTED: dict[str, tuple[str, str]] = {
    "transformers": ("transformers", "5.23.0"),
    "fla": ("flash-linear-attention", "0.6.0"),
    "mamba_ssm": ("mamba_ssm", "2.3.2.post1"),
}
"""Import name -> (distribution, version that the tests run with)."""


def library_of(module: nn.Module) -> str | None:
    """Import name of the known library that a module's class comes from."""
    name = type(module).__module__.partition(".")[0]
    return name if name in TESTED else None


def versions_of(library: str) -> str:
    """What is installed, and what was tested, in words.

    >>> versions_of("fla").endswith("tested with 0.6.0")
    True
    """
    distribution, tested = TESTED[library]
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        installed = "of an unknown version"
    return f"{distribution} {installed}, tested with {tested}"
