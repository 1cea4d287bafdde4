"""Tests of what holds over the end of a process: finished, failed, terminated, killed, resumed, started elsewhere.

A textfile, a pushed record and an endpoint that lingers go on showing the last values of a run, for hours or for ever.
"""

from __future__ import annotations

from collections.abc import Iterator

from ess_monitor.alerts.cases.base import (
    GRID,
    LAST_STEP,
    LAYER,
    STATUS,
    AlertCase,
    Firing,
    RecordCase,
    braces,
    counting,
    held,
    humanized,
    on_grid,
    run_labels,
    series,
    target,
)
from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.records import RUN_STATUSES

_LONG = 4 * 3600
"""Seconds for which the last values stay."""
_USE = "ess_monitor_state_utilization_ratio"
_ELSEWHERE = "10.0.0.8:9464"


def lifecycle_cases(config: AlertsConfig) -> Iterator[AlertCase | RecordCase]:
    """Yield the tests of the alerts that a run must not leave behind, and of those that its end must raise."""
    for status in RUN_STATUSES[RUN_STATUSES.index("running") + 1 :]:
        yield _over(config, status)
        yield _down_after(config, status)
    yield _last_values(config)
    yield _pushed(config)
    yield _killed(config)
    yield from _resumed(config)
    yield from _elsewhere(config)
    yield from _broken_at_the_end(config)
    yield from _down_again(config)


def _statuses(config: AlertsConfig, *stretches: tuple[str, int], rank: int = 0, **labels: str) -> dict[str, str]:
    """Return the statuses of a process one after the other, and its last step. An empty status is none: no scrape."""
    shown = {
        series(config, STATUS, rank, status=status, **labels): " ".join(
            held((float(now == status), seconds)) if now else _nothing(seconds) for now, seconds in stretches
        )
        for status in RUN_STATUSES
    }
    steps, begins, last = [], 0, 0
    for now, seconds in stretches:
        ends = begins + on_grid(seconds)
        if now == "running":
            steps.append(counting(GRID, seconds, begins))
            last = ends - GRID
        else:
            steps.append(held((last, seconds)) if now else _nothing(seconds))
        begins = ends
    return {**shown, series(config, LAST_STEP, rank, **labels): " ".join(steps)}


def _nothing(seconds: int) -> str:
    """Return what Prometheus stores of a series that is not scraped for so long."""
    return " ".join(["stale"] + ["_"] * (on_grid(seconds) // GRID - 1))


def _condition(config: AlertsConfig, condition: str = "collapsed", **labels: str) -> str:
    return series(config, "ess_monitor_layer_condition", 0, layer=LAYER, condition=condition, **labels)


def _applied(config: AlertsConfig) -> str:
    return series(config, "ess_monitor_interventions_total", action="pull_to_identity", outcome="applied")


def _collapsed(config: AlertsConfig) -> Firing:
    return Firing(run_labels(config, layer=LAYER, condition="collapsed"))


def _over(config: AlertsConfig, status: str) -> AlertCase:
    one, all_of_them = on_grid(config.condition_for_seconds), on_grid(config.most_layers_for_seconds)
    ends = max(one, all_of_them) + GRID
    resolves = ends + on_grid(config.condition_keep_firing_seconds)
    count, acts = config.flapping_actions + 1, 60
    most, often = Firing(run_labels(config), "100%"), Firing(run_labels(config), str(count))
    return AlertCase(
        f"every layer of a run that has {status} was collapsed, and the autopilot acted on it again and again",
        "StateCollapsed",
        {
            **_statuses(config, ("running", ends), (status, _LONG)),
            _condition(config): held((1, _LONG)),
            _applied(config): held((0, acts), (count, _LONG)),
        },
        {one: (_collapsed(config),), ends - GRID: (_collapsed(config),), resolves: (), resolves + 600: ()},
        {
            "MostLayersCollapsed": {all_of_them: (most,), ends - GRID: (most,), ends: (), resolves + 600: ()},
            "InterventionFlapping": {ends - GRID: (often,), ends: (), resolves + 600: ()},
        },
    )


def _last_values(config: AlertsConfig) -> AlertCase:
    """Return the other alerts on what a process shows, of a run of two ranks that finishes while all of them fire."""
    stale = on_grid(config.measurement_stale_seconds + 1) + 300 + GRID
    ineffective = on_grid(config.ineffective_for_seconds)
    waits = (config.condition_for_seconds, config.divergence_for_seconds, 600, 600 + ineffective, stale)
    ends = max(on_grid(seconds) for seconds in waits) + 60
    acts = ends - ineffective - 60
    both = _statuses(config, ("running", ends), ("finished", _LONG)) | _statuses(
        config, ("running", ends), ("finished", _LONG), rank=1
    )
    samples = config.samples_per_scrape + 1
    off = (
        "Exporter tensorboard is off in run wla-7",
        "On rank 0 the exporter tensorboard gets no more measurements; the others do. The training goes on. What is "
        "off stays off for the rest of this run. The log has the reason; a new monitor or a resumed run turns it on "
        "again.",
    )
    firing = {
        "StateSaturated": Firing(run_labels(config, layer=LAYER, condition="saturated")),
        "RankDivergence": Firing(run_labels(config, layer=LAYER), "100%"),
        "InterventionIneffective": Firing(run_labels(config), "1"),
        "MeasurementStale": Firing(target(config), humanized(ends - GRID - 1)),
        "PartOff": Firing(target(config, exporter="tensorboard"), texts=off),
        "CardinalityHigh": Firing(target(config), str(samples)),
    }
    keeps = {"StateSaturated": on_grid(config.condition_keep_firing_seconds)}
    expected = {
        alert: {ends - GRID: (each,), ends + keeps.get(alert, 0): (), ends + 1200: ()} for alert, each in firing.items()
    }
    values = {
        _condition(config, "saturated"): 1,
        _condition(config): 1,
        series(config, _USE, 0, layer=LAYER): 0,
        series(config, _USE, 1, layer=LAYER): 1,
        series(config, "ess_monitor_exporter_enabled", exporter="tensorboard"): 0,
        series(config, "scrape_samples_scraped"): samples,
        series(config, "ess_monitor_run_start_timestamp_seconds"): 1,
    }
    return AlertCase(
        "a run that finishes while everything fires",
        "StateSaturated",
        {
            **both,
            **{selector: held((value, _LONG)) for selector, value in values.items()},
            _applied(config): held((0, acts), (1, _LONG)),
        },
        expected.pop("StateSaturated"),
        expected,
    )


def _pushed(config: AlertsConfig) -> AlertCase:
    """Return a push to the job of the rules. It has no instance, and comes when the run is over."""
    wait = max(on_grid(config.condition_for_seconds), on_grid(config.most_layers_for_seconds))
    of_process = {**run_labels(config), "rank": "0"}
    replaced = wait + 300

    def shown(name: str, **labels: str) -> str:
        return name + braces({**of_process, **labels})

    return AlertCase(
        "the pushed record of a run that ended collapsed; the end of the resumed run replaces it",
        "StateCollapsed",
        {
            shown(STATUS, status="running"): held((0, _LONG)),
            shown(STATUS, status="finished"): held((1, _LONG)),
            shown(LAST_STEP): held((1, _LONG)),
            shown("ess_monitor_layer_condition", layer=LAYER, condition="collapsed"): held((1, _LONG)),
            shown("ess_monitor_nonfinite_states_total", layer=LAYER): held((1, replaced), (3, _LONG)),
        },
        {wait: (), replaced: ()},
        {"MostLayersCollapsed": {wait: (), replaced: ()}, "NonFiniteState": {0: (), replaced: (), replaced + 120: ()}},
    )


def _killed(config: AlertsConfig) -> AlertCase:
    """Return a process that says "running" for ever: it was killed, and its textfile stays."""
    last = on_grid(config.condition_for_seconds) + 60
    stalls = last + on_grid(config.stalled_seconds + 1) + 60
    silent = last + on_grid(config.alive_seconds + 1) + on_grid(config.condition_keep_firing_seconds)
    ends = max(silent, stalls) + 300

    def stalled(second: int) -> tuple[Firing, ...]:
        return (Firing(target(config), humanized(second - last)),)

    return AlertCase(
        "the textfile of a process that was killed: one alert, until somebody looks",
        "RunStalled",
        {
            series(config, STATUS, status="running"): held((1, _LONG)),
            series(config, LAST_STEP): f"{counting(GRID, last + GRID)} {held((last, _LONG))}",
            _condition(config): held((1, _LONG)),
        },
        {stalls - GRID: (), stalls: stalled(stalls), ends: stalled(ends)},
        {"StateCollapsed": {last: (_collapsed(config),), silent: (), ends: ()}},
    )


def _resumed(config: AlertsConfig) -> Iterator[AlertCase | RecordCase]:
    """Yield a process that is preempted, and one with the same labels that goes on from an earlier checkpoint."""
    runs, gone, starts, again = 1200, 60, 60, 900
    resumes = runs + gone + starts
    both = _statuses(config, ("running", runs), ("", gone), ("starting", starts), ("running", again))
    before, after = _nothing(gone), held((0, starts))
    count, broken = config.flapping_actions, series(config, "ess_monitor_nonfinite_states_total", layer=LAYER)
    found = (Firing(target(config, layer=LAYER)),)
    moments = (runs - GRID, runs, resumes - GRID, resumes, resumes + again - GRID)
    stays = config.condition_keep_firing_seconds > gone + starts
    one_alert = dict.fromkeys(moments, (_collapsed(config),)) if stays else {}
    yield AlertCase(
        "a resumed run counts from 0 again and is still collapsed",
        "NonFiniteState",
        {
            **both,
            broken: f"{held((0, 300), (3, runs - 300))} {before} {after} {held((0, 300), (1, again))}",
            _applied(config): f"{held((0, 300), (count, runs - 300))} {before} {after} {held((0, again))}",
            _condition(config): f"{held((1, runs))} {before} {held((1, starts + again))}",
        },
        {300: found, runs - GRID: (), resumes: (), resumes + 270: (), resumes + 300: found, resumes + 600: ()},
        {"InterventionFlapping": dict.fromkeys(moments, ()), **({"StateCollapsed": one_alert} if stays else {})},
    )
    yield RecordCase(
        "two steps a second, before and after a resume",
        {
            **both,
            series(config, "ess_monitor_steps_total"): f"{counting(60, runs)} {before} {after} {counting(60, again)}",
        },
        resumes + 600,
        {"rank:ess_monitor_steps:rate5m": {braces(target(config)): 2}},
    )


def _elsewhere(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield a rank that was collapsed and goes on, healthy, at another address; the first one leaves a textfile."""
    moves = 300
    waits = (config.condition_for_seconds, config.most_layers_for_seconds, config.divergence_for_seconds)
    until = moves + max(map(on_grid, waits)) + 60
    yield AlertCase(
        "a run that was terminated goes on elsewhere, healthy; what is left of it is no second rank",
        "StateCollapsed",
        {
            **_statuses(config, ("running", moves), ("terminated", _LONG)),
            **_statuses(config, ("", moves), ("running", until), instance=_ELSEWHERE),
            _condition(config): held((1, _LONG)),
            _condition(config, instance=_ELSEWHERE): f"{_nothing(moves)} {held((0, until))}",
            _condition(config, "healthy", instance=_ELSEWHERE): f"{_nothing(moves)} {held((1, until))}",
            series(config, _USE, layer=LAYER): held((0, _LONG)),
            series(config, _USE, layer=LAYER, instance=_ELSEWHERE): f"{_nothing(moves)} {held((1, until))}",
        },
        {until: ()},
        {"MostLayersCollapsed": {until: ()}, "RankDivergence": {until: ()}},
    )
    until = moves + on_grid(config.stalled_seconds + 1) + 120
    yield AlertCase(
        "a run that was killed goes on elsewhere",
        "RunStalled",
        {
            series(config, STATUS, status="running"): held((1, _LONG)),
            series(config, LAST_STEP): f"{counting(GRID, moves)} {held((moves, _LONG))}",
            **_statuses(config, ("", moves), ("running", until), instance=_ELSEWHERE),
        },
        {until: ()},
    )


def _broken_at_the_end(config: AlertsConfig) -> Iterator[AlertCase]:
    """Yield a run that ends because of a NaN, which only the last scrape of its endpoint has seen."""
    broken = series(config, "ess_monitor_nonfinite_states_total", layer=LAYER)
    firing = Firing(target(config, layer=LAYER))
    yield AlertCase(
        "a run that fails because of a NaN, and lingers",
        "NonFiniteState",
        {**_statuses(config, ("running", 600), ("failed", 600)), broken: held((0, 600), (1, 600))},
        {570: (), 600: (firing,), 870: (firing,), 900: (), 1170: ()},
    )
    yield AlertCase(
        "a run that fails because of a NaN, and whose endpoint closes at once",
        "NonFiniteState",
        {**_statuses(config, ("running", 630), ("", 600)), broken: f"{held((0, 600), (1, GRID))} {_nothing(600)}"},
        {570: (), 600: (firing,), 840: (firing,), 930: ()},
    )


def _down_after(config: AlertsConfig, status: str) -> AlertCase:
    wait, ended, down = on_grid(config.target_down_for_seconds), 120, 180
    fires = (Firing(target(config)),) if status == "failed" else ()
    return AlertCase(
        f"nobody answers after a run that has {status} and is still listed",
        "TargetDown",
        {
            **_statuses(config, ("running", ended), (status, down - ended), ("", _LONG)),
            series(config, "up"): held((1, down), (0, _LONG)),
        },
        {down - GRID: (), down + wait: fires, down + wait + 900: fires},
    )


def _down_again(config: AlertsConfig) -> Iterator[AlertCase | RecordCase]:
    wait, ended, down, begins, killed = on_grid(config.target_down_for_seconds), 120, 180, 900, 1200
    shown = {
        **_statuses(
            config, ("running", ended), ("finished", down - ended), ("", begins - down), ("running", killed - begins)
        ),
        series(config, "up"): held((1, down), (0, begins - down), (1, killed - begins), (0, _LONG)),
    }
    yield AlertCase(
        "a run finishes, another one begins at its address and is killed",
        "TargetDown",
        shown,
        {begins - GRID: (), killed: (), killed + wait: (Firing(target(config)),)},
    )
    for at, samples in ((begins - GRID, {braces(target(config)): 1.0}), (begins, {})):
        name = "the end of a run is remembered until another one begins at its address"
        yield RecordCase(name, shown, at, {"rank:ess_monitor_run_ended:max": samples})
