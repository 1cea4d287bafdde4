"""Rows of panels become a dashboard, with its variables, its links and the marks of what the autopilot did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models

from ess_monitor.alerts.dashboards.parts import GRID_COLUMNS, SOURCE, Placed

TAG = "ess-monitor"
JOB = 'job="$job"'
RUN = f'{JOB}, run_id="$run_id"'
RUN_LINK = "/d/ess-monitor-run?${datasource:queryparam}&${job:queryparam}&${__url_time_range}&var-run_id="
LAYER_LINK = (
    "/d/ess-monitor-layer?${datasource:queryparam}&${job:queryparam}&${run_id:queryparam}&${__url_time_range}"
    "&var-layer=${__field.labels.layer}"
)


@dataclass(frozen=True)
class Section:
    """A heading and the panels below it, from left to right and top to bottom."""

    title: str
    panels: tuple[Placed, ...]


def board(
    uid: str,
    title: str,
    description: str,
    variables: Sequence[builders.QueryVariable],
    sections: Sequence[Section],
    *,
    runs: str,
) -> models.Dashboard:
    """A dashboard. `runs` are the matchers of the runs whose interventions and alerts are marked on it."""
    made = builders.Dashboard(title)
    made.uid(uid)
    made.description(description)
    made.tags([TAG])
    made.timezone("browser")
    made.time("now-6h", "now")
    made.refresh("30s")
    made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.readonly()
    made.link(_links())
    made.with_variable(_source())
    for variable in (_job(), *variables):
        made.with_variable(variable)
    made.annotation(_interventions(runs))
    made.annotation(_alerts(runs))
    finished = made.build()
    finished.panels = _laid_out(sections)
    return finished


def _laid_out(sections: Sequence[Section]) -> list[models.Panel | models.RowPanel]:
    """Ids count by hundreds of the section, so that a panel more changes only those behind it in its section."""
    panels: list[models.Panel | models.RowPanel] = []
    top = 0
    for number, section in enumerate(sections, start=1):
        place = models.GridPos(h=1, w=GRID_COLUMNS, x=0, y=top)
        panels.append(models.RowPanel(title=section.title, grid_pos=place, id_val=100 * number))
        top, left, height = top + 1, 0, 0
        for index, placed in enumerate(section.panels, start=1):
            if left + placed.width > GRID_COLUMNS:
                top, left, height = top + height, 0, 0
            placed.panel.id_val = 100 * number + index
            placed.panel.grid_pos = models.GridPos(h=placed.height, w=placed.width, x=left, y=top)
            panels.append(placed.panel)
            left, height = left + placed.width, max(height, placed.height)
        top += height
    return panels


def values_of(name: str, label: str, query: str, why: str, *, multi: bool = False) -> builders.QueryVariable:
    """A variable whose values are those of a label."""
    variable = builders.QueryVariable(name)
    variable.label(label)
    variable.description(why)
    variable.datasource(SOURCE)
    variable.query(query)
    variable.definition(query)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    variable.sort(models.VariableSort.NATURAL_ASC)
    if multi:
        variable.multi(True)
        variable.include_all(True)
        variable.all_value(".+")
        variable.current(models.VariableOption(selected=True, text="All", value="$__all"))
    return variable


def run_of_job() -> builders.QueryVariable:
    """The run that is looked at."""
    query = f"label_values(ess_monitor_layers{{{JOB}}}, run_id)"
    return values_of("run_id", "Run", query, "The run, as service discovery calls it.")


def _source() -> builders.DatasourceVariable:
    variable = builders.DatasourceVariable("datasource")
    variable.label("Data source")
    variable.description("The Prometheus that scrapes the runs.")
    variable.type("prometheus")
    return variable


def _job() -> builders.QueryVariable:
    query = "label_values(ess_monitor_build_info, job)"
    variable = values_of(
        "job", "Job", query, "Name of the scrape configuration. The rules are written for one of them."
    )
    variable.current(models.VariableOption(selected=True, text="ess_monitor", value="ess_monitor"))
    return variable


def _links() -> builders.DashboardLink:
    link = builders.DashboardLink("Training runs")
    link.type(models.DashboardLinkType.DASHBOARDS)
    link.tags([TAG])
    link.icon("external link")
    link.include_vars(True)
    link.keep_time(True)
    return link


def _interventions(runs: str) -> builders.AnnotationQuery:
    mark = _mark("Interventions", "purple")
    # The value is the moment itself, so that the mark stands where the model was changed and not at the next scrape.
    # All ranks act at the same step: one mark for each action.
    mark.expr(f"max by (run_id, action) (ess_monitor_last_intervention_timestamp_seconds{{{runs}}}) * 1000")
    mark.use_value_for_time(True)
    mark.title_format("{{action}} applied")
    mark.text_format("run {{run_id}}")
    mark.tag_keys("run_id,action")
    return mark


def _alerts(runs: str) -> builders.AnnotationQuery:
    mark = _mark("Firing alerts", "red")
    mark.expr(f'max by (run_id, alertname, severity, layer) (ALERTS{{{runs}, alertstate="firing"}})')
    mark.title_format("{{alertname}}")
    mark.text_format("run {{run_id}} {{layer}}")
    mark.tag_keys("severity,run_id")
    return mark


def _mark(name: str, color: str) -> builders.AnnotationQuery:
    mark = builders.AnnotationQuery()
    mark.name(name)
    mark.datasource(SOURCE)
    mark.enable(True)
    mark.icon_color(color)
    mark.step("15s")
    return mark
