"""`ess-monitor reduce`: a checkpoint with smaller states, and what it costs."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ess_monitor.cli.analysis.output import check_outputs, progress, put_out
from ess_monitor.cli.options import AsJson, Checkpoint, Html, Kwargs, Layers, Prefix, Seed, Target
from ess_monitor.errors import ConfigError
from ess_monitor.runtime.files import replace_file

if TYPE_CHECKING:
    from torch import nn

State = Annotated[int, typer.Option(min=1, metavar="R", help="State dimensions per head to keep.")]
Calibrate = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="What decides which dimensions stay: a file of tensors (inputs, targets), or package.module:name of "
        "batches, of a task, or of a function that returns them. The first batch decides.",
    ),
]
Evaluate = Annotated[
    str | None, typer.Option(metavar="DATA", help="Data for loss and accuracy; default: all batches of --calibrate.")
]
Batches = Annotated[int, typer.Option(min=1, help="Batches for loss and accuracy at most.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences of a batch at most.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per sequence that decide at most.")]
Out = Annotated[Path, typer.Option(metavar="FILE", help="Weights to write: *.safetensors, or a torch.save file.")]


def reduce(
    target: Target,
    state: State,
    calibrate: Calibrate,
    out: Out,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    evaluate: Evaluate = None,
    batches: Batches = 8,
    batch: Batch = 16,
    length: Length = 256,
    seed: Seed = 0,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Write a smaller checkpoint, which the same classes load at a state of R, and show what it costs.

    Kept are the state dimensions without which the layers' operators change least on the data. Train on, or distill, if
    the loss is too high: see `distill-check` for what any layer with this state must lose.
    """
    _check_new(out)
    check_outputs(html, as_json, out, checkpoint, calibrate, evaluate)

    from ess_monitor.analysis import reduce as analyze
    from ess_monitor.cli.data import device_of, evaluation, explain, load_batches
    from ess_monitor.cli.measuring import config_of
    from ess_monitor.cli.model_loading import load_model
    from ess_monitor.cli.weights import load_into
    from ess_monitor.errors import EssMonitorError
    from ess_monitor.report import render_reduction

    config = config_of(batch, length, layer)
    with redirect_stdout(sys.stderr):
        model = load_model(target, kwargs, seed=seed)
        if checkpoint is not None:
            load_into(model, checkpoint, prefix=prefix)
        device = device_of(model)
        calibration = [each.to(device) for each in load_batches("calibrate", calibrate, batches, batch)]
        tested = calibration
        if evaluate is not None:
            tested = [each.to(device) for each in load_batches("evaluate", evaluate, batches, batch)]
        first = calibration[0]
        try:
            smaller, result = analyze(
                model,
                *first.args,
                state=state,
                evaluate=evaluation(tested, partial(progress, label="batches")),
                config=config,
                progress=progress,
                **{name: value for name, value in first.kwargs.items() if name != "labels"},
            )
        except EssMonitorError:
            raise
        except Exception as error:  # from the model's own code
            raise explain("calibrate", error) from error
    _write(smaller, out)
    page = render_reduction(result) if html is not None else None
    title = f"{result.model}: states of {result.state}, calibrated on {calibrate}"
    put_out(result, page, title, as_json=as_json, html=html)


def _check_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out: {out} exists, and is not replaced; give a new file")
    if not out.parent.is_dir():
        raise ConfigError(f"out: the folder {out.parent} does not exist; make it, or give a file in another one")


def _write(model: nn.Module, out: Path) -> None:
    from io import BytesIO

    import torch
    from safetensors.torch import save

    # Tensors that share memory, as tied embeddings do, are written one by one: safetensors takes no others.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if out.suffix == ".safetensors":
        content = save(weights)
    else:
        buffer = BytesIO()
        torch.save(weights, buffer)
        content = buffer.getvalue()
    try:
        replace_file(out, content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"out: {out} cannot be written ({reason}); give a file this user may write") from error
    print(out, file=sys.stderr)
