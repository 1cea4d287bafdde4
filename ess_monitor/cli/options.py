"""Options that several commands share. They load no torch, so that help and reports come at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ess_monitor.errors import ConfigError

if TYPE_CHECKING:
    from ess_monitor.capture import LayerFilter

Kwargs = Annotated[str | None, typer.Option(help="Keyword arguments of the class or function, as a JSON object.")]
Layers = Annotated[list[str] | None, typer.Option("--layer", help="Only layers that match this pattern; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Html = Annotated[
    str | None, typer.Option(metavar="FILE", help="Also write one HTML page with figures; '-' is standard output.")
]
Target = Annotated[
    str, typer.Argument(help="package.module:name of a model, or of a class or function that returns one.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights: safetensors, or a torch.save file that holds only tensors.")
]
Prefix = Annotated[str, typer.Option(help="Cut this off the names in the checkpoint, e.g. 'model.'.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens per sequence.")]
Width = Annotated[int | None, typer.Option(min=1, help="Features per token of Gaussian input.")]
VocabSize = Annotated[int | None, typer.Option(min=1, help="Of tokens; default: the first embedding's.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the initialization and of the input.")]


class InputKind(str, Enum):
    """Kind of random input."""

    gaussian = "gaussian"
    tokens = "tokens"


Input = Annotated[InputKind, typer.Option("--input", help="Kind of random input.")]


class ScaleName(str, Enum):
    """Names of a tolerance's scale, as options of the command line."""

    absolute = "absolute"
    output = "output"


ToleranceScale = Annotated[
    ScaleName, typer.Option(help="Count singular values above tau of what the layer puts out at each token, or of 1.")
]


class Unknown(str, Enum):
    """Names of what becomes of layers of an unknown kind, as options of the command line."""

    skip = "skip"
    jacobian = "jacobian"


def whole_numbers(name: str, text: str, least: int) -> tuple[int, ...]:
    """Return the whole numbers of an option like `4,8,16`.

    >>> whole_numbers("lengths", "64, 256", 2)
    (64, 256)
    """
    try:
        numbers = tuple(int(each) for each in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least:
        raise ConfigError(f"{name}: {text!r} is not a list of whole numbers from {least} up; write it as 4,8,16")
    return numbers


def layer_filter(patterns: list[str] | None) -> LayerFilter | None:
    """Return the filter of `--layer`."""
    from ess_monitor.capture import LayerFilter

    return LayerFilter(include=tuple(patterns)) if patterns else None
