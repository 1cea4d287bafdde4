"""Tests of the alerts on the monitor's own work."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import GRID, AlertCase, Firing, counting, held, on_grid, series, target
from ess_monitor.alerts.cases.run import humanized
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import duration, percent


def monitor_cases(config: AlertsConfig) -> tuple[AlertCase, ...]:
    """Every alert of the group but the one on parts, silent, firing and resolved."""
    return (
        _stale(config),
        _never_measured(config),
        _costly(config),
        _errors(config),
        _drops(config),
        _single_error(config),
        _cardinality(config),
    )


def _no_longer_measured(config: AlertsConfig, seconds: int) -> Firing:
    return Firing(
        target(config),
        "Run wla-7 trains on but is no longer measured",
        f"On rank 0 the last good measurement lies {humanized(seconds)} before the last step, more than "
        f"{duration(config.measurement_stale_seconds)}. Sizes, conditions and the alerts on them are out of date.",
    )


def _stale(config: AlertsConfig) -> AlertCase:
    last = 600
    fires = last + on_grid(config.measurement_stale_seconds + 1) + 300
    again = fires + 300
    measured = f"{counting(GRID, last + GRID)} {held((last, again - last - GRID))} {counting(GRID, 300, again)}"
    return AlertCase(
        "measurements stop and go on again, steps never stop",
        "MeasurementStale",
        "warning",
        {
            series("ess_monitor_run_start_timestamp_seconds", target(config)): held((1, again + 300)),
            series("ess_monitor_last_step_timestamp_seconds", target(config)): counting(GRID, again + 300),
            series("ess_monitor_last_measurement_timestamp_seconds", target(config)): measured,
        },
        {
            fires - GRID: (),
            fires: (_no_longer_measured(config, fires - last),),
            again - GRID: (_no_longer_measured(config, again - GRID - last),),
            again: (),
        },
    )


def _never_measured(config: AlertsConfig) -> AlertCase:
    start = 30
    fires = start + on_grid(config.measurement_stale_seconds + 1) + 300
    return AlertCase(
        "a run that was never measured",
        "MeasurementStale",
        "warning",
        {
            series("ess_monitor_run_start_timestamp_seconds", target(config)): held((start, fires + 300)),
            series("ess_monitor_last_step_timestamp_seconds", target(config)): counting(GRID, fires + 300),
        },
        {fires - GRID: (), fires: (_no_longer_measured(config, fires - start),)},
    )


def _costly(config: AlertsConfig) -> AlertCase:
    window = 900 // GRID
    crossing = window // 2 + 0.5  # costly samples in the window at which the threshold is passed, never just met
    cost = config.overhead_ratio * window / crossing
    begins = 1800
    passes = begins + (window // 2 + 1) * GRID
    fires = passes + on_grid(config.overhead_for_seconds)
    ends = fires + 1800
    resolves = ends + window // 2 * GRID

    def firing(costly_samples: int) -> Firing:
        share = f"{100 * cost * min(window, costly_samples) / window:.4g}%"
        return Firing(
            target(config),
            f"The monitor takes {share} of the step time of run wla-7",
            f"On rank 0 the monitor has taken more than {percent(config.overhead_ratio)} of the step time for "
            f"{duration(config.overhead_for_seconds)}. The histogram by phase tells where it goes.",
        )

    def spent(phase: str) -> str:
        return series("ess_monitor_overhead_seconds_sum", {**target(config), "phase": phase})

    grown = GRID * cost / 2  # per sample and phase
    total = grown * (ends - begins) / GRID
    values = f"{held((0, begins))} {counting(grown, ends - begins)} {held((total, 1800))}"
    return AlertCase(
        "two phases together pass the threshold, for a while",
        "OverheadHigh",
        "warning",
        {
            series("ess_monitor_training_step_seconds_sum", target(config)): counting(GRID, ends + 1800),
            spent("capture"): values,
            spent("measure"): values,
        },
        {
            fires - GRID: (),
            fires: (firing((fires - begins) // GRID),),
            resolves - GRID: (firing(window // 2 + 1),),
            resolves: (),
        },
    )


def _lost(config: AlertsConfig) -> Firing:
    return Firing(
        {**target(config), "exporter": "tensorboard"},
        "Exporter tensorboard of run wla-7 loses measurements",
        "On rank 0 the exporter tensorboard has raised or dropped measurements for "
        f"{duration(config.export_errors_for_seconds)}. The training is not affected; what this sink should hold is "
        "incomplete.",
    )


def _exporter(config: AlertsConfig, kind: str, exporter: str = "tensorboard") -> str:
    return series(f"ess_monitor_export_{kind}_total", {**target(config), "exporter": exporter})


def _errors(config: AlertsConfig) -> AlertCase:
    wait = on_grid(config.export_errors_for_seconds)
    begins, lasts = 300, 2 * wait
    fires, last = begins + wait, begins + lasts - GRID
    resolves = last - GRID + on_grid(config.export_errors_for_seconds + 1)  # when the last growth leaves the window
    values = f"{held((0, begins))} {counting(1, lasts, 1)} {held((lasts // GRID, 2 * wait))}"
    return AlertCase(
        "one exporter raises again and again, the other does not",
        "ExportErrors",
        "warning",
        {
            _exporter(config, "errors"): values,
            _exporter(config, "dropped"): held((0, resolves + 600)),
            _exporter(config, "errors", "event_log"): held((0, resolves + 600)),
            _exporter(config, "dropped", "event_log"): held((0, resolves + 600)),
        },
        {fires - GRID: (), fires: (_lost(config),), resolves - GRID: (_lost(config),), resolves: ()},
    )


def _drops(config: AlertsConfig) -> AlertCase:
    wait = on_grid(config.export_errors_for_seconds)
    return AlertCase(
        "an exporter that is off raises no more and drops everything",
        "ExportErrors",
        "warning",
        {
            _exporter(config, "errors"): held((5, 300 + 2 * wait)),
            _exporter(config, "dropped"): f"{held((0, 300))} {counting(1, 2 * wait, 1)}",
        },
        {300 + wait - GRID: (), 300 + wait: (_lost(config),)},
    )


def _single_error(config: AlertsConfig) -> AlertCase:
    wait = on_grid(config.export_errors_for_seconds)
    return AlertCase(
        "a single error is no alert",
        "ExportErrors",
        "warning",
        {
            _exporter(config, "errors"): held((0, 300), (1, 2 * wait)),
            _exporter(config, "dropped"): held((0, 300 + 2 * wait)),
        },
        {300 + wait - GRID: (), 300 + wait: (), 300 + wait + GRID: ()},
    )


def _cardinality(config: AlertsConfig) -> AlertCase:
    limit = config.samples_per_scrape
    fires = 300 + 600
    firing = Firing(
        target(config),
        f"Rank 0 of run wla-7 exports {limit + 1} samples",
        f"A scrape of 10.0.0.7:9464 holds more than {limit} samples. Prometheus pays for each of them; measure fewer "
        "layers.",
    )
    return AlertCase(
        "one sample too many, then few again",
        "CardinalityHigh",
        "info",
        {series("scrape_samples_scraped", target(config)): held((limit, 300), (limit + 1, 900), (limit, 300))},
        {fires - GRID: (), fires: (firing,), 1200 - GRID: (firing,), 1200: ()},
    )
