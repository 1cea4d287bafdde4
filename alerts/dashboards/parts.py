"""Panels as this project wants them: every one says what it shows, why one would look, and in which unit.

The SDK's builders change themselves and return themselves; here they are used one statement at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
GRID_COLUMNS = 24

GREEN, YELLOW, RED, BLUE, GRAY = "green", "yellow", "red", "blue", "text"
"""Of conditions and outcomes, the same on every panel."""

CONDITION_NAMES: Mapping[str, tuple[str, str]] = {
    "0": ("unknown", GRAY),
    "1": ("healthy", GREEN),
    "2": ("saturated", YELLOW),
    "3": ("collapsed", RED),
}
"""What the numbers of `condition_of` mean."""


@dataclass(frozen=True)
class Query:
    """An expression and how its series are called."""

    expr: str
    legend: str = "__auto"
    dashed: bool = False
    """A line to compare with, and no measurement."""

    def built(self, ref_id: str, *, instant: bool = False, as_table: bool = False) -> prometheus.Dataquery:
        """The query in the SDK's words."""
        query = prometheus.Dataquery()
        query.expr(self.expr)
        query.ref_id(ref_id)
        query.datasource(SOURCE)
        query.legend_format(self.legend)
        query.format(PromQueryFormat.TABLE if as_table else PromQueryFormat.TIME_SERIES)
        _ = query.instant() if instant else query.range()
        return query


@dataclass(frozen=True)
class Placed:
    """A finished panel and the room it takes."""

    panel: models.Panel
    width: int
    height: int


@dataclass(frozen=True)
class Column:
    """A column of a table: what Grafana calls it, what the reader is told, its unit, where it leads."""

    field: str
    title: str
    unit: str = "short"
    link: str | None = None


def condition_of(matchers: str, labels: str) -> str:
    """The condition as a number, the worst one if several ranks differ; see `CONDITION_NAMES`."""
    recorded = "run_layer:ess_monitor_layer_condition:max"
    states = [(name, number) for number, (name, _) in CONDITION_NAMES.items() if number != "0"]
    terms = [f'{recorded}{{{matchers}, condition="{name}"}} * {number}' for name, number in reversed(states)]
    return f"max by ({labels}) ({' or '.join(terms)})"


def lines(
    title: str,
    why: str,
    unit: str,
    *queries: Query,
    width: int = 12,
    height: int = 8,
    limits: tuple[float | None, float | None] = (None, None),
    link: tuple[str, str] | None = None,
    bars: bool = False,
) -> Placed:
    """Curves over time."""
    panel = timeseries.Panel()
    panel.title(title)
    panel.description(why)
    panel.unit(unit)
    panel.datasource(SOURCE)
    panel.targets([query.built(chr(ord("A") + index)) for index, query in enumerate(queries)])
    panel.tooltip(_tooltip())
    panel.legend(_legend())
    if bars:
        panel.draw_style(common.GraphDrawStyle.BARS)
        panel.fill_opacity(60)
    else:
        panel.fill_opacity(0)
        panel.show_points(common.VisibilityMode.NEVER)
    low, high = limits
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)
    for index, query in enumerate(queries):
        if query.dashed:
            panel.override_by_query(
                chr(ord("A") + index),
                [
                    models.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
                    models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": GRAY}),
                ],
            )
    if link is not None:
        panel.data_links([_link(*link)])
    return Placed(panel.build(), width, height)


def number(
    title: str,
    why: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    height: int = 4,
    colors: Sequence[tuple[float | None, str]] = ((None, BLUE),),
    names: Mapping[str, tuple[str, str]] | None = None,
    show_name: bool = False,
    decimals: int | None = None,
) -> Placed:
    """What is the case now."""
    panel = stat.Panel()
    panel.title(title)
    panel.description(why)
    panel.unit(unit)
    panel.datasource(SOURCE)
    panel.targets([query.built("A", instant=True)])
    panel.thresholds(_thresholds(colors))
    panel.reduce_options(_last())
    panel.graph_mode(common.BigValueGraphMode.NONE)
    panel.color_mode(common.BigValueColorMode.BACKGROUND)
    if names is not None:
        panel.mappings([_names(names)])
    if show_name:
        panel.text_mode(common.BigValueTextMode.NAME)
    if decimals is not None:
        panel.decimals(decimals)
    return Placed(panel.build(), width, height)


def states(
    title: str,
    why: str,
    *queries: Query,
    width: int = 12,
    height: int = 8,
    names: Mapping[str, tuple[str, str]] = CONDITION_NAMES,
) -> Placed:
    """Conditions over time, or what else numbers stand for, a band each."""
    panel = statetimeline.Panel()
    panel.title(title)
    panel.description(why)
    panel.unit("short")
    panel.datasource(SOURCE)
    panel.targets([query.built(chr(ord("A") + index)) for index, query in enumerate(queries)])
    panel.mappings([_names(names)])
    panel.show_value(common.VisibilityMode.NEVER)
    panel.merge_values(True)
    panel.legend(_legend())
    return Placed(panel.build(), width, height)


def rows_of(
    title: str,
    why: str,
    queries: Sequence[str],
    columns: Sequence[Column],
    *,
    hidden: Sequence[str] = (),
    width: int = 24,
    height: int = 9,
) -> Placed:
    """A table, one row per label set that the queries share."""
    panel = table.Panel()
    panel.title(title)
    panel.description(why)
    panel.unit("short")
    panel.datasource(SOURCE)
    refs = [chr(ord("A") + index) for index in range(len(queries))]
    panel.targets(
        [Query(expr).built(ref, instant=True, as_table=True) for ref, expr in zip(refs, queries, strict=True)]
    )
    order = {column.field: index for index, column in enumerate(columns)}
    organize = {
        "excludeByName": dict.fromkeys(("Time", "__name__", *hidden), True),
        "indexByName": order,
        "renameByName": {column.field: column.title for column in columns},
    }
    panel.transformations(
        [models.DataTransformerConfig("merge", options={}), models.DataTransformerConfig("organize", options=organize)]
    )
    for column in columns:
        properties = [models.DynamicConfigValue("unit", column.unit)]
        if column.link is not None:
            properties.append(models.DynamicConfigValue("links", [{"title": "Open", "url": column.link}]))
        panel.override_by_name(column.title, properties)
    panel.no_value("none")
    return Placed(panel.build(), width, height)


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> builders.ThresholdsConfig:
    thresholds = builders.ThresholdsConfig()
    thresholds.mode(models.ThresholdsMode.ABSOLUTE)
    thresholds.steps([models.Threshold(value, color) for value, color in steps])
    return thresholds


def _names(names: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    results = {
        value: models.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(names.items())
    }
    return models.ValueMap(options=results)


def _link(title: str, url: str) -> builders.DashboardLink:
    link = builders.DashboardLink(title)
    link.url(url)
    return link


def _last() -> common_builders.ReduceDataOptions:
    reduce = common_builders.ReduceDataOptions()
    reduce.calcs(["lastNotNull"])
    return reduce


def _tooltip() -> common_builders.VizTooltipOptions:
    tooltip = common_builders.VizTooltipOptions()
    tooltip.mode(common.TooltipDisplayMode.MULTI)
    tooltip.sort(common.SortOrder.DESCENDING)
    return tooltip


def _legend() -> common_builders.VizLegendOptions:
    legend = common_builders.VizLegendOptions()
    legend.display_mode(common.LegendDisplayMode.LIST)
    legend.placement(common.LegendPlacement.BOTTOM)
    legend.show_legend(True)
    return legend
