"""Metric families from plain values: names get the prefix, what has no value is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from ess_monitor.records import HistogramData

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
