"""Tests of the alert on what of the monitor has turned itself off."""

from __future__ import annotations

from collections.abc import Mapping

from ess_monitor.alerts.cases.base import GRID, AlertCase, Firing, held, series, target
from ess_monitor.alerts.config import AlertsConfig

_BEGINS, _LASTS = 300, 600
_NOTHING_COMES_IN = "no more measurements come in: sizes and conditions are the last known ones"
_LOST: Mapping[str, str] = {
    "capture": _NOTHING_COMES_IN,
    "worker": _NOTHING_COMES_IN,
    "measurement": _NOTHING_COMES_IN,
    "agreement": "the ranks do not agree any more: each reads itself alone, and the autopilot does not act",
    "diagnosis": "layers are measured and no longer judged: conditions are the last known ones",
    "intervention": "the autopilot does nothing more: what it has attached stays as it is",
    "export": "the sinks get no more measurements; the endpoint goes on",
}
"""What no longer works without each part."""
_ALWAYS = (
    "The training goes on. It stays so for the rest of this run: the log has the reason, and a new monitor or a "
    "resumed run turns it on again."
)


def part_cases(config: AlertsConfig) -> tuple[AlertCase, ...]:
    """A part, an exporter and layers: silent, off, and on again in a new monitor."""
    return (_parts(config), _exporter(config), _layers(config))


def _part_off(config: AlertsConfig, part: str) -> Firing:
    return Firing(
        {**target(config), "part": part},
        f"Part {part} of the monitor is off in run wla-7",
        f"On rank 0 {_LOST[part]}. {_ALWAYS}",
    )


def _parts(config: AlertsConfig) -> AlertCase:
    """One after the other, a sample apart."""
    off_at = {part: _BEGINS + number * GRID for number, part in enumerate(_LOST)}
    on_again = _BEGINS + _LASTS
    return AlertCase(
        "every part turns itself off, until a new monitor is attached",
        "PartOff",
        "warning",
        {
            series("ess_monitor_part_enabled", {**target(config), "part": part}): held(
                (1, begins), (0, on_again - begins), (1, 300)
            )
            for part, begins in off_at.items()
        },
        {
            _BEGINS - GRID: (),
            **{second: tuple(_part_off(config, p) for p in _LOST if off_at[p] <= second) for second in off_at.values()},
            on_again - GRID: tuple(_part_off(config, part) for part in _LOST),
            on_again: (),
        },
    )


def _exporter(config: AlertsConfig) -> AlertCase:
    def enabled(exporter: str) -> str:
        return series("ess_monitor_exporter_enabled", {**target(config), "exporter": exporter})

    firing = Firing(
        {**target(config), "exporter": "tensorboard"},
        "Exporter tensorboard is off in run wla-7",
        f"On rank 0 the exporter tensorboard gets no more measurements; the others do. {_ALWAYS}",
    )
    return AlertCase(
        "one exporter of two turns itself off, until the run is resumed",
        "PartOff",
        "warning",
        {
            enabled("tensorboard"): held((1, _BEGINS), (0, _LASTS), (1, 300)),
            enabled("event_log"): held((1, _BEGINS + _LASTS + 300)),
        },
        {
            _BEGINS - GRID: (),
            _BEGINS: (firing,),
            _BEGINS + _LASTS - GRID: (firing,),
            _BEGINS + _LASTS: (),
        },
    )


def _layers(config: AlertsConfig) -> AlertCase:
    def firing(rank: int, given_up: int) -> Firing:
        return Firing(
            target(config, rank),
            "Layers are no longer measured in run wla-7",
            f"On rank {rank} {given_up} of the layers failed again and again and were given up: their sizes and "
            f"conditions are the last known ones. {_ALWAYS}",
        )

    half = _LASTS // 2
    resumed = _BEGINS + _LASTS
    return AlertCase(
        "one rank gives up a layer and then all of them, the other measures on",
        "PartOff",
        "warning",
        {
            **{series("ess_monitor_layers", target(config, rank)): held((8, resumed + 300)) for rank in (0, 1)},
            series("ess_monitor_layers_enabled", target(config, 0)): held((8, resumed + 300)),
            series("ess_monitor_layers_enabled", target(config, 1)): held((8, _BEGINS), (7, half), (0, half), (8, 300)),
        },
        {
            _BEGINS - GRID: (),
            _BEGINS: (firing(1, 1),),
            _BEGINS + half: (firing(1, 8),),
            resumed - GRID: (firing(1, 8),),
            resumed: (),
        },
    )
