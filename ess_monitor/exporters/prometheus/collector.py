"""Turns one snapshot into Prometheus metric families. Imported only when Prometheus is used.

Every scrape takes one immutable snapshot, so its numbers belong together. Labels come from what is known at the start
(layers, conditions, outcomes, ...), so every counter exists at 0 before it first counts: `increase()` misses the first
increment of a counter that appears at 1. They are those of the process: the counts of a resumed run go back to its
checkpoint, which would look like a restart. Sizes without a value are left out: NaN would silence every alert on them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from ess_monitor.exporters.evidence import AnyEvidence, evidence_ratios
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
    layer_title,
)

PREFIX = "ess_monitor_"

_LAYER_GAUGES = (
    ("state_capacity", "Theoretically realizable state-size of a layer, in state dimensions per channel."),
    ("effective_size", "Effective state-size of a layer at the last measurement, in state dimensions per channel."),
    ("utilization_ratio", "Effective state-size over capacity of a layer, 0 to 1."),
    ("retention_ratio", "Effective state-size of a layer over that of the same layer without decay."),
    ("utilization_min_ratio", "Smallest utilization of a layer over the ranks that measure; absent with one rank."),
    ("worst_rank", "Rank on which it was smallest; absent with one rank."),
)
_EVIDENCE_GAUGES = (
    (
        "m50_ratio",
        "Change of the loss with half the decay of a layer over that loss, in the latest evidence by the loss.",
    ),
    ("cut_ratio", "The same without what the layer remembers of the past."),
    ("quarter_ratio", "The same without a quarter of the layer's state dimensions."),
)
_EPOCH = "in seconds since the epoch"
_EPOCH_OR_NONE = f"{_EPOCH}; absent before the first"
_EMPTY = HistogramData(bounds=(), counts=())


class SnapshotCollector:
    """Collects the metric families of `snapshot()` for a registry.

    Args:
        run: what is fixed for the run; its layers are the values of the label `layer`.
        snapshot: returns the run's counters at one moment; called once per scrape, from the scrape's thread.
        labels: further labels of every series.
    """

    def __init__(self, run: RunInfo, snapshot: Callable[[], Snapshot], labels: Mapping[str, str] | None = None) -> None:
        self._run = run
        self._snapshot = snapshot
        self._labels = labels or {}

    def collect(self) -> Iterator[Metric]:
        """Yield all families of one snapshot."""
        run, now = self._run, self._snapshot().of_process
        for family in chain(
            _run_families(run, now), _layer_families(run, now), _intervention_families(now), _monitor_families(run, now)
        ):
            if self._labels:
                family.samples = [each._replace(labels={**each.labels, **self._labels}) for each in family.samples]
            yield family


def _run_families(run: RunInfo, now: Snapshot) -> Iterator[Metric]:
    facts = {name: str(getattr(run, name)) for name in ("run_name", "model", "strategy", "world_size", "precision")}
    yield info("build", "Versions of what runs.", run.versions)
    yield info("run", "What the run is.", facts)
    yield gauge("run_status", "1 for the status the run is in.", _one_hot(RUN_STATUSES, now.status), "status")
    started, stepped = _since_epoch(run.start_timestamp_seconds), _since_epoch(now.last_step_timestamp_seconds)
    measured = _since_epoch(now.last_measurement_timestamp_seconds)
    yield gauge("run_start_timestamp_seconds", f"When the run started, {_EPOCH}.", started)
    yield gauge("last_step_timestamp_seconds", f"When the last optimizer step ended, {_EPOCH_OR_NONE}.", stepped)
    yield gauge("last_measurement_timestamp_seconds", f"When the last sample was taken, {_EPOCH_OR_NONE}.", measured)
    yield gauge("last_step", "Optimizer step the run is at.", now.last_step)
    yield counter("steps", "Optimizer steps of this process.", now.steps_total)
    yield histogram("training_step_seconds", "Duration of a training step in seconds.", now.step_seconds)


def _layer_families(run: RunInfo, now: Snapshot) -> Iterator[Metric]:
    names = [layer.name for layer in run.layers]
    yield gauge("layers", "Layers that are measured.", len(names))
    for quantity, documentation in _LAYER_GAUGES:
        family = quantity if quantity.startswith("state_") else f"state_{quantity}"
        sizes = {layer_title(name): getattr(now.readings[name], quantity) for name in names if name in now.readings}
        yield gauge(family, documentation, sizes, "layer")
    conditions = {
        (layer_title(name), condition): value
        for name in names
        for condition, value in _one_hot(CONDITIONS, now.conditions.get(name, "unknown")).items()
    }
    shares = {layer_title(name): now.readings[name].far_share_ratio for name in names if name in now.readings}
    yield gauge("layer_far_share_ratio", "Share of a layer's output that comes from afar, 0 to 1.", shares, "layer")
    yield gauge("layer_condition", "1 for the condition a layer is in.", conditions, "layer", "condition")
    modulation = {
        (layer_title(name), f"{tau:g}"): ratio
        for name in names
        if name in now.readings
        for tau, ratio in now.readings[name].modulation_ratio
    }
    what = "By how much the effective state-size of a layer falls at separators, beyond other tokens, by tau."
    yield gauge("state_modulation_ratio", what, modulation, "layer", "tolerance")
    found: list[AnyEvidence] = [*now.evidence.values(), *now.state_evidence.values()]
    changes_of = [(layer_title(each.layer), evidence_ratios(each)) for each in found if each.layer in names]
    for quantity, documentation in _EVIDENCE_GAUGES:
        ratios = {layer: shares[quantity] for layer, shares in changes_of if quantity in shares}
        yield gauge(f"layer_evidence_{quantity}", documentation, ratios, "layer")
    changes = _by_name(CONDITIONS, now.condition_changes_total)
    yield counter("condition_changes", "How often a layer entered a condition.", changes, "condition")
    thresholds = {key.partition(".")[::2]: value for key, value in run.thresholds.items()}
    yield gauge("condition_threshold_ratio", "Thresholds of the diagnosis.", thresholds, "condition", "bound")
    nonfinite = {layer_title(name): now.nonfinite_total.get(name, 0) for name in names}
    yield counter("nonfinite_states", "Measurements of a layer that met NaN or infinity.", nonfinite, "layer")


def _intervention_families(now: Snapshot) -> Iterator[Metric]:
    done = {
        (action, outcome): now.interventions_total.get(action, {}).get(outcome, 0)
        for action in ACTIONS
        for outcome in ACTION_OUTCOMES
    }
    what = "What the autopilot did, would have done or refused to do."
    yield counter("interventions", what, done, "action", "outcome")
    active = _by_name(ACTIONS, now.interventions_active)
    yield gauge("interventions_active", "Treatments of layers that are under way.", active, "action")
    budget = now.intervention_budget_remaining
    yield gauge("intervention_budget_remaining", "Actions the autopilot may still take in this run.", budget)
    last = {action: _since_epoch(seconds) for action, seconds in now.last_intervention_timestamp_seconds.items()}
    applied = f"When an action of this kind was last applied, {_EPOCH_OR_NONE}."
    yield gauge("last_intervention_timestamp_seconds", applied, last, "action")
    yield gauge("autopilot_enabled", "1 when the autopilot may act (mode auto).", now.autopilot_enabled)


def _monitor_families(run: RunInfo, now: Snapshot) -> Iterator[Metric]:
    samples = _by_name(OUTCOMES, now.measurements_total)
    yield counter("measurements", "Sampled steps by how they ended.", samples, "outcome")
    overhead = _by_name(PHASES, now.overhead_seconds, _EMPTY)
    yield histogram("overhead_seconds", "Time of the monitor itself in seconds, by phase.", overhead, "phase")
    yield gauge("overhead_ratio", "Measured cost of the monitor over training time.", now.overhead_ratio)
    budget, interval = run.overhead_budget_ratio, now.interval_steps
    yield gauge("overhead_budget_ratio", "Cost over training time that the monitor may have.", budget)
    yield gauge("measurement_interval_steps", "Steps between measurements, stretched by the overhead budget.", interval)
    health, exporters = now.health, now.export_errors_total
    failures = _by_name(PARTS, health.part_failures_total)
    yield counter("part_failures", "Failures of a part of the monitor.", failures, "part")
    parts = {part: part not in health.parts_off for part in PARTS}
    yield gauge("part_enabled", "1 while a part of the monitor works, 0 when it has turned itself off.", parts, "part")
    layers = sum(layer.name not in health.layers_off for layer in run.layers)
    deferred = now.layers_deferred
    yield gauge("layers_deferred", "Layers that the last sample had no time for; they take turns.", deferred)
    yield gauge("layers_enabled", "Layers that have not been given up after failures.", layers)
    enabled = {name: name not in health.exporters_off for name in exporters}
    yield gauge("exporter_enabled", "1 while an exporter works, 0 when it has turned itself off.", enabled, "exporter")
    yield counter("export_errors", "Errors of an exporter.", exporters, "exporter")
    yield counter("export_dropped", "Measurements that an exporter did not take.", now.export_dropped_total, "exporter")
    yield gauge("export_queue_length", "Measurements that wait for an exporter.", now.export_queue_length, "exporter")


def info(name: str, documentation: str, labels: Mapping[str, str]) -> Metric:
    """Return a family of one sample of value 1 that carries facts as labels."""
    family = InfoMetricFamily(PREFIX + name, documentation)
    family.add_metric([], {_label_name(key): value for key, value in labels.items()})
    return family


def gauge(name: str, documentation: str, values: Any, *labels: str) -> Metric:
    """Return a gauge. Values that are None or not finite are left out: NaN would silence every alert.

    Args:
        name: without the prefix.
        documentation: the help text.
        values: one number; with `labels`, a mapping from a label's value (or a tuple of them) to a number.
        labels: names of the labels.
    """
    family = GaugeMetricFamily(PREFIX + name, documentation, labels=labels)
    for label_values, value in _samples(values, labels):
        if value is not None and math.isfinite(value):
            family.add_metric(label_values, value)
    return family


def counter(name: str, documentation: str, values: Any, *labels: str) -> Metric:
    """Return a counter, by the rules of `gauge`; the client appends `_total` to its name."""
    family = CounterMetricFamily(PREFIX + name, documentation, labels=labels)
    for label_values, value in _samples(values, labels):
        family.add_metric(label_values, value)
    return family


def histogram(name: str, documentation: str, values: Any, *labels: str) -> Metric:
    """Return a histogram, by the rules of `gauge`, from cumulative counts."""
    family = HistogramMetricFamily(PREFIX + name, documentation, labels=labels)
    for label_values, data in _samples(values, labels):
        buckets = [(repr(float(bound)), float(count)) for bound, count in zip(data.bounds, data.counts, strict=True)]
        family.add_metric(label_values, [*buckets, ("+Inf", float(data.count))], data.total_seconds)
    return family


def _samples(values: Any, labels: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items() if labels else [((), values)]:
        yield key if isinstance(key, tuple) else (key,), value


def _by_name(names: Iterable[Any], known: Mapping[Any, Any], default: Any = 0) -> dict[Any, Any]:
    return {name: known.get(name, default) for name in names}


def _one_hot(names: Iterable[str], current: str) -> dict[str, float]:
    return {name: float(name == current) for name in names}


def _since_epoch(seconds: float) -> float | None:
    # 0 stands for "not yet"; exported as it is, a panel would show "56 years ago" and an alert on age would fire.
    return seconds if seconds > 0 else None


def _label_name(key: str) -> str:
    name = re.sub(r"[^a-zA-Z0-9_]", "_", key)
    return f"_{name}" if not name or name[0].isdigit() else name
