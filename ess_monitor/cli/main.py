"""`ess-monitor`: what the package can say of a model from a shell.

    ess-monitor describe TARGET               which layers can be measured, and why the others cannot; nothing is run
    ess-monitor describe --hf-config FILE     the same for the model of a transformers config.json, without its weights
    ess-monitor profile TARGET                ESS of every layer, from one forward pass on random input
    ess-monitor profile featurizers           the paper's featurizers at initialization (its Finding 4)
    ess-monitor report RUN_DIR                one HTML page about a run, from its event log
    ess-monitor compare RUN_A RUN_B           one HTML page that sets two runs side by side
    ess-monitor alerts export DIR             alerting rules, dashboards and runbooks, as files

TARGET is `package.module:name`: a torch module, or a class or function that makes one. Results go to standard output,
as a table or with `--json`; everything else goes to standard error. Exit status 2 after an `error:` line.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from enum import Enum
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
from ess_monitor.cli.alerts import alerts_app
from ess_monitor.cli.model_loading import load_model, make_inputs, model_of_hf_config
from ess_monitor.cli.report import compare, report
from ess_monitor.cli.tables import featurizer_table, layer_table, reading_table
from ess_monitor.cli.weights import load_into
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError, ConfigError, EssMonitorError
from ess_monitor.featurizers import build_mixer
from ess_monitor.inspection import Profile
from ess_monitor.inspection import describe as describe_model
from ess_monitor.inspection import profile as profile_model
from ess_monitor.pipeline.run_info import installed_versions
from ess_monitor.records import SCHEMA_VERSION

FEATURIZER_ROWS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("LA", "la", {}),
    ("WLA", "wla", {}),
    ("GLA", "gla", {}),
    ("SA", "sa", {}),
    ("S6", "s6", {}),
    ("GLA-S6 alpha=1", "gla_s6", {"alpha": 1.0}),
    ("GLA-S6 alpha=1000", "gla_s6", {"alpha": 1000.0}),
)
"""(label, featurizer, options): the six featurizers, GLA-S6 before and after the paper's remedy (section 4.1)."""


class InputKind(str, Enum):
    """What the model is fed."""

    gaussian = "gaussian"
    tokens = "tokens"


class _TargetByDefault(TyperGroup):
    """A group whose first word may be a TARGET: `profile x:y` is `profile model x:y`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["model", *args]
        return super().parse_args(ctx, args)


_SETTINGS: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(help="See how much of its memory a sequence model uses.", **_SETTINGS)
profile_app = typer.Typer(
    help="Measure every layer of a model (TARGET, short for `model TARGET`), or of the paper's featurizers.",
    subcommand_metavar="TARGET | COMMAND [ARGS]...",
    cls=_TargetByDefault,
    **_SETTINGS,
)
app.add_typer(profile_app, name="profile")

Target = Annotated[str, typer.Argument(help="package.module:name of a torch module or of what makes one.")]
Kwargs = Annotated[str | None, typer.Option(help="Keyword arguments of the factory, as a JSON object.")]
Layers = Annotated[list[str] | None, typer.Option("--layer", help="Only layers that match this pattern; repeatable.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights: safetensors, or a torch.save file of tensors alone.")]
Prefix = Annotated[str, typer.Option(help="Cut this off the names in the checkpoint, e.g. 'model.'.")]
Seed = Annotated[int, typer.Option(help="Of the initialization and of the input.")]
Tolerance = Annotated[float, typer.Option(help="tau: singular values above it count.")]
Positions = Annotated[str, typer.Option(help="'midpoint', 'all' or a number of positions.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ess-monitor {installed_versions()['ess_monitor']}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """See how much of its memory a sequence model uses."""


@app.command()
def describe(
    target: Annotated[str | None, typer.Argument(help="package.module:name of a model or of what makes one.")] = None,
    kwargs: Kwargs = None,
    hf_config: Annotated[Path | None, typer.Option(help="config.json of a transformers model, instead.")] = None,
    layer: Layers = None,
    as_json: AsJson = False,
) -> None:
    """List the layers that can be measured, and why the others cannot. Nothing is run."""
    if (target is None) == (hf_config is None):
        raise ConfigError("target: give either package.module:name or --hf-config FILE, one of them")
    with redirect_stdout(sys.stderr):
        model = load_model(target, kwargs) if target is not None else model_of_hf_config(hf_config or Path())
    description = describe_model(model, layers=_layers(layer))
    layers = [info.model_dump(mode="json") for info in description.layers]
    if as_json:
        _print_json(model=description.model, layers=layers)
    elif not layers:
        print(f"{description.model}: nothing in it looks like a layer that mixes along the sequence")
    else:
        counted = f"{len(description.supported)} of {len(layers)} sequence mixers can be measured"
        _console().print(layer_table(f"{description.model}: {counted}", description.layers))


@profile_app.command("model")
def profile_target(
    target: Target,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    kind: Annotated[InputKind, typer.Option("--input", help="What the model is fed.")] = InputKind.gaussian,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    width: Annotated[int | None, typer.Option(min=1, help="Features per token of Gaussian input.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Of tokens; default: the first embedding's.")] = None,
    seed: Seed = 0,
    tolerance: Tolerance = 1e-3,
    positions: Positions = "8",
    as_json: AsJson = False,
) -> None:
    """Measure every layer of a model, at initialization or with the weights of a checkpoint."""
    if target == "featurizers":
        raise ConfigError("target: the options come after the word: ess-monitor profile featurizers [OPTIONS]")
    config = _config(batch, length, tolerance, positions, layers=_layers(layer))
    with redirect_stdout(sys.stderr):
        model = load_model(target, kwargs, seed=seed)
        if checkpoint is not None:
            load_into(model, checkpoint, prefix=prefix)
        inputs = make_inputs(
            model, kind.value, batch=batch, length=length, width=width, vocab_size=vocab_size, seed=seed
        )
        result = _profile(model, inputs, config)
    if as_json:
        _print_json(model=result.model, readings=[reading.model_dump(mode="json") for reading in result.readings])
    else:
        title = f"{result.model}, {kind.value} input {tuple(inputs.shape)}, tau {tolerance:g}"
        _console().print(reading_table(title, result.readings))


@profile_app.command("featurizers")
def profile_featurizers(
    tss: Annotated[list[int] | None, typer.Option(min=1, help="State size; repeatable. Default 4 8 16 32 64.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Features per token.")] = 64,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens; at least twice the largest TSS leaves it room.")] = 128,
    seeds: Annotated[int, typer.Option(min=1, help="Initializations that are averaged.")] = 3,
    tolerance: Tolerance = 1e-3,
    positions: Positions = "midpoint",
    as_json: AsJson = False,
) -> None:
    """ESS of the paper's featurizers at initialization on Gaussian input, for several TSS (Finding 4, figure 4a)."""
    sizes = sorted(set(tss or (4, 8, 16, 32, 64)))
    config = _config(1, length, tolerance, positions)
    cells = [(label, name, options, size) for label, name, options in FEATURIZER_ROWS for size in sizes]
    console = Console(stderr=True)
    measured: dict[str, list[tuple[float, float]]] = {label: [] for label, _, _ in FEATURIZER_ROWS}
    with redirect_stdout(sys.stderr):
        for label, name, options, size in track(
            cells, console=console, transient=True, disable=not console.is_terminal
        ):
            measured[label].append(_initial_ess(name, width, num_heads, size, options, range(seeds), config))
    rows = [
        {
            "featurizer": label,
            "tss": sizes,
            "tolerance_ess": [tolerance_ess for tolerance_ess, _ in ess],
            "entropy_ess": [entropy_ess for _, entropy_ess in ess],
            "scaling": scaling([tolerance_ess for tolerance_ess, _ in ess]),
        }
        for label, ess in measured.items()
    ]
    if as_json:
        _print_json(width=width, num_heads=num_heads, length=length, seeds=seeds, tolerance=tolerance, rows=rows)
        return
    title = f"tolerance-ESS at initialization: width {width}, {num_heads} heads, {length} tokens, {seeds} seeds"
    _console().print(featurizer_table(title, sizes, rows))
    if len(sizes) > 1:
        print(_scaling_sentence(rows))
    print("SA has no state of a chosen size: its columns are the dimensions of q and k per head.")
    if 2 * sizes[-1] > length:
        print(
            f"A sequence of {length} tokens cannot show an ESS above {length // 2}: raise --length for the larger TSS."
        )


def scaling(ess: list[float]) -> Literal["rises", "flat", "mixed", "unknown"]:
    """How ESS follows TSS: `rises` at every step by a tenth or more, stays `flat` (largest at most 1.5 times the
    smallest), is `mixed`, or `unknown` from a single TSS.

    Example:
        >>> scaling([4, 8, 16, 31.9, 40.1]), scaling([2.3, 2.5, 2.4, 2.3, 2.3]), scaling([4, 8, 8, 8])
        ('rises', 'flat', 'mixed')
    """
    if len(ess) < 2:
        return "unknown"
    if max(ess) <= 1.5 * min(ess):
        return "flat"
    return "rises" if all(after >= 1.1 * before for before, after in pairwise(ess)) else "mixed"


app.command()(report)
app.command()(compare)
app.add_typer(alerts_app, name="alerts")


def main() -> None:
    """The `ess-monitor` command."""
    try:
        app(prog_name="ess-monitor")
    except EssMonitorError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _profile(model: nn.Module, inputs: torch.Tensor, config: MonitorConfig) -> Profile:
    try:
        return profile_model(model, inputs, config=config)
    except EssMonitorError:
        raise
    except Exception as error:  # the model's own code, on an input that only the user can know to be right
        first_line = next(iter(str(error).splitlines()), "")
        raise CaptureError(
            f"input: {type(model).__name__} does not run on {inputs.dtype} of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {first_line}; set --input, --width, --vocab-size or --length to what it takes"
        ) from error


def _initial_ess(
    name: str,
    width: int,
    num_heads: int,
    state_size: int,
    options: dict[str, float],
    seeds: range,
    config: MonitorConfig,
) -> tuple[float, float]:
    """Tolerance- and entropy-ESS of a fresh mixer, averaged over the seeds."""
    sizes = []
    for seed in seeds:
        torch.manual_seed(seed)
        mixer = build_mixer(name, width, num_heads, state_size, **options)
        inputs = make_inputs(mixer, "gaussian", batch=1, length=config.capture.max_length or 0, width=width, seed=seed)
        [reading] = profile_model(mixer, inputs, config=config).readings
        if reading.effective_size is None or reading.entropy_size is None:
            raise CaptureError(f"featurizer {name} at TSS {state_size}: {reading.status}: {reading.message}")
        sizes.append((reading.effective_size, reading.entropy_size))
    return sum(size for size, _ in sizes) / len(sizes), sum(size for _, size in sizes) / len(sizes)


def _scaling_sentence(rows: list[dict[str, Any]]) -> str:
    def among(kind: str) -> str:
        return ", ".join(row["featurizer"] for row in rows if row["scaling"] == kind) or "none"

    sentence = f"ESS rises monotonically with TSS: {among('rises')}. Flat: {among('flat')}."
    return sentence if among("mixed") == "none" else f"{sentence} In between: {among('mixed')}."


def _config(
    batch: int, length: int, tolerance: float, positions: str, *, layers: LayerFilter | None = None
) -> MonitorConfig:
    return MonitorConfig.load(
        environment=False,
        tolerance=tolerance,
        positions=int(positions) if positions.isdecimal() else positions,
        layers=layers or LayerFilter(),
        capture=CaptureConfig(samples=batch, heads=None, max_length=max(length, 2)),
    )


def _layers(patterns: list[str] | None) -> LayerFilter | None:
    return LayerFilter(include=tuple(patterns)) if patterns else None


def _console() -> Console:
    """As wide as the terminal; wide enough for dotted module names where there is none."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)


def _print_json(**content: Any) -> None:
    print(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
