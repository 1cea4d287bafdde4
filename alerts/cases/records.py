"""Tests of the recording rules."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import GRID, RecordCase, braces, counting, held, run_labels, series, target
from ess_monitor.alerts.config import AlertsConfig

_UNTIL = 1800
_SMALL, _LARGE = "blocks.0.mixer", "blocks.1.mixer"


def record_cases(config: AlertsConfig) -> tuple[RecordCase, ...]:
    """Every recording rule, on two ranks."""
    return (_utilization(config), _conditions(config), _rates(config), _no_step(config))


def _utilization(config: AlertsConfig) -> RecordCase:
    """Rank 0 uses 8 of 8 and 8 of 56 dimensions, rank 1 4 of 8 and 36 of 56."""
    capacity, used = (8, 56), ((8, 8), (4, 36))
    inputs = {}
    for rank in (0, 1):
        for layer, size, effective in zip((_SMALL, _LARGE), capacity, used[rank], strict=True):
            labels = {**target(config, rank), "layer": layer}
            inputs[series("ess_monitor_state_capacity", labels)] = held((size, _UNTIL))
            inputs[series("ess_monitor_state_effective_size", labels)] = held((effective, _UNTIL))
            inputs[series("ess_monitor_state_utilization_ratio", labels)] = held((effective / size, _UNTIL))
    run = run_labels(config)
    return RecordCase(
        "sums are divided: the mean of the ratios of rank 0 would be 0.57, and its state is a quarter full",
        inputs,
        300,
        {
            "run:ess_monitor_state_utilization:ratio": {braces(run): 56 / 128},
            "rank:ess_monitor_state_utilization:ratio": {
                braces(target(config, 0)): 16 / 64,
                braces(target(config, 1)): 40 / 64,
            },
            "run_layer:ess_monitor_state_utilization:ratio": {
                braces({**run, "layer": _SMALL}): 12 / 16,
                braces({**run, "layer": _LARGE}): 44 / 112,
            },
            "run_layer:ess_monitor_state_utilization:range": {
                braces({**run, "layer": _SMALL}): 0.5,
                braces({**run, "layer": _LARGE}): 36 / 56 - 8 / 56,
            },
        },
    )


def _conditions(config: AlertsConfig) -> RecordCase:
    """Rank by rank: one layer unknown and healthy, one healthy and collapsed, one unknown on both."""
    run, metric = run_labels(config), "run_layer:ess_monitor_layer_condition:max"
    on_ranks = {_SMALL: ("unknown", "healthy"), _LARGE: ("healthy", "collapsed"), "attention": ("unknown", "unknown")}
    inputs, expected = {}, {}
    for layer, conditions in on_ranks.items():
        for condition in ("unknown", "healthy", "collapsed"):
            labels = {"layer": layer, "condition": condition}
            expected[braces({**run, **labels})] = float(condition in conditions)
            for rank, now in enumerate(conditions):
                there = series("ess_monitor_layer_condition", {**target(config, rank), **labels})
                inputs[there] = held((float(condition == now), _UNTIL))
    return RecordCase(
        "a layer that is collapsed on one rank is collapsed, once, and one that nobody judges is not counted",
        inputs,
        300,
        {
            metric: expected,
            "run:ess_monitor_layers_collapsed:count": {braces(run): 1},
            "run:ess_monitor_layers_collapsed:ratio": {braces(run): 0.5},
        },
    )


def _rates(config: AlertsConfig) -> RecordCase:
    labels = target(config)
    return RecordCase(
        "two steps a second, of which the monitor takes a sixteenth",
        {
            series("ess_monitor_steps_total", labels): counting(2 * GRID, _UNTIL),
            series("ess_monitor_training_step_seconds_sum", labels): counting(16, _UNTIL),
            series("ess_monitor_overhead_seconds_sum", {**labels, "phase": "capture"}): counting(0.25, _UNTIL),
            series("ess_monitor_overhead_seconds_sum", {**labels, "phase": "measure"}): counting(0.75, _UNTIL),
        },
        1200,
        {
            "rank:ess_monitor_steps:rate5m": {braces(labels): 2},
            "rank:ess_monitor_overhead:ratio_rate15m": {braces(labels): 0.0625},
        },
    )


def _no_step(config: AlertsConfig) -> RecordCase:
    labels = target(config)
    return RecordCase(
        "a run without a step has no overhead ratio, not an infinite one",
        {
            series("ess_monitor_training_step_seconds_sum", labels): held((7, _UNTIL)),
            series("ess_monitor_overhead_seconds_sum", {**labels, "phase": "measure"}): counting(1, _UNTIL),
        },
        1200,
        {"rank:ess_monitor_overhead:ratio_rate15m": {}},
    )
