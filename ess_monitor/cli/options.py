"""Options that several commands share. They load no torch, so that help and reports come at once."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ess_monitor.capture import LayerFilter

Kwargs = Annotated[str | None, typer.Option(help="Keyword arguments of the class or function, as a JSON object.")]
Layers = Annotated[list[str] | None, typer.Option("--layer", help="Only layers that match this pattern; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class InputKind(str, Enum):
    """Kind of random input."""

    gaussian = "gaussian"
    tokens = "tokens"


class ScaleName(str, Enum):
    """Names of a tolerance's scale, as options of the command line."""

    absolute = "absolute"
    output = "output"


class Unknown(str, Enum):
    """Names of what becomes of layers of an unknown kind, as options of the command line."""

    skip = "skip"
    jacobian = "jacobian"


def layer_filter(patterns: list[str] | None) -> LayerFilter | None:
    """Return the filter of `--layer`."""
    from ess_monitor.capture import LayerFilter

    return LayerFilter(include=tuple(patterns)) if patterns else None
