"""`ess-monitor describe`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ess_monitor.cli.options import AsJson, Kwargs, Layers, layer_filter
from ess_monitor.cli.tables import print_json, print_table
from ess_monitor.errors import ConfigError
from ess_monitor.exporters.terminal.inspected import layer_table


def describe(
    target: Annotated[
        str | None, typer.Argument(help="package.module:name of a model, or of a class or function that returns one.")
    ] = None,
    kwargs: Kwargs = None,
    hf_config: Annotated[Path | None, typer.Option(help="config.json of a transformers model, instead.")] = None,
    layer: Layers = None,
    as_json: AsJson = False,
) -> None:
    """List the layers that can be measured, and why the others cannot. Nothing is run."""
    from ess_monitor.cli.model_loading import load_model, model_of_hf_config
    from ess_monitor.inspection import describe as describe_model

    with redirect_stdout(sys.stderr):
        if target is not None and hf_config is None:
            model = load_model(target, kwargs)
        elif hf_config is not None and target is None:
            model = model_of_hf_config(hf_config)
        else:
            raise ConfigError("target: give either package.module:name or --hf-config FILE")
    description = describe_model(model, layers=layer_filter(layer))
    if as_json:
        layers = [info.model_dump(mode="json") for info in description.layers]
        print_json(model=description.model, sample_cost=description.sample_cost, layers=layers)
    elif not description.layers:
        print(f"{description.model}: no layer looks like a sequence mixer")
    else:
        counted = f"{len(description.supported)} of {len(description.layers)} sequence mixers can be measured"
        print_table(layer_table(f"{description.model}: {counted}", description.layers, description.sample_cost))
