"""`ess-monitor profile`: ESS of a model's layers, or of the paper's featurizers."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track
from typer.core import TyperGroup

from ess_monitor.cli.analysis.output import check_outputs, progress, put_out
from ess_monitor.cli.options import (
    AsJson,
    Batch,
    Checkpoint,
    Html,
    Input,
    InputKind,
    Kwargs,
    Layers,
    Length,
    Prefix,
    ScaleName,
    Seed,
    Target,
    ToleranceScale,
    Unknown,
    VocabSize,
    Width,
    whole_numbers,
)
from ess_monitor.cli.tables import featurizer_table, print_json, print_table
from ess_monitor.errors import ConfigError
from ess_monitor.exporters.terminal.inspected import reading_table

Tolerance = Annotated[float, typer.Option(help="tau: singular values above it count.")]
Positions = Annotated[str, typer.Option(help="'midpoint', 'all' or a number of positions.")]


class _TargetByDefault(TyperGroup):
    """Reads `profile x:y` as `profile model x:y`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["model", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the options of TARGET after the commands."""
        super().format_help(ctx, formatter)
        model = self.commands["model"]
        model.format_help(type(ctx)(model, info_name=ctx.info_name, parent=ctx.parent), formatter)


profile_app = typer.Typer(
    help="Measure every layer of a model (TARGET, short for `model TARGET`), or of the paper's featurizers.",
    subcommand_metavar="TARGET | COMMAND [ARGS]...",
    cls=_TargetByDefault,
    no_args_is_help=True,
)


@profile_app.command("model")
def profile_target(
    target: Target,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    kind: Input = InputKind.gaussian,
    batch: Batch = 4,
    length: Length = 128,
    width: Width = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    tolerance: Tolerance = 1e-3,
    tolerance_scale: ToleranceScale = ScaleName.absolute,
    positions: Positions = "8",
    unknown: Annotated[
        Unknown, typer.Option(help="Layers of an unknown kind: 'jacobian' linearizes them, which takes longer.")
    ] = Unknown.skip,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="ESS at the midpoint of the first N tokens, and the norm of A's product."),
    ] = None,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Measure every layer of a model, at initialization or with the weights of a checkpoint.

    With --lengths it is measured on the first tokens of one long input; --length and --positions then do not count.
    """
    from ess_monitor.analysis import length_profile
    from ess_monitor.cli.measuring import config_of, loaded, run_on, tau
    from ess_monitor.inspection import profile
    from ess_monitor.report import render_length_profile

    if target == "featurizers":
        raise ConfigError("target: the options come after the word: ess-monitor profile featurizers [OPTIONS]")
    if html is not None and lengths is None:
        raise ConfigError("html: a page is written with --lengths only; add --lengths 64,256,1024, or leave out --html")
    check_outputs(html, as_json, checkpoint)
    tokens = () if lengths is None else whole_numbers("lengths", lengths, 2)
    length = max(tokens, default=length)
    measured_by = _measured_by(tolerance, tolerance_scale, positions)
    config = config_of(batch, length, layer, unknown=unknown, **measured_by)
    with redirect_stdout(sys.stderr):
        model, inputs = loaded(target, kwargs, checkpoint, prefix, kind, batch, length, width, vocab_size, seed)
        if lengths is None:
            result = run_on(model, inputs, profile, config=config, progress=progress)
        else:
            over = run_on(model, inputs, length_profile, lengths=tokens, config=config, progress=progress)
    title = f"{type(model).__name__}, {kind.value} input {tuple(inputs.shape)}, tau {tau(config)}"
    if lengths is not None:
        put_out(over, render_length_profile(over) if html is not None else None, title, as_json=as_json, html=html)
    elif as_json:
        skipped = [layer.model_dump(mode="json") for layer in result.skipped]
        readings = [reading.model_dump(mode="json") for reading in result.readings]
        print_json(model=result.model, readings=readings, skipped=skipped)
    else:
        print_table(reading_table(title, result.readings, result.skipped))


@profile_app.command("featurizers")
def profile_featurizers(
    tss: Annotated[list[int] | None, typer.Option(min=1, help="State size; repeatable. Default 4 8 16 32 64.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Features per token.")] = 64,
    num_heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens; use at least twice the largest TSS.")] = 128,
    seeds: Annotated[int, typer.Option(min=1, help="Initializations that are averaged.")] = 3,
    tolerance: Tolerance = 1e-3,
    tolerance_scale: ToleranceScale = ScaleName.absolute,
    positions: Positions = "midpoint",
    as_json: AsJson = False,
) -> None:
    """Measure the paper's featurizers at initialization on Gaussian input, for several TSS (Finding 4, figure 4a)."""
    from ess_monitor.cli.measuring import FEATURIZER_ROWS, config_of, initial_ess, tau

    sizes = sorted(set(tss or (4, 8, 16, 32, 64)))
    config = config_of(1, length, **_measured_by(tolerance, tolerance_scale, positions))
    console = Console(stderr=True)
    cells = [(label, size) for label in FEATURIZER_ROWS for size in sizes]
    measured: dict[str, list[tuple[float, float]]] = {label: [] for label in FEATURIZER_ROWS}
    with redirect_stdout(sys.stderr):
        for label, size in track(cells, console=console, transient=True, disable=not console.is_terminal):
            measured[label].append(initial_ess(label, width, num_heads, size, seeds, config))
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
    title += f", tau {tau(config)}"
    print_table(featurizer_table(title, sizes, rows))
    if len(sizes) > 1:
        print(_scaling_sentence(rows))
    print("SA has no state of a chosen size: its columns are the dimensions of q and k per head.")
    if 2 * sizes[-1] > length:
        print(
            f"A sequence of {length} tokens cannot show an ESS above {length // 2}: raise --length for the larger TSS."
        )


def _measured_by(tolerance: float, scale: ScaleName, positions: str) -> dict[str, Any]:
    """Return the settings that say how a layer is measured."""
    places = int(positions) if positions.isdecimal() else positions
    return {"tolerance": tolerance, "tolerance_scale": scale.value, "positions": places}


def scaling(ess: list[float]) -> Literal["rises", "flat", "mixed", "unknown"]:
    """Return how ESS follows TSS.

    It `rises` where every step adds a tenth or more, is `flat` where the largest is at most 1.5 times the smallest, is
    `mixed` otherwise, and `unknown` for a single TSS.

    Examples:
        >>> scaling([4, 8, 16, 31.9, 40.1]), scaling([2.3, 2.5, 2.4, 2.3, 2.3]), scaling([4, 8, 8, 8])
        ('rises', 'flat', 'mixed')
    """
    if len(ess) < 2:
        return "unknown"
    if max(ess) <= 1.5 * min(ess):
        return "flat"
    return "rises" if all(after >= 1.1 * before for before, after in pairwise(ess)) else "mixed"


def _scaling_sentence(rows: list[dict[str, Any]]) -> str:
    def among(kind: str) -> str:
        return ", ".join(row["featurizer"] for row in rows if row["scaling"] == kind) or "none"

    sentence = f"ESS rises monotonically with TSS: {among('rises')}. Flat: {among('flat')}."
    return sentence if among("mixed") == "none" else f"{sentence} In between: {among('mixed')}."
