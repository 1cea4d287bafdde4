"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from ess_monitor.capture import LayerFilter

Kwargs = Annotated[str | None, typer.Option(help="Keyword arguments of the class or function, as a JSON object.")]
Layers = Annotated[list[str] | None, typer.Option("--layer", help="Only layers that match this pattern; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def layer_filter(patterns: list[str] | None) -> LayerFilter | None:
    """Return the filter of `--layer`."""
    return LayerFilter(include=tuple(patterns)) if patterns else None
