"""Tests of the alerts on the memory of the layers."""

from __future__ import annotations

from collections.abc import Iterator

from ess_monitor.alerts.cases.base import (
    GRID,
    LAYER,
    AlertCase,
    Firing,
    between,
    held,
    on_grid,
    run_labels,
    series,
    target,
)
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.records import CONDITION_INFO

_BEGINS = 300


def layer_cases(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield the tests of every alert of the group, silent, firing and resolved."""
    yield from _conditions(config)
    yield from _most_layers(config)
    yield _nonfinite(config)
    yield from _divergence(config)


def _condition(config: AlertsConfig, condition: str, rank: int = 0, layer: str = LAYER) -> str:
    return series(config, "ess_monitor_layer_condition", rank, layer=layer, condition=condition)


def _conditions(config: AlertsConfig) -> Iterator[AlertCase]:
    wait, keeps = on_grid(config.condition_for_seconds), on_grid(config.condition_keep_firing_seconds)
    recovers = _BEGINS + wait + 600
    resolves = recovers + keeps
    for condition, info in CONDITION_INFO.items():
        if info.alert:
            firing = Firing(run_labels(config, layer=LAYER, condition=condition))
            yield AlertCase(
                f"{condition} on one rank of two, then healthy again",
                info.alert,
                {
                    _condition(config, condition, 0): held((0, resolves + 60)),
                    _condition(config, condition, 1): held((0, _BEGINS), (1, recovers - _BEGINS), (0, 3600)),
                },
                {**between(_BEGINS + wait, resolves, firing), recovers: (firing,)},
            )
    yield AlertCase(
        "a layer that forgets by choice is no collapsed one",
        CONDITION_INFO["collapsed"].alert,
        {
            _condition(config, "forgets_by_choice"): held((0, _BEGINS), (1, _BEGINS + wait)),
            _condition(config, "collapsed"): held((0, 2 * _BEGINS + wait)),
        },
        {_BEGINS + wait: (), 2 * _BEGINS + wait: ()},
    )
    if config.condition_keep_firing_seconds > GRID:
        gap = max(GRID, keeps // 2 // GRID * GRID)
        relapses = wait + 60 + gap
        fires = (Firing(run_labels(config, layer=LAYER, condition="collapsed")),)
        yield AlertCase(
            "a relapse within keep_firing_for is the same alert",
            CONDITION_INFO["collapsed"].alert,
            {_condition(config, "collapsed"): held((1, wait + 60), (0, gap), (1, 3600))},
            {wait - GRID: (), wait: fires, relapses - GRID: fires, relapses: fires},
        )


def _most_layers(config: AlertsConfig) -> Iterator[AlertCase]:
    fires = _BEGINS + on_grid(config.most_layers_for_seconds)
    at_most = int(8 * config.most_layers_ratio)

    def collapsing(count: int, until: int, otherwise: str = "healthy") -> dict[str, str]:
        """Return so many collapsed layers of eight, until they recover; what is not collapsed is healthy, or else."""
        return {
            _condition(config, condition, layer=f"blocks.{k}.mixer"): (
                held((first, _BEGINS), (1 - first, until - _BEGINS), (first, 600))
                if k < count
                else held((first, until + 600))
            )
            for condition, first in (("collapsed", 0), (otherwise, 1))
            for k in range(8)
        }

    def firing(collapsed: int, judged: int) -> Firing:
        return Firing(run_labels(config), f"{100 * collapsed / judged:.4g}%")

    yield AlertCase(
        "more layers than the threshold collapse",
        "MostLayersCollapsed",
        collapsing(at_most + 1, fires + 300),
        between(fires, fires + 300, firing(at_most + 1, 8)),
    )
    yield AlertCase(
        "no more layers than the threshold collapse",
        "MostLayersCollapsed",
        collapsing(at_most, fires + 600),
        {fires: (), fires + 300: ()},
    )
    yield AlertCase(
        "no more layers than the threshold collapse, and the others forget by choice: they count as judged",
        "MostLayersCollapsed",
        collapsing(at_most, fires + 600, "forgets_by_choice"),
        {fires: (), fires + 300: ()},
    )
    # A model of two layers, the first of which is spared. The metric of the number of layers has no influence.
    yield AlertCase(
        "the only layer that can be judged collapses; before the warm-up is over none is judged",
        "MostLayersCollapsed",
        {
            _condition(config, "unknown", layer="blocks.0.mixer"): held((1, fires + 300)),
            _condition(config, "healthy", layer="blocks.0.mixer"): held((0, fires + 300)),
            _condition(config, "collapsed", layer="blocks.0.mixer"): held((0, fires + 300)),
            _condition(config, "unknown"): held((1, _BEGINS), (0, fires)),
            _condition(config, "collapsed"): held((0, _BEGINS), (1, fires)),
            series(config, "ess_monitor_layers"): held((2, fires + 300)),
        },
        {_BEGINS - GRID: (), fires - GRID: (), fires: (firing(1, 1),)},
    )


def _nonfinite(config: AlertsConfig) -> AlertCase:
    return AlertCase(
        "one non-finite reading on rank 1, none on rank 0",
        "NonFiniteState",
        {
            series(config, "ess_monitor_nonfinite_states_total", 1, layer=LAYER): held((0, 600), (1, 900)),
            series(config, "ess_monitor_nonfinite_states_total", 0, layer=LAYER): held((0, 1500)),
        },
        between(600, 900, Firing(target(config, 1, layer=LAYER))),
    )


def _divergence(config: AlertsConfig) -> Iterator[AlertCase]:
    wide, narrow = (1 + config.divergence_ratio) / 2, config.divergence_ratio / 2
    fires = _BEGINS + on_grid(config.divergence_for_seconds)
    closes = fires + 300
    firing = Firing(run_labels(config, layer=LAYER), f"{100 * float(f'{wide:g}'):.4g}%")

    def utilization(rank: int, which: str = "ratio") -> str:
        return series(config, f"ess_monitor_state_utilization_{which}", rank, layer=LAYER)

    yield AlertCase(
        "rank 1 leaves rank 0 and comes back",
        "RankDivergence",
        {
            utilization(0): held((0, closes + 300)),
            utilization(1): held((narrow, _BEGINS), (wide, closes - _BEGINS), (narrow, 300)),
        },
        between(fires, closes, firing),
    )
    smallest = held((1 - narrow, _BEGINS), (1 - wide, fires))
    yield AlertCase(
        "ranks that exchange their readings export one mean, and the smallest falls",
        "RankDivergence",
        {
            **{utilization(rank): held((1, _BEGINS + fires)) for rank in (0, 1)},
            **{utilization(rank, "min_ratio"): smallest for rank in (0, 1)},
        },
        {fires - GRID: (), fires: (firing,)},
    )
