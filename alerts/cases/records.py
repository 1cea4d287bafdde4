"""Tests of the recording rules."""

from __future__ import annotations

from collections.abc import Iterator

from ess_monitor.alerts.cases.base import GRID, RecordCase, braces, counting, held, run_labels, series, target
from ess_monitor.alerts.config import AlertsConfig

_UNTIL = 1800
_SMALL, _LARGE = "blocks.0.mixer", "blocks.1.mixer"


def record_cases(config: AlertsConfig) -> Iterator[RecordCase]:
    """Yield the tests of every recording rule, on two ranks."""
    yield _utilization(config)
    yield _conditions(config)
    yield from _rates(config)


def _utilization(config: AlertsConfig) -> RecordCase:
    """Return ranks of which 0 uses 8 of 8 and 8 of 56 dimensions, 1 uses 4 of 8 and 36 of 56."""
    inputs = {}
    for rank, used in enumerate(((8, 8), (4, 36))):
        for layer, capacity, effective in zip((_SMALL, _LARGE), (8, 56), used, strict=True):
            values = {"capacity": capacity, "effective_size": effective, "utilization_ratio": effective / capacity}
            for name, value in values.items():
                inputs[series(config, f"ess_monitor_state_{name}", rank, layer=layer)] = held((value, _UNTIL))
    small, large = (braces(run_labels(config, layer=layer)) for layer in (_SMALL, _LARGE))
    ranks = [braces(target(config, rank)) for rank in (0, 1)]
    return RecordCase(
        "sums are divided: the mean of the ratios of rank 0 would be 0.57, and its state is a quarter full",
        inputs,
        300,
        {
            "run:ess_monitor_state_utilization:ratio": {braces(run_labels(config)): 56 / 128},
            "rank:ess_monitor_state_utilization:ratio": {ranks[0]: 16 / 64, ranks[1]: 40 / 64},
            "run_layer:ess_monitor_state_utilization:ratio": {small: 12 / 16, large: 44 / 112},
            "run_layer:ess_monitor_state_utilization:range": {small: 0.5, large: 36 / 56 - 8 / 56},
        },
    )


def _conditions(config: AlertsConfig) -> RecordCase:
    """Return, rank by rank, a layer unknown and healthy, one healthy and collapsed, one unknown on both."""
    run = braces(run_labels(config))
    on_ranks = {_SMALL: ("unknown", "healthy"), _LARGE: ("healthy", "collapsed"), "attention": ("unknown", "unknown")}
    inputs, expected = {}, {}
    for layer, conditions in on_ranks.items():
        for condition in ("unknown", "healthy", "collapsed"):
            labels = {"layer": layer, "condition": condition}
            expected[braces(run_labels(config, **labels))] = float(condition in conditions)
            for rank, now in enumerate(conditions):
                selector = series(config, "ess_monitor_layer_condition", rank, **labels)
                inputs[selector] = held((float(condition == now), _UNTIL))
    return RecordCase(
        "a layer that is collapsed on one rank is collapsed, once, and one that nobody judges is not counted",
        inputs,
        300,
        {
            "run_layer:ess_monitor_layer_condition:max": expected,
            "run:ess_monitor_layers_collapsed:count": {run: 1},
            "run:ess_monitor_layers_collapsed:ratio": {run: 0.5},
        },
    )


def _rates(config: AlertsConfig) -> Iterator[RecordCase]:
    rank = braces(target(config))
    stepping = series(config, "ess_monitor_training_step_seconds_sum")
    capture, measure = (
        series(config, "ess_monitor_overhead_seconds_sum", phase=phase) for phase in ("capture", "measure")
    )
    yield RecordCase(
        "two steps a second, of which the monitor takes a sixteenth",
        {
            series(config, "ess_monitor_steps_total"): counting(2 * GRID, _UNTIL),
            stepping: counting(16, _UNTIL),
            capture: counting(0.25, _UNTIL),
            measure: counting(0.75, _UNTIL),
        },
        1200,
        {"rank:ess_monitor_steps:rate5m": {rank: 2}, "rank:ess_monitor_overhead:ratio_rate15m": {rank: 0.0625}},
    )
    yield RecordCase(
        "a run without a step has no overhead ratio, not an infinite one",
        {stepping: held((7, _UNTIL)), measure: counting(1, _UNTIL)},
        1200,
        {"rank:ess_monitor_overhead:ratio_rate15m": {}},
    )
