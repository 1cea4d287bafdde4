"""The metric table: one snapshot in, Prometheus metric families out. Imported only when Prometheus is used.

Every scrape cuts one immutable snapshot, so its numbers belong together; labels come from what was known at the start
(layers, conditions, outcomes, ...), so every counter exists at 0 before it first counts: `increase()` does not see a
counter that is born at 1. Sizes without a value are left out, as NaN would silence every alert that compares with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from ess_monitor.records import (
    ACTION_OUTCOMES,
    ACTIONS,
    CONDITIONS,
    OUTCOMES,
    PARTS,
    PHASES,
    RUN_STATUSES,
    HistogramData,
    RunInfo,
    Snapshot,
)

_LAYER_GAUGES = (
    ("state_capacity", "Theoretically realizable state-size of a layer, in state dimensions per channel."),
    ("effective_size", "Effective state-size of a layer at the last measurement, in state dimensions per channel."),
    ("utilization_ratio", "Effective state-size over capacity of a layer, 0 to 1."),
    ("retention_ratio", "Effective state-size of a layer over that of the same layer without decay."),
    ("utilization_min_ratio", "Smallest utilization of a layer over the ranks that measure; absent with one rank."),
    ("worst_rank", "Rank on which it was smallest; absent with one rank."),
)
_EMPTY = HistogramData(bounds=(), counts=())


class SnapshotCollector:
    """A custom collector over `snapshot()`.

    Args:
        run: what is fixed for the run; its layers are the values of the label `layer`.
        snapshot: cuts the run's counters at one moment; called once per scrape, from the scrape's thread.
    """

    def __init__(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        self._run = run
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """All families of one snapshot."""
        run, now = self._run, self._snapshot()
        yield from _about_the_run(run, now)
        yield from _about_the_layers(run, now)
        yield from _about_the_interventions(now)
        yield from _about_the_monitor(run, now)


def _about_the_run(run: RunInfo, now: Snapshot) -> Iterator[Metric]:
    yield info("build", "Versions of what runs.", run.versions)
    yield info(
        "run",
        "What the run is.",
        {
            "run_name": run.run_name,
            "model": run.model,
            "strategy": run.strategy,
            "world_size": str(run.world_size),
            "precision": run.precision,
        },
    )
    yield gauge("run_status", "1 for the status the run is in.", _one_hot(RUN_STATUSES, now.status), labels=("status",))
    yield gauge(
        "run_start_timestamp_seconds",
        "When the run started, in seconds since the epoch.",
        _since_epoch(run.start_timestamp_seconds),
    )
    yield gauge(
        "last_step_timestamp_seconds",
        "When the last optimizer step ended, in seconds since the epoch; absent before the first.",
        _since_epoch(now.last_step_timestamp_seconds),
    )
    yield gauge(
        "last_measurement_timestamp_seconds",
        "When the last measurement was taken, in seconds since the epoch; absent before the first.",
        _since_epoch(now.last_measurement_timestamp_seconds),
    )
    yield gauge("last_step", "Optimizer step the run is at.", {(): now.last_step})
    yield counter("steps", "Optimizer steps of this process.", {(): now.steps_total})
    yield histogram("training_step_seconds", "Duration of a training step in seconds.", {(): now.step_seconds})


def _about_the_layers(run: RunInfo, now: Snapshot) -> Iterator[Metric]:
    names = [layer.name for layer in run.layers]
    yield gauge("layers", "Layers that are measured.", {(): len(names)})
    for quantity, documentation in _LAYER_GAUGES:
        family = quantity if quantity.startswith("state_") else f"state_{quantity}"
        values: dict[tuple[str, ...], float | None] = {
            (_layer_label(name),): getattr(now.readings[name], quantity) for name in names if name in now.readings
        }
        yield gauge(family, documentation, values, labels=("layer",))
    yield gauge(
        "layer_condition",
        "1 for the condition a layer is in.",
        {
            (_layer_label(name), *condition): value
            for name in names
            for condition, value in _one_hot(CONDITIONS, now.conditions.get(name, "unknown")).items()
        },
        labels=("layer", "condition"),
    )
    yield counter(
        "condition_changes",
        "How often a layer entered a condition.",
        {(condition,): now.condition_changes_total.get(condition, 0) for condition in CONDITIONS},
        labels=("condition",),
    )
    yield gauge(
        "condition_threshold_ratio",
        "Thresholds of the diagnosis.",
        {(*_condition_and_bound(key),): value for key, value in run.thresholds.items()},
        labels=("condition", "bound"),
    )
    yield counter(
        "nonfinite_states",
        "Measurements of a layer that met NaN or infinity.",
        {(_layer_label(name),): now.nonfinite_total.get(name, 0) for name in names},
        labels=("layer",),
    )


def _about_the_interventions(now: Snapshot) -> Iterator[Metric]:
    yield counter(
        "interventions",
        "What the autopilot did, would have done or refused to do.",
        {
            (action, outcome): now.interventions_total.get(action, {}).get(outcome, 0)
            for action in ACTIONS
            for outcome in ACTION_OUTCOMES
        },
        labels=("action", "outcome"),
    )
    yield gauge(
        "interventions_active",
        "Treatments of layers that are under way.",
        {(action,): now.interventions_active.get(action, 0) for action in ACTIONS},
        labels=("action",),
    )
    yield gauge(
        "intervention_budget_remaining",
        "Actions the autopilot may still take in this run.",
        {(): now.intervention_budget_remaining},
    )
    yield gauge(
        "last_intervention_timestamp_seconds",
        "When an action of this kind was last applied, in seconds since the epoch; absent before.",
        {(action,): at for action, at in now.last_intervention_timestamp_seconds.items() if at > 0},
        labels=("action",),
    )
    yield gauge("autopilot_enabled", "1 when the autopilot may act (mode auto).", {(): float(now.autopilot_enabled)})


def _about_the_monitor(run: RunInfo, now: Snapshot) -> Iterator[Metric]:
    yield counter(
        "measurements",
        "Sampled steps by how they ended.",
        {(outcome,): now.measurements_total.get(outcome, 0) for outcome in OUTCOMES},
        labels=("outcome",),
    )
    yield histogram(
        "overhead_seconds",
        "Time of the monitor itself in seconds, by what it went into.",
        {(phase,): now.overhead_seconds.get(phase, _EMPTY) for phase in PHASES},
        labels=("phase",),
    )
    yield gauge("overhead_ratio", "Measured cost of the monitor over training time.", {(): now.overhead_ratio})
    yield gauge(
        "overhead_budget_ratio", "Cost over training time that the monitor may have.", {(): run.overhead_budget_ratio}
    )
    yield gauge(
        "measurement_interval_steps",
        "Steps between measurements, after the overhead budget has stretched them.",
        {(): now.interval_steps},
    )
    health = now.health
    yield counter(
        "part_failures",
        "Failures of a part of the monitor.",
        {(part,): health.part_failures_total.get(part, 0) for part in PARTS},
        labels=("part",),
    )
    yield gauge(
        "part_enabled",
        "1 while a part of the monitor works, 0 when it has turned itself off.",
        {(part,): float(part not in health.parts_off) for part in PARTS},
        labels=("part",),
    )
    yield gauge(
        "layers_enabled",
        "Layers that have not been given up after failures.",
        {(): sum(layer.name not in health.layers_off for layer in run.layers)},
    )
    yield gauge(
        "exporter_enabled",
        "1 while an exporter works, 0 when it has turned itself off.",
        {(name,): float(name not in health.exporters_off) for name in now.export_errors_total},
        labels=("exporter",),
    )
    yield counter(
        "export_errors",
        "Errors of an exporter.",
        {(name,): count for name, count in now.export_errors_total.items()},
        labels=("exporter",),
    )
    yield counter(
        "export_dropped",
        "Measurements that an exporter did not take.",
        {(name,): count for name, count in now.export_dropped_total.items()},
        labels=("exporter",),
    )
    yield gauge(
        "export_queue_length",
        "Measurements that wait for an exporter.",
        {(name,): count for name, count in now.export_queue_length.items()},
        labels=("exporter",),
    )


def _one_hot(names: Iterable[str], current: str) -> dict[tuple[str, ...], float]:
    return {(name,): float(name == current) for name in names}


def _since_epoch(seconds: float) -> dict[tuple[str, ...], float | None]:
    # 0 stands for "not yet"; exported as it is, a panel would say "56 years ago" and an alert on age would fire.
    return {(): seconds if seconds > 0 else None}


def _layer_label(name: str) -> str:
    # An empty label value is no label at all for Prometheus; the empty name is the model itself.
    return name or "root"


def _condition_and_bound(key: str) -> tuple[str, str]:
    condition, _, bound = key.partition(".")
    return condition, bound


PREFIX = "ess_monitor_"


def info(name: str, documentation: str, labels: Mapping[str, str]) -> Metric:
    """A family of one sample of value 1 that carries facts as labels."""
    family = InfoMetricFamily(PREFIX + name, documentation)
    family.add_metric([], {_label_name(key): value for key, value in labels.items()})
    return family


def gauge(
    name: str,
    documentation: str,
    values: Mapping[tuple[str, ...], float | None],
    labels: tuple[str, ...] = (),
) -> Metric:
    """A gauge by label values. What is None or not finite is left out: NaN would silence every alert."""
    family = GaugeMetricFamily(PREFIX + name, documentation, labels=labels)
    for label_values, value in values.items():
        if value is not None and math.isfinite(value):
            family.add_metric(label_values, value)
    return family


def counter(
    name: str, documentation: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
) -> Metric:
    """A counter by label values; the client appends `_total` to its name."""
    family = CounterMetricFamily(PREFIX + name, documentation, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def histogram(
    name: str, documentation: str, values: Mapping[tuple[str, ...], HistogramData], labels: tuple[str, ...] = ()
) -> Metric:
    """A histogram by label values, from cumulative counts."""
    family = HistogramMetricFamily(PREFIX + name, documentation, labels=labels)
    for label_values, data in values.items():
        buckets = [(repr(float(bound)), float(count)) for bound, count in zip(data.bounds, data.counts, strict=True)]
        family.add_metric(label_values, [*buckets, ("+Inf", float(data.count))], data.total_seconds)
    return family


def _label_name(key: str) -> str:
    name = re.sub(r"[^a-zA-Z0-9_]", "_", key)
    return f"_{name}" if not name or name[0].isdigit() else name
