"""`ess-monitor study`: how sizes go along with what was learned, over many runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ess_monitor.cli.analysis.output import check_outputs, progress, put_out
from ess_monitor.cli.options import AsJson, Html
from ess_monitor.report import load_study, render_study

Metric = Annotated[str | None, typer.Option(help="Task metric; default: that of the runs' diagnosis.")]
Demand = Annotated[
    str | None,
    typer.Option(
        help="Hyperparameter that says what a task asks a memory for; default: kv_pairs, num_kv_pairs, kv or "
        "tokens_to_copy."
    ),
]
Resamples = Annotated[int, typer.Option(min=0, help="Of the bootstrap of the intervals; 0: none.")]
ByConfiguration = Annotated[
    bool,
    typer.Option(
        "--by-configuration",
        help="Resample configurations (task, layers, TSS and demand), not runs: their seeds stay together.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the bootstrap.")]


def study(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the runs' event logs.")],
    metric: Metric = None,
    demand: Demand = None,
    resamples: Resamples = 1000,
    by_configuration: ByConfiguration = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Correlate ESS, TSS and both over the task's demand with the final metric, over all runs in a folder.

    What tells runs apart (task, featurizer, kv_pairs) is read from their hyperparameters, a setting of the monitor.
    """
    check_outputs(html, as_json)
    logs = partial(progress, label="logs")
    result = load_study(
        folder, metric=metric, demand=demand, resamples=resamples, by_configuration=by_configuration, seed=seed,
        progress=logs,
    )  # fmt: skip
    page = render_study(result) if html is not None else None
    put_out(result, page, f"{len(result.runs)} runs in {folder}", as_json=as_json, html=html)
