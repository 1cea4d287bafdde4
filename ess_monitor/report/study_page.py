"""The page of a study of many runs."""

from __future__ import annotations

from collections.abc import Callable

from ess_monitor import validation
from ess_monitor.analysis.study_results import Correlation, Study, StudyCell, StudyRun
from ess_monitor.report.components import Table, cell
from ess_monitor.report.page import render

_GRIDS: tuple[tuple[str, Callable[[StudyCell], float | None]], ...] = (
    ("Final metric", lambda each: each.metric),
    ("ESS", lambda each: each.effective_size),
    ("Utilization, ESS / TSS", lambda each: each.utilization_ratio),
    ("Correlation of ESS and metric within runs", lambda each: each.within_correlation),
)


def render_study(study: Study) -> str:
    """Return the page of a study as HTML: correlations, and means over the runs by TSS and demand.

    Args:
        study: what `load_study` returned.

    Returns:
        One whole document; it needs no other file.

    Example:
        >>> page = render_study(Study(metric="accuracy", demand="kv_pairs", runs=()))
        >>> "Study of 0 runs" in page, "<script" in page
        (True, False)
    """
    validation.instance("study", study, Study, hint="load_study(folder) returns one")
    columns = ("task", "layers", "quantity", "runs", "r", "95 % from", "to")
    demand = study.demand or "demand"
    return render(
        "analysis.html",
        title=f"Study of {len(study.runs)} runs: {study.metric}",
        lead=f"How sizes of the state go along with the final {study.metric}, over runs. Intervals are those of the "
        "bootstrap. A correlation says nothing of a cause.",
        table=Table(f"Correlation with {study.metric}", columns, tuple(map(_correlation, study.correlations))),
        notes=[*study.notes, *([f"demand: {study.demand}"] if study.demand else [])],
        charts_title="",
        charts=(),
        details=[*_grids(study, demand), _runs(study, demand)],
        skipped=None,
    )


def _correlation(each: Correlation) -> tuple[str, ...]:
    numbers = (str(each.runs), cell(each.r), cell(each.low), cell(each.high))
    return (each.task or "all", each.featurizer or "all", each.quantity, *numbers)


def _grids(study: Study, demand: str) -> list[Table]:
    """Return a table over TSS and demand for each task, kind of layer and quantity that is known."""
    tables = []
    for kind in dict.fromkeys((each.task, each.featurizer) for each in study.cells):
        cells = [each for each in study.cells if (each.task, each.featurizer) == kind]
        sizes = sorted({each.state_capacity for each in cells})
        demands = sorted({each.demand for each in cells})
        for title, value in _GRIDS:
            known = {(each.state_capacity, each.demand): value(each) for each in cells}
            if all(each is None for each in known.values()):
                continue
            rows = tuple((f"TSS {size:g}", *(cell(known.get((size, each))) for each in demands)) for size in sizes)
            caption = ", ".join(filter(None, (title, *kind)))
            tables.append(Table(caption, ("", *(f"{demand} {each:g}" for each in demands)), rows))
    return tables


def _runs(study: Study, demand: str) -> Table:
    columns = ("run", "task", "layers", demand, "TSS", "ESS", study.metric, "r within the run")
    return Table("Runs", columns, tuple(_run(run) for run in study.runs))


def _run(run: StudyRun) -> tuple[str, ...]:
    numbers = (run.demand, run.state_capacity, run.effective_size, run.metric, run.within_correlation)
    return (run.name, run.task, run.featurizer, *map(cell, numbers))
