"""Tests of the alerts on the run and its target."""

from __future__ import annotations

from collections.abc import Iterator

from ess_monitor.alerts.cases.base import (
    GRID,
    LAST_STEP,
    STATUS,
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

_STARTED = 15


def run_cases(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield the tests of every alert of the group, silent, firing and resolved."""
    yield _hangs(config)
    yield from _starts(config)
    yield _finished(config)
    yield _down(config)


def _without_step(config: AlertsConfig, seconds: int) -> Firing:
    return Firing(target(config, 1), humanized(seconds))


def _hangs(config: AlertsConfig) -> AlertCase:
    last = 600
    fires = last + on_grid(config.stalled_seconds + 1) + 60
    again = fires + 300
    steps = f"{counting(GRID, last + GRID)} {held((last, again - last - GRID))} {counting(GRID, 600, again)}"
    return AlertCase(
        "rank 1 hangs while it says that it is running, then steps again; rank 0 goes on",
        "RunStalled",
        {
            series(config, LAST_STEP, 1): steps,
            series(config, STATUS, 1, status="running"): held((1, again + 600)),
            series(config, LAST_STEP, 0): counting(GRID, again + 600),
            series(config, STATUS, 0, status="running"): held((1, again + 600)),
        },
        between(fires, again, _without_step(config, fires - last), _without_step(config, again - GRID - last)),
    )


def _starts(config: AlertsConfig) -> Iterator[AlertCase]:
    def starting(steps: int, until: int) -> dict[str, str]:
        """Return a rank 1 that says from the beginning that it was started, and takes its first step at `steps`."""
        return {
            series(config, "ess_monitor_run_start_timestamp_seconds", 1): held((_STARTED, until)),
            series(config, STATUS, 1, status="starting"): held((1, steps), (0, until - steps)),
            series(config, STATUS, 1, status="running"): held((0, steps), (1, until - steps)),
            series(config, LAST_STEP, 1): f"_x{steps // GRID} {counting(GRID, until - steps, steps)}",
        }

    fires = on_grid(_STARTED + config.start_seconds + 1) + 60
    steps = fires + 300
    firing, last = (_without_step(config, at - _STARTED) for at in (fires, steps - GRID))
    yield AlertCase(
        "rank 1 hangs before its first step, then takes it",
        "RunStalled",
        starting(steps, steps + 600),
        between(fires, steps, firing, last),
    )
    steps = on_grid(config.start_seconds) - GRID
    yield AlertCase(
        "a slow start does not fire, and its time does not count later",
        "RunStalled",
        starting(steps, steps + 1200),
        {steps: (), steps + 300: (), steps + 1200 - GRID: ()},
    )


def _finished(config: AlertsConfig) -> AlertCase:
    later = 600 + on_grid(config.stalled_seconds) + 600
    ends = 600 + GRID
    return AlertCase(
        "a run that has finished does not stall",
        "RunStalled",
        {
            series(config, LAST_STEP): f"{counting(GRID, ends)} {held((600, later))}",
            series(config, STATUS, status="running"): held((1, ends), (0, later)),
            series(config, STATUS, status="finished"): held((0, ends), (1, later)),
        },
        {later - GRID: (), later: ()},
    )


def _down(config: AlertsConfig) -> AlertCase:
    fires = 300 + on_grid(config.target_down_for_seconds)
    returns = fires + 300
    return AlertCase(
        "rank 1 cannot be scraped and returns; another job is ignored",
        "TargetDown",
        {
            series(config, "up", 0): held((1, returns + 300)),
            series(config, "up", 1): held((1, 300), (0, returns - 300), (1, 300)),
            series(config, "up", 1, job=f"not_{config.job}"): held((0, returns + 300)),
        },
        between(fires, returns, Firing(target(config, 1))),
    )
