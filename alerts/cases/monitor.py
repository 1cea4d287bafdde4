"""Tests of the alerts on the monitor's own work."""

from __future__ import annotations

from collections.abc import Iterator

from ess_monitor.alerts.cases.base import (
    GRID,
    AlertCase,
    Firing,
    between,
    counting,
    held,
    humanized,
    on_grid,
    series,
    target,
)
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.records import PARTS

_BEGINS, _ENDS = 300, 900
_LOST = {
    "diagnosis": "layers are measured and no longer judged: conditions are the last known ones",
    "agreement": "the ranks no longer agree: each uses only its own readings, and the autopilot does not act",
    "intervention": "the autopilot stops: what it has attached stays as it is",
    "export": "the sinks get no more measurements; the endpoint goes on",
    "replay": "batches are no longer run again: a layer with a decay is called collapsed by its task metric alone, and "
    "never without one",
}
"""What no longer works without a part of the monitor."""
_INPUTS_LOST = "no more measurements come in: sizes and conditions are the last known ones"


def monitor_cases(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield the tests of every alert of the group, silent, firing and resolved."""
    yield from _stale(config)
    yield _costly(config)
    yield from _export_errors(config)
    yield _cardinality(config)
    yield from _off(config)


def _stale(config: AlertsConfig) -> Iterator[AlertCase]:
    def run(started: int, until: int) -> dict[str, str]:
        return {
            series(config, "ess_monitor_run_start_timestamp_seconds"): held((started, until)),
            series(config, "ess_monitor_last_step_timestamp_seconds"): counting(GRID, until),
        }

    def firing(seconds: int) -> Firing:
        return Firing(target(config), humanized(seconds))

    wait = on_grid(config.measurement_stale_seconds + 1) + 300
    last = 600
    again = last + wait + 300
    measured = f"{counting(GRID, last + GRID)} {held((last, again - last - GRID))} {counting(GRID, 300, again)}"
    yield AlertCase(
        "measurements stop and go on again, steps never stop",
        "MeasurementStale",
        {**run(1, again + 300), series(config, "ess_monitor_last_measurement_timestamp_seconds"): measured},
        between(last + wait, again, firing(wait), firing(again - GRID - last)),
    )
    fires = GRID + wait
    yield AlertCase(
        "a run that was never measured",
        "MeasurementStale",
        run(GRID, fires + 300),
        {fires - GRID: (), fires: (firing(wait),)},
    )


def _costly(config: AlertsConfig) -> AlertCase:
    window = 900 // GRID
    half = window // 2
    cost = config.overhead_ratio * window / (half + 0.5)  # half a sample more: the threshold is passed, never just met
    begins = 1800
    fires = begins + (half + 1) * GRID + on_grid(config.overhead_for_seconds)
    ends = fires + 1800

    def firing(costly_samples: int) -> Firing:
        return Firing(target(config), f"{100 * cost * min(window, costly_samples) / window:.4g}%")

    grown = GRID * cost / 2  # per sample and phase
    total = grown * (ends - begins) / GRID
    spent = f"{held((0, begins))} {counting(grown, ends - begins)} {held((total, 1800))}"
    return AlertCase(
        "two phases together pass the threshold, for a while",
        "OverheadHigh",
        {
            series(config, "ess_monitor_training_step_seconds_sum"): counting(GRID, ends + 1800),
            series(config, "ess_monitor_overhead_seconds_sum", phase="capture"): spent,
            series(config, "ess_monitor_overhead_seconds_sum", phase="measure"): spent,
        },
        between(fires, ends + half * GRID, firing((fires - begins) // GRID), firing(half + 1)),
    )


def _export_errors(config: AlertsConfig) -> Iterator[AlertCase]:
    wait = on_grid(config.export_errors_for_seconds)
    fires = _BEGINS + wait
    firing = Firing(target(config, exporter="tensorboard"))

    def counted(kind: str, exporter: str = "tensorboard") -> str:
        return series(config, f"ess_monitor_export_{kind}_total", exporter=exporter)

    # The last growth leaves the window.
    resolves = fires + wait - 2 * GRID + on_grid(config.export_errors_for_seconds + 1)
    growing = f"{held((0, _BEGINS))} {counting(1, 2 * wait, 1)}"
    quiet = held((0, resolves + 600))
    yield AlertCase(
        "one exporter raises again and again, the other does not",
        "ExportErrors",
        {
            counted("errors"): f"{growing} {held((2 * wait // GRID, 2 * wait))}",
            counted("dropped"): quiet,
            counted("errors", "event_log"): quiet,
            counted("dropped", "event_log"): quiet,
        },
        between(fires, resolves, firing),
    )
    yield AlertCase(
        "an exporter that is off raises no more and drops everything",
        "ExportErrors",
        {counted("errors"): held((5, _BEGINS + 2 * wait)), counted("dropped"): growing},
        {fires - GRID: (), fires: (firing,)},
    )
    yield AlertCase(
        "a single error does not fire",
        "ExportErrors",
        {
            counted("errors"): held((0, _BEGINS), (1, 2 * wait)),
            counted("dropped"): held((0, _BEGINS + 2 * wait)),
        },
        {fires - GRID: (), fires: (), fires + GRID: ()},
    )


def _cardinality(config: AlertsConfig) -> AlertCase:
    limit = config.samples_per_scrape
    return AlertCase(
        "one sample too many, then few again",
        "CardinalityHigh",
        {series(config, "scrape_samples_scraped"): held((limit, 300), (limit + 1, 900), (limit, 300))},
        between(900, 1200, Firing(target(config), str(limit + 1))),
    )


def _off(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield a part, an exporter and layers: silent, off, and on again in a new monitor."""

    def firing(summary: str, lost: str, rank: int = 0, **labels: str) -> Firing:
        description = (
            f"On rank {rank} {lost}. The training goes on. What is off stays off for the rest of this run. The log "
            "has the reason; a new monitor or a resumed run turns it on again."
        )
        return Firing(target(config, rank, **labels), texts=(f"{summary} in run wla-7", description))

    off_at = {part: _BEGINS + number * GRID for number, part in enumerate(PARTS)}
    parts = {
        part: firing(f"Part {part} of the monitor is off", _LOST.get(part, _INPUTS_LOST), part=part) for part in PARTS
    }
    yield AlertCase(
        "every part turns itself off, until a new monitor is attached",
        "PartOff",
        {
            series(config, "ess_monitor_part_enabled", part=part): held((1, at), (0, _ENDS - at), (1, 300))
            for part, at in off_at.items()
        },
        {
            second: tuple(parts[part] for part, at in off_at.items() if at <= second < _ENDS)
            for second in (_BEGINS - GRID, *off_at.values(), _ENDS - GRID, _ENDS)
        },
    )
    exporter = firing(
        "Exporter tensorboard is off",
        "the exporter tensorboard gets no more measurements; the others do",
        exporter="tensorboard",
    )
    yield AlertCase(
        "one exporter of two turns itself off, until the run is resumed",
        "PartOff",
        {
            series(config, "ess_monitor_exporter_enabled", exporter="tensorboard"): held(
                (1, _BEGINS), (0, 600), (1, 300)
            ),
            series(config, "ess_monitor_exporter_enabled", exporter="event_log"): held((1, _ENDS + 300)),
        },
        between(_BEGINS, _ENDS, exporter),
    )
    one, all_of_them = (
        firing(
            "Layers are no longer measured",
            f"{count} of the layers failed again and again and were given up: their sizes and conditions are the last "
            "known ones",
            rank=1,
        )
        for count in (1, 8)
    )
    yield AlertCase(
        "one rank gives up a layer and then all of them, the other measures on",
        "PartOff",
        {
            **{series(config, "ess_monitor_layers", rank): held((8, _ENDS + 300)) for rank in (0, 1)},
            series(config, "ess_monitor_layers_enabled", 0): held((8, _ENDS + 300)),
            series(config, "ess_monitor_layers_enabled", 1): held((8, _BEGINS), (7, 300), (0, 300), (8, 300)),
        },
        {**between(_BEGINS, _ENDS, one, all_of_them), _BEGINS + 300: (all_of_them,)},
    )
