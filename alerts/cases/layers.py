"""Tests of the alerts on the memory of the layers."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import (
    GRID,
    AlertCase,
    Firing,
    held,
    on_grid,
    run_labels,
    series,
    target,
)
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import duration, percent

_LAYER = "blocks.1.mixer"


def layer_cases(config: AlertsConfig) -> tuple[AlertCase, ...]:
    """Every alert of the group, silent, firing and resolved."""
    return (
        _condition(config, "StateSaturated", "saturated"),
        _condition(config, "StateCollapsed", "collapsed"),
        *([_relapse(config)] if config.condition_keep_firing_seconds > GRID else ()),
        _most(config),
        _half(config),
        _only_one_judged(config),
        _nonfinite(config),
        _divergence(config),
        _divergence_from_the_mean(config),
    )


def _condition(config: AlertsConfig, alert: str, condition: str) -> AlertCase:
    begins, wait = 300, on_grid(config.condition_for_seconds)
    fires = begins + wait
    recovers = fires + 600
    resolves = recovers + on_grid(config.condition_keep_firing_seconds)
    firing = (_single(config, alert, condition),)
    return AlertCase(
        f"{condition} on one rank of two, then healthy again",
        alert,
        "warning",
        {
            _layer_condition(config, 0, condition): held((0, resolves + 60)),
            _layer_condition(config, 1, condition): held((0, begins), (1, recovers - begins), (0, 3600)),
        },
        {fires - GRID: (), fires: firing, recovers: firing, resolves - GRID: firing, resolves: ()},
    )


def _relapse(config: AlertsConfig) -> AlertCase:
    fires = on_grid(config.condition_for_seconds)
    gap = max(GRID, on_grid(config.condition_keep_firing_seconds) // 2 // GRID * GRID)
    relapsed = fires + 60 + gap
    firing = (_single(config, "StateCollapsed", "collapsed"),)
    return AlertCase(
        "a relapse within keep_firing_for is the same alert",
        "StateCollapsed",
        "warning",
        {_layer_condition(config, 0, "collapsed"): held((1, fires + 60), (0, gap), (1, 3600))},
        {fires - GRID: (), fires: firing, relapsed - GRID: firing, relapsed: firing},
    )


def _single(config: AlertsConfig, alert: str, condition: str) -> Firing:
    wait = duration(config.condition_for_seconds)
    texts = {
        "StateSaturated": (
            "Layer blocks.1.mixer of run wla-7 is saturated",
            f"For {wait} the state of layer blocks.1.mixer has been full on at least one rank while the task metric "
            "stands still. Only a larger state, or less to remember, helps.",
        ),
        "StateCollapsed": (
            "Layer blocks.1.mixer of run wla-7 has collapsed",
            f"For {wait} layer blocks.1.mixer has left most of its state unused on at least one rank, and use does not "
            "rise. Look at its retention: low, the decay empties the memory; high, features or data do.",
        ),
    }
    return Firing({**run_labels(config), "layer": _LAYER, "condition": condition}, *texts[alert])


def _layer_condition(config: AlertsConfig, rank: int, condition: str, layer: str = _LAYER) -> str:
    labels = {**target(config, rank), "layer": layer, "condition": condition}
    return series("ess_monitor_layer_condition", labels)


def _collapsed_layers(config: AlertsConfig, collapsed: int, layers: int, until: int) -> dict[str, str]:
    """So many of so many layers collapse after 300 s and recover at `until`."""
    conditions = {
        _layer_condition(config, 0, "collapsed", f"blocks.{k}.mixer"): (
            held((0, 300), (1, until - 300), (0, 600)) if k < collapsed else held((0, until + 600))
        )
        for k in range(layers)
    }
    return {**conditions, **_healthy_layers(config, collapsed, layers, until)}


def _healthy_layers(config: AlertsConfig, collapsed: int, layers: int, until: int) -> dict[str, str]:
    """The other side of it: what is not collapsed is healthy."""
    return {
        _layer_condition(config, 0, "healthy", f"blocks.{k}.mixer"): (
            held((1, 300), (0, until - 300), (1, 600)) if k < collapsed else held((1, until + 600))
        )
        for k in range(layers)
    }


def _most(config: AlertsConfig) -> AlertCase:
    layers = 8
    collapsed = int(layers * config.most_layers_ratio) + 1
    fires = 300 + on_grid(config.most_layers_for_seconds)
    recovers = fires + 300
    firing = Firing(
        run_labels(config),
        "Most layers of run wla-7 have collapsed",
        f"{100 * collapsed / layers:.4g}% of the judged layers of run wla-7 are collapsed, more than "
        f"{percent(config.most_layers_ratio)}. The cause is common to them: data, learning rate, initialization or "
        "precision.",
    )
    return AlertCase(
        "more layers than the threshold collapse",
        "MostLayersCollapsed",
        "critical",
        _collapsed_layers(config, collapsed, layers, recovers),
        {fires - GRID: (), fires: (firing,), recovers - GRID: (firing,), recovers: ()},
    )


def _half(config: AlertsConfig) -> AlertCase:
    collapsed = int(8 * config.most_layers_ratio)
    fires = 300 + on_grid(config.most_layers_for_seconds)
    return AlertCase(
        "no more layers than the threshold collapse",
        "MostLayersCollapsed",
        "critical",
        _collapsed_layers(config, collapsed, 8, fires + 600),
        {fires: (), fires + 300: ()},
    )


def _only_one_judged(config: AlertsConfig) -> AlertCase:
    """A model of two layers, the first of which is spared; the metric of the number of layers has no say."""
    fires = 300 + on_grid(config.most_layers_for_seconds)
    firing = Firing(
        run_labels(config),
        "Most layers of run wla-7 have collapsed",
        "100% of the judged layers of run wla-7 are collapsed, more than "
        f"{percent(config.most_layers_ratio)}. The cause is common to them: data, learning rate, initialization or "
        "precision.",
    )
    return AlertCase(
        "the only layer that can be judged collapses; before the warm-up is over none is judged",
        "MostLayersCollapsed",
        "critical",
        {
            _layer_condition(config, 0, "unknown", "blocks.0.mixer"): held((1, fires + 300)),
            _layer_condition(config, 0, "healthy", "blocks.0.mixer"): held((0, fires + 300)),
            _layer_condition(config, 0, "collapsed", "blocks.0.mixer"): held((0, fires + 300)),
            _layer_condition(config, 0, "unknown"): held((1, 300), (0, fires)),
            _layer_condition(config, 0, "collapsed"): held((0, 300), (1, fires)),
            series("ess_monitor_layers", target(config)): held((2, fires + 300)),
        },
        {270: (), fires - GRID: (), fires: (firing,)},
    )


def _nonfinite(config: AlertsConfig) -> AlertCase:
    labels = {**target(config, 1), "layer": _LAYER}
    firing = Firing(
        labels,
        "NaN or infinity in layer blocks.1.mixer of run wla-7",
        "Rank 1 met NaN or infinity in the tensors of layer blocks.1.mixer within the last 5 minutes. The loss is "
        "broken, or about to break.",
    )
    return AlertCase(
        "one non-finite reading on rank 1, none on rank 0",
        "NonFiniteState",
        "critical",
        {
            series("ess_monitor_nonfinite_states_total", labels): held((0, 600), (1, 900)),
            series("ess_monitor_nonfinite_states_total", {**labels, "rank": "0"}): held((0, 1500)),
        },
        {600 - GRID: (), 600: (firing,), 900 - GRID: (firing,), 900: ()},
    )


def _divergence(config: AlertsConfig) -> AlertCase:
    gap = config.divergence_ratio
    wide, narrow = (1 + gap) / 2, gap / 2
    fires = 300 + on_grid(config.divergence_for_seconds)
    closes = fires + 300
    firing = _apart(config, wide)
    return AlertCase(
        "rank 1 leaves rank 0 and comes back",
        "RankDivergence",
        "warning",
        {
            _utilization(config, 0): held((0, closes + 300)),
            _utilization(config, 1): held((narrow, 300), (wide, closes - 300), (narrow, 300)),
        },
        {fires - GRID: (), fires: (firing,), closes - GRID: (firing,), closes: ()},
    )


def _divergence_from_the_mean(config: AlertsConfig) -> AlertCase:
    gap = config.divergence_ratio
    wide, narrow = (1 + gap) / 2, gap / 2
    fires = 300 + on_grid(config.divergence_for_seconds)
    firing = _apart(config, wide)
    smallest = held((1 - narrow, 300), (1 - wide, fires))
    return AlertCase(
        "ranks that exchange their readings export one mean, and the smallest falls",
        "RankDivergence",
        "warning",
        {
            **{_utilization(config, rank): held((1, 300 + fires)) for rank in (0, 1)},
            **{_utilization(config, rank, "min_ratio"): smallest for rank in (0, 1)},
        },
        {fires - GRID: (), fires: (firing,)},
    )


def _utilization(config: AlertsConfig, rank: int, which: str = "ratio") -> str:
    return series(f"ess_monitor_state_utilization_{which}", {**target(config, rank), "layer": _LAYER})


def _apart(config: AlertsConfig, gap: float) -> Firing:
    return Firing(
        {**run_labels(config), "layer": _LAYER},
        "Ranks of run wla-7 disagree about layer blocks.1.mixer",
        f"The utilization of layer blocks.1.mixer differs by at least {100 * float(f'{gap:g}'):.4g}% between two "
        f"ranks, more than {percent(config.divergence_ratio)}. Replicas of one model should agree: compare their data "
        "and their weights.",
    )
