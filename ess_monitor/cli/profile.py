"""`ess-monitor profile`: ESS of a model's layers, or of the paper's featurizers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from enum import Enum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from typer.core import TyperGroup

from ess_monitor.capture import CaptureConfig, LayerFilter
from ess_monitor.cli.model_loading import InputKind, load_model, make_inputs
from ess_monitor.cli.options import AsJson, Kwargs, Layers, layer_filter
from ess_monitor.cli.tables import featurizer_table, print_json, print_table, reading_table
from ess_monitor.cli.weights import load_into
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError, ConfigError, EssMonitorError
from ess_monitor.featurizers import build_mixer
from ess_monitor.inspection import Profile
from ess_monitor.inspection import profile as profile_model

FEATURIZER_ROWS: dict[str, tuple[str, dict[str, float]]] = {
    "LA": ("la", {}),
    "WLA": ("wla", {}),
    "GLA": ("gla", {}),
    "SA": ("sa", {}),
    "S6": ("s6", {}),
    "GLA-S6 alpha=1": ("gla_s6", {"alpha": 1.0}),
    "GLA-S6 alpha=1000": ("gla_s6", {"alpha": 1000.0}),
}
"""Label -> featurizer and options: the six featurizers, GLA-S6 before and after the paper's remedy (section 4.1)."""

Tolerance = Annotated[float, typer.Option(help="tau: singular values above it count.")]


class ScaleName(str, Enum):
    """Names of a tolerance's scale, as options of the command line."""

    absolute = "absolute"
    output = "output"


class Unknown(str, Enum):
    """Names of what becomes of layers of an unknown kind, as options of the command line."""

    skip = "skip"
    jacobian = "jacobian"


_DEFAULT_SCALE = ScaleName(MonitorConfig().tolerance_scale)
ToleranceScale = Annotated[
    ScaleName,
    typer.Option(help="Count singular values above tau, or above tau of what the layer puts out at each token."),
]
Positions = Annotated[str, typer.Option(help="'midpoint', 'all' or a number of positions.")]


class _TargetByDefault(TyperGroup):
    """Reads `profile x:y` as `profile model x:y`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["model", *args]
        return super().parse_args(ctx, args)


profile_app = typer.Typer(
    help="Measure every layer of a model (TARGET, short for `model TARGET`), or of the paper's featurizers.",
    subcommand_metavar="TARGET | COMMAND [ARGS]...",
    cls=_TargetByDefault,
    no_args_is_help=True,
)


@profile_app.command("model")
def profile_target(
    target: Annotated[
        str, typer.Argument(help="package.module:name of a model, or of a class or function that returns one.")
    ],
    kwargs: Kwargs = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights: safetensors, or a torch.save file that holds only tensors.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Cut this off the names in the checkpoint, e.g. 'model.'.")] = "",
    layer: Layers = None,
    kind: Annotated[InputKind, typer.Option("--input", help="Kind of random input.")] = InputKind.gaussian,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    width: Annotated[int | None, typer.Option(min=1, help="Features per token of Gaussian input.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Of tokens; default: the first embedding's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initialization and of the input.")] = 0,
    tolerance: Tolerance = 1e-3,
    tolerance_scale: ToleranceScale = _DEFAULT_SCALE,
    positions: Positions = "8",
    unknown: Annotated[
        Unknown, typer.Option(help="Layers of an unknown kind: 'jacobian' linearizes them, which takes longer.")
    ] = Unknown.skip,
    as_json: AsJson = False,
) -> None:
    """Measure every layer of a model, at initialization or with the weights of a checkpoint."""
    if target == "featurizers":
        raise ConfigError("target: the options come after the word: ess-monitor profile featurizers [OPTIONS]")
    config = _config(batch, length, tolerance, tolerance_scale, positions, layers=layer_filter(layer), unknown=unknown)
    with redirect_stdout(sys.stderr):
        model = load_model(target, kwargs, seed=seed)
        if checkpoint is not None:
            load_into(model, checkpoint, prefix=prefix)
        inputs = make_inputs(model, kind, batch=batch, length=length, width=width, vocab_size=vocab_size, seed=seed)
        result = _profile(model, inputs, config)
    if as_json:
        skipped = [layer.model_dump(mode="json") for layer in result.skipped]
        readings = [reading.model_dump(mode="json") for reading in result.readings]
        print_json(model=result.model, readings=readings, skipped=skipped)
    else:
        title = f"{result.model}, {kind.value} input {tuple(inputs.shape)}, tau {_tau(config)}"
        print_table(reading_table(title, result.readings, result.skipped))


@profile_app.command("featurizers")
def profile_featurizers(
    tss: Annotated[list[int] | None, typer.Option(min=1, help="State size; repeatable. Default 4 8 16 32 64.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Features per token.")] = 64,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens; use at least twice the largest TSS.")] = 128,
    seeds: Annotated[int, typer.Option(min=1, help="Initializations that are averaged.")] = 3,
    tolerance: Tolerance = 1e-3,
    tolerance_scale: ToleranceScale = _DEFAULT_SCALE,
    positions: Positions = "midpoint",
    as_json: AsJson = False,
) -> None:
    """Measure the paper's featurizers at initialization on Gaussian input, for several TSS (Finding 4, figure 4a)."""
    sizes = sorted(set(tss or (4, 8, 16, 32, 64)))
    config = _config(1, length, tolerance, tolerance_scale, positions)
    console = Console(stderr=True)
    cells = [(label, size) for label in FEATURIZER_ROWS for size in sizes]
    measured: dict[str, list[tuple[float, float]]] = {label: [] for label in FEATURIZER_ROWS}
    with redirect_stdout(sys.stderr):
        for label, size in track(cells, console=console, transient=True, disable=not console.is_terminal):
            name, options = FEATURIZER_ROWS[label]
            build = partial(build_mixer, name, width, num_heads, size, **options)
            measured[label].append(_initial_ess(build, f"{label} at TSS {size}", width, seeds, config))
    rows = []
    for label, ess in measured.items():
        tolerance_ess, entropy_ess = (list(column) for column in zip(*ess, strict=True))
        rows.append(
            {
                "featurizer": label,
                "tss": sizes,
                "tolerance_ess": tolerance_ess,
                "entropy_ess": entropy_ess,
                "scaling": scaling(tolerance_ess),
            }
        )
    if as_json:
        settings = {"width": width, "num_heads": num_heads, "length": length, "seeds": seeds}
        print_json(**settings, tolerance=tolerance, tolerance_scale=tolerance_scale.value, rows=rows)
        return
    title = f"tolerance-ESS at initialization: width {width}, {num_heads} heads, {length} tokens, {seeds} seeds"
    title += f", tau {_tau(config)}"
    print_table(featurizer_table(title, sizes, rows))
    if len(sizes) > 1:
        print(_scaling_sentence(rows))
    print("SA has no state of a chosen size: its columns are the dimensions of q and k per head.")
    if 2 * sizes[-1] > length:
        print(
            f"A sequence of {length} tokens cannot show an ESS above {length // 2}: raise --length for the larger TSS."
        )


def scaling(ess: list[float]) -> Literal["rises", "flat", "mixed", "unknown"]:
    """Return how ESS follows TSS.

    It `rises` where every step adds a tenth or more, is `flat` where the largest is at most 1.5 times the smallest, is
    `mixed` otherwise, and `unknown` for a single TSS.

    Example:
        >>> scaling([4, 8, 16, 31.9, 40.1]), scaling([2.3, 2.5, 2.4, 2.3, 2.3]), scaling([4, 8, 8, 8])
        ('rises', 'flat', 'mixed')
    """
    if len(ess) < 2:
        return "unknown"
    if max(ess) <= 1.5 * min(ess):
        return "flat"
    return "rises" if all(after >= 1.1 * before for before, after in pairwise(ess)) else "mixed"


def _config(
    batch: int,
    length: int,
    tolerance: float,
    scale: ScaleName,
    positions: str,
    *,
    layers: LayerFilter | None = None,
    unknown: Unknown = Unknown.skip,
) -> MonitorConfig:
    return MonitorConfig.load(
        environment=False,
        tolerance=tolerance,
        tolerance_scale=scale.value,
        positions=int(positions) if positions.isdecimal() else positions,
        layers=layers or LayerFilter(),
        capture=CaptureConfig(samples=batch, heads=None, max_length=max(length, 2), unknown=unknown.value),
    )


def _tau(config: MonitorConfig) -> str:
    of = " of each token's output" if config.tolerance_scale == "output" else ""
    return f"{config.tolerance:g}{of}"


def _profile(model: nn.Module, inputs: torch.Tensor, config: MonitorConfig) -> Profile:
    try:
        return profile_model(model, inputs, config=config)
    except EssMonitorError:
        raise
    except Exception as error:  # from the model's own code: only the user knows which input it takes
        first_line = next(iter(str(error).splitlines()), "")
        raise CaptureError(
            f"input: {type(model).__name__} does not run on {inputs.dtype} of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {first_line}; set --input, --width, --vocab-size or --length to what it takes"
        ) from error


def _initial_ess(
    build: Callable[[], nn.Module], label: str, width: int, seeds: int, config: MonitorConfig
) -> tuple[float, float]:
    """Return the tolerance- and entropy-ESS of a new mixer, averaged over the seeds."""
    sizes = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        mixer = build()
        length = config.capture.max_length or 0
        inputs = make_inputs(mixer, InputKind.gaussian, batch=1, length=length, width=width, seed=seed)
        [reading] = profile_model(mixer, inputs, config=config).readings
        if reading.effective_size is None or reading.entropy_size is None:
            raise CaptureError(f"featurizer {label}: {reading.status}: {reading.message}")
        sizes.append((reading.effective_size, reading.entropy_size))
    return sum(size for size, _ in sizes) / seeds, sum(size for _, size in sizes) / seeds


def _scaling_sentence(rows: list[dict[str, Any]]) -> str:
    def among(kind: str) -> str:
        return ", ".join(row["featurizer"] for row in rows if row["scaling"] == kind) or "none"

    sentence = f"ESS rises monotonically with TSS: {among('rises')}. Flat: {among('flat')}."
    return sentence if among("mixed") == "none" else f"{sentence} In between: {among('mixed')}."
