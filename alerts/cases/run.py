"""Tests of the alerts on the run and its target."""

from __future__ import annotations

from ess_monitor.alerts.cases.base import GRID, AlertCase, Firing, counting, held, on_grid, series, target
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import duration


def run_cases(config: AlertsConfig) -> tuple[AlertCase, ...]:
    """Every alert of the group, silent, firing and resolved."""
    return (_stalled(config), _never_started(config), _slow_start(config), _finished(config), _down(config))


def humanized(seconds: int) -> str:
    """What Prometheus' humanizeDuration makes of whole seconds.

    >>> humanized(975), humanized(7200)
    ('16m 15s', '2h 0m 0s')
    """
    parts = ((seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s"))
    first = next((k for k, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in parts[first:])


def _steps_until(config: AlertsConfig, last: int, silent: int) -> str:
    """A step every `GRID` seconds up to `last`, then none."""
    return f"{counting(GRID, last + GRID)} {held((last, silent))}"


def _stalled(config: AlertsConfig) -> AlertCase:
    hangs = 600
    stale = hangs + on_grid(config.stalled_seconds + 1)
    fires = stale + 60
    steps_again = fires + 300
    of_rank = target(config, 1)
    values = f"{_steps_until(config, hangs, steps_again - hangs - GRID)} {counting(GRID, 600, steps_again)}"

    def firing(at: int) -> Firing:
        return _does_not_step(config, at - hangs)

    return AlertCase(
        "rank 1 hangs while it says that it is running, then steps again; rank 0 goes on",
        "RunStalled",
        "critical",
        {
            series("ess_monitor_last_step_timestamp_seconds", of_rank): values,
            series("ess_monitor_run_status", {**of_rank, "status": "running"}): held((1, steps_again + 600)),
            series("ess_monitor_last_step_timestamp_seconds", target(config, 0)): counting(GRID, steps_again + 600),
            series("ess_monitor_run_status", {**target(config, 0), "status": "running"}): held((1, steps_again + 600)),
        },
        {fires - GRID: (), fires: (firing(fires),), steps_again - GRID: (firing(steps_again - GRID),), steps_again: ()},
    )


def _does_not_step(config: AlertsConfig, seconds: int) -> Firing:
    return Firing(
        target(config, 1),
        "Run wla-7 does not step",
        f"Rank 1 of run wla-7 has not ended a step for {humanized(seconds)}, and says that it goes on. Allowed are "
        f"{duration(config.stalled_seconds)} between two steps and {duration(config.start_seconds)} before the first.",
    )


def _starting(config: AlertsConfig, started: int, steps: int, until: int) -> dict[str, str]:
    """Rank 1 says from the beginning that it was started, and takes its first step at `steps`."""
    of_rank = target(config, 1)
    return {
        series("ess_monitor_run_start_timestamp_seconds", of_rank): held((started, until)),
        series("ess_monitor_run_status", {**of_rank, "status": "starting"}): held((1, steps), (0, until - steps)),
        series("ess_monitor_run_status", {**of_rank, "status": "running"}): held((0, steps), (1, until - steps)),
        series("ess_monitor_last_step_timestamp_seconds", of_rank): (
            f"_x{steps // GRID} {counting(GRID, until - steps, steps)}"
        ),
    }


def _never_started(config: AlertsConfig) -> AlertCase:
    started = 15
    fires = on_grid(started + config.start_seconds + 1) + 60
    steps = fires + 300
    return AlertCase(
        "rank 1 hangs before its first step, then takes it",
        "RunStalled",
        "critical",
        _starting(config, started, steps, steps + 600),
        {
            fires - GRID: (),
            fires: (_does_not_step(config, fires - started),),
            steps - GRID: (_does_not_step(config, steps - GRID - started),),
            steps: (),
        },
    )


def _slow_start(config: AlertsConfig) -> AlertCase:
    steps = on_grid(config.start_seconds) - GRID
    return AlertCase(
        "a slow start is no hang, and the time that it took does not count later",
        "RunStalled",
        "critical",
        _starting(config, 15, steps, steps + 1200),
        {steps: (), steps + 300: (), steps + 1200 - GRID: ()},
    )


def _finished(config: AlertsConfig) -> AlertCase:
    later = 600 + on_grid(config.stalled_seconds) + 600
    ends = 600 + GRID
    return AlertCase(
        "a run that has finished does not stall",
        "RunStalled",
        "critical",
        {
            series("ess_monitor_last_step_timestamp_seconds", target(config)): _steps_until(config, 600, later),
            series("ess_monitor_run_status", {**target(config), "status": "running"}): held((1, ends), (0, later)),
            series("ess_monitor_run_status", {**target(config), "status": "finished"}): held((0, ends), (1, later)),
        },
        {later - GRID: (), later: ()},
    )


def _down(config: AlertsConfig) -> AlertCase:
    fires = 300 + on_grid(config.target_down_for_seconds)
    returns = fires + 300
    firing = Firing(
        target(config, 1),
        "Rank 1 of run wla-7 cannot be scraped",
        f"For {duration(config.target_down_for_seconds)} 10.0.0.7:9464 has not answered. Nothing is known of this "
        "rank: the process is gone, or the way to it is closed.",
    )
    return AlertCase(
        "rank 1 cannot be scraped and returns; another job is nobody's concern",
        "TargetDown",
        "warning",
        {
            series("up", target(config, 0)): held((1, returns + 300)),
            series("up", target(config, 1)): held((1, 300), (0, returns - 300), (1, 300)),
            series("up", {**target(config, 1), "job": f"not_{config.job}"}): held((0, returns + 300)),
        },
        {fires - GRID: (), fires: (firing,), returns - GRID: (firing,), returns: ()},
    )
