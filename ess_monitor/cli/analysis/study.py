"""`ess-monitor study`: how sizes go along with what was learned, over many runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ess_monitor.analysis.study_results import Correlation, CorrelationDifference, Study
from ess_monitor.cli.analysis.output import progress, put_out
from ess_monitor.cli.options import AsJson, Html
from ess_monitor.cli.tables import plain_table
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
    logs = partial(progress, label="logs")
    result = load_study(
        folder, metric=metric, demand=demand, resamples=resamples, by_configuration=by_configuration, seed=seed,
        progress=logs,
    )  # fmt: skip
    page = render_study(result) if html is not None else None
    put_out(result.model_dump(mode="json"), _table(f"{len(result.runs)} runs in {folder}", result), page,
            as_json=as_json, html=html)  # fmt: skip


def _table(title: str, result: Study) -> Table:
    table = plain_table(title, "task", "layers", "quantity", numbers=("runs", f"r with {result.metric}", "95 %"))
    for each in result.correlations:
        table.add_row(*_group(each), each.quantity, str(each.runs), _signed(each.r), _interval(each))
    for pair in result.differences:
        compared = f"{pair.quantity} minus {pair.other}"
        table.add_row(*_group(pair), compared, str(pair.runs), _signed(pair.difference), _interval(pair))
    lines = [*result.notes]
    if result.demand:
        lines.append(f"demand: the hyperparameter {result.demand}")
    lines += _cell_lines(result)
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def _group(each: Correlation | CorrelationDifference) -> tuple[str, str]:
    return each.task or "all", each.featurizer or "all"


def _signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+.2f}"


def _interval(each: Correlation | CorrelationDifference) -> str:
    return "-" if each.low is None or each.high is None else f"{each.low:+.2f} to {each.high:+.2f}"


def _cell_lines(result: Study) -> list[str]:
    """Return the grid in words: metric, utilization and the correlation within runs by TSS and demand."""
    lines = []
    for cell in result.cells:
        numbers = (("metric", cell.metric), ("ESS", cell.effective_size), ("used", cell.utilization_ratio))
        known = [f"{name} {value:.3g}" for name, value in (*numbers, ("r within runs", cell.within_correlation))
                 if value is not None]  # fmt: skip
        place = " ".join(filter(None, (cell.task, cell.featurizer)))
        lines.append(
            f"{place or 'runs'}, TSS {cell.state_capacity:g}, {result.demand} {cell.demand:g} ({cell.runs} runs): "
            + ", ".join(known)
        )
    return lines
