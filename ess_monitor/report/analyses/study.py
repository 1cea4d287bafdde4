"""The page of a study of many runs."""

from __future__ import annotations

from collections.abc import Callable

from ess_monitor import validation
from ess_monitor.analysis.study_results import Correlation, CorrelationDifference, Study, StudyCell, StudyRun
from ess_monitor.records import COLOR_SCALE
from ess_monitor.report.components import Table, cell, present
from ess_monitor.report.figures import STYLES, SYMBOLS, Figure
from ess_monitor.report.labels import plain
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

    Examples:
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
        f"bootstrap over {'configurations' if study.by_configuration else 'runs'}. A correlation says nothing of a "
        "cause.",
        table=Table(
            f"Correlation with {study.metric}, and differences of correlations",
            columns,
            (*map(_correlation, study.correlations), *map(_difference, study.differences)),
        ),
        notes=[*study.notes, *([f"demand: {study.demand}"] if study.demand else [])],
        figures_title=f"{study.metric} over ESS, and means by TSS and {demand}",
        figures=study_figures(study),
        details=[*_grids(study, demand), _runs(study, demand)],
        skipped=None,
    )


def study_figures(study: Study) -> tuple[Figure, ...]:
    """Draw the final metric over ESS, and by TSS and demand."""
    return present(_scatter(study), *(_grid(study, kind, study.demand or "demand") for kind in _kinds(study)))


def _correlation(each: Correlation) -> tuple[str, ...]:
    numbers = (str(each.runs), cell(each.r), cell(each.low), cell(each.high))
    return (each.task or "all", each.featurizer or "all", each.quantity, *numbers)


def _difference(each: CorrelationDifference) -> tuple[str, ...]:
    numbers = (str(each.runs), cell(each.difference), cell(each.low), cell(each.high))
    return (each.task or "all", each.featurizer or "all", f"{each.quantity} minus {each.other}", *numbers)


def _grids(study: Study, demand: str) -> list[Table]:
    """Return a table over TSS and demand for each task, kind of layer and quantity that is known."""
    tables = []
    for kind in _kinds(study):
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


def _kinds(study: Study) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each.task, each.featurizer) for each in study.cells))


def _scatter(study: Study) -> Figure | None:
    """Draw the final metric over ESS, or over ESS by the demand where runs have one: a point for each run."""
    x_label = f"ESS / {study.demand}" if study.demand else "ESS"
    points: dict[str, list[tuple[float, float, str]]] = {}
    for run in study.runs:
        if run.effective_size is not None and run.metric is not None and (run.demand or not study.demand):
            x = run.effective_size / (run.demand or 1.0)
            points.setdefault(", ".join(filter(None, (run.task, run.featurizer))), []).append((x, run.metric, run.name))
    if not points:
        return None
    colors = [style["color"] for name, style in STYLES.items() if name != "limit"]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": plain(kind),
            "x": [x for x, _, _ in found],
            "y": [y for _, y, _ in found],
            "text": [plain(name) for _, _, name in found],
            "hovertemplate": "%{text}<br>%{x:.3g}: %{y:.3g}<extra></extra>",
            "marker": {"color": colors[place % len(colors)], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
        }
        for place, (kind, found) in enumerate(points.items())
    ]
    layout = {
        "height": 340,
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": plain(x_label)}, "type": "linear"},
        "yaxis": {"title": {"text": plain(study.metric)}, "type": "linear"},
    }
    found = [each for each in study.correlations if not each.task and not each.featurizer and each.r is not None]
    summary = "; ".join(f"{each.quantity}: r {each.r:.2f} over {each.runs} runs" for each in found)
    return Figure(f"{study.metric} over {x_label}", summary or "no correlation", data, layout)


def _grid(study: Study, kind: tuple[str, str], demand: str) -> Figure | None:
    """Draw the final metric by TSS and demand as a heat map."""
    cells = [each for each in study.cells if (each.task, each.featurizer) == kind and each.metric is not None]
    sizes, demands = sorted({each.state_capacity for each in cells}), sorted({each.demand for each in cells})
    if len(sizes) < 2 and len(demands) < 2:
        return None
    known = {(each.state_capacity, each.demand): each.metric for each in cells}
    heat = {
        "type": "heatmap",
        "x": [f"{each:g}" for each in demands],
        "y": [f"{each:g}" for each in sizes],
        "z": [[known.get((size, each)) for each in demands] for size in sizes],
        "colorscale": [[place / (len(COLOR_SCALE) - 1), color] for place, color in enumerate(COLOR_SCALE)],
        "colorbar": {"thickness": 10, "xpad": 4, "outlinewidth": 0},
        "hoverongaps": False,
        "hovertemplate": "TSS %{y}, %{x}: %{z:.3g}<extra></extra>",
    }
    layout = {
        "height": 120 + 40 * len(sizes),
        "hovermode": "closest",
        "xaxis": {"title": {"text": plain(demand)}, "type": "category"},
        "yaxis": {"title": {"text": "TSS"}, "type": "category"},
    }
    summary = "; ".join(f"TSS {size:g}, {demand} {each:g}: {cell(value)}" for (size, each), value in known.items())
    return Figure(", ".join(filter(None, (f"Final {study.metric}", *kind))), summary, [heat], layout)


def _runs(study: Study, demand: str) -> Table:
    columns = ("run", "task", "layers", demand, "TSS", "ESS", study.metric, "r within the run")
    return Table("Runs", columns, tuple(_run(run) for run in study.runs))


def _run(run: StudyRun) -> tuple[str, ...]:
    numbers = (run.demand, run.state_capacity, run.effective_size, run.metric, run.within_correlation)
    return (run.name, run.task, run.featurizer, *map(cell, numbers))
