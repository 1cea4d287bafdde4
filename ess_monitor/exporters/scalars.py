"""Flattens a measurement to scalars, with the tags that TensorBoard and every framework logger share.

Tags are `<section>/<name>`. Loggers group by the part before the first slash, so a section holds one quantity for all
layers (layers are compared with each other far more often than two quantities of one layer):

    ess_<quantity>/<layer>      one layer, for every quantity of LAYER_QUANTITIES that was measured
    ess_modulation_ratio_tau_<tau>/<layer>  state modulation at separators, where it is asked for
    ess_layers/<condition>      how many layers are in that condition
    ess_interventions/<layer>   strength of what was applied to it, only in the measurement that applied it
    ess_evidence_<name>/<layer> changes with another decay, only in the measurement of a finding on evidence
    ess_monitor/...             the whole model, and the monitor's own cost

TensorBoard, whose charts show the loss beside the sizes, also has

    ess_metrics/<metric>        what the training loop gave to the monitor, at the measured steps
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable

from ess_monitor import validation
from ess_monitor.exporters.evidence import evidence_scalars
from ess_monitor.records import CONDITIONS, Measurement, Reading

LAYER_QUANTITIES: tuple[str, ...] = (
    "utilization_ratio",
    "utilization_min_ratio",
    "effective_size",
    "effective_size_between",
    "effective_size_lower",
    "effective_size_upper",
    "minimum_effective_size",
    "total_effective_size",
    "entropy_size",
    "state_capacity",
    "retention_ratio",
    "mean_decay",
    "decay_product_norm",
    "far_share_ratio",
)
"""Fields of `Reading` that become scalars. Units are those of `ess_monitor.records`."""

UTILIZATION_TAG = "ess_monitor/utilization_ratio"
"""Sum of effective sizes over sum of capacities: the ratio of the whole model (a mean of ratios would overweigh small
layers). Layers whose capacity grows with the position are left out: their capacity is not a design choice."""
OVERHEAD_TAG = "ess_monitor/overhead_ratio"
INTERVAL_TAG = "ess_monitor/interval_steps"
LOSS_RATIO_TAG = "ess_monitor/loss_ratio"
"""Loss over its highest positive value so far, drawn on one axis with a utilization. TensorBoard only."""

_UNSAFE = re.compile(r"[^\w.\-]", re.ASCII)
_LONGEST = 200
"""Characters of a layer in a tag: MLflow allows 250 for all of it."""


def layer_tag(layer: str) -> str:
    """Return a layer's name in what every logger accepts: ASCII letters, digits, `_`, `-` and `.`, 209 at most.

    A name with other characters, or a longer one, gets a checksum of the original, so that two layers never share a tag
    and a layer keeps its tag from run to run.

    >>> layer_tag("blocks.0.mixer")
    'blocks.0.mixer'
    >>> layer_tag("a b"), layer_tag("a_b")
    ('a_b-806c5cd3', 'a_b')
    >>> layer_tag("")
    'root'
    """
    if not layer:
        return "root"  # the model itself is the layer
    safe = _UNSAFE.sub("_", layer)
    if safe == layer and len(safe) <= _LONGEST:
        return safe
    return f"{safe[:_LONGEST]}-{zlib.crc32(layer.encode('utf-8', 'surrogatepass')):08x}"


def scalar_tag(quantity: str, layer: str) -> str:
    """Return the tag of one quantity of one layer.

    >>> scalar_tag("utilization_ratio", "blocks.0.mixer")
    'ess_utilization_ratio/blocks.0.mixer'
    """
    return f"ess_{quantity}/{layer_tag(layer)}"


def loss_name(metrics: Iterable[str]) -> str | None:
    """Return the metric named "loss", or else the first whose name contains the word; None if there is none.

    >>> loss_name(["accuracy", "val/Loss"])
    'val/Loss'
    """
    named = [name for name in metrics if "loss" in name.lower()]
    return "loss" if "loss" in named else next(iter(named), None)


def scalars(measurement: Measurement) -> dict[str, float]:
    """Return the finite numbers of a measurement by tag, from readings with status ok.

    Examples:
        >>> from ess_monitor.records import Measurement, Reading
        >>> reading = Reading(step=7, layer="mixer", status="ok", effective_size=3.0, state_capacity=12.0)
        >>> values = scalars(Measurement(step=7, timestamp_seconds=0.0, readings=(reading,), conditions={}))
        >>> values["ess_effective_size/mixer"], values["ess_monitor/utilization_ratio"]
        (3.0, 0.25)
    """
    validation.instance("measurement", measurement, Measurement)
    values: dict[str, float | None] = {}
    measured = [reading for reading in measurement.readings if reading.status == "ok"]
    for reading in measured:
        for quantity in LAYER_QUANTITIES:
            values[scalar_tag(quantity, reading.layer)] = getattr(reading, quantity)
        for tau, ratio in reading.modulation_ratio:
            values[scalar_tag(f"modulation_ratio_tau_{tau:g}", reading.layer)] = ratio
    conditions = list(measurement.conditions.values())
    for condition in CONDITIONS:
        values[f"ess_layers/{condition}"] = float(conditions.count(condition))
    for action in measurement.actions:
        if action.outcome == "applied":
            values[f"ess_interventions/{layer_tag(action.layer)}"] = action.strength
    for finding in measurement.findings:
        if finding.evidence is not None:
            found = evidence_scalars(finding.evidence)
            values |= {scalar_tag(quantity, finding.layer): value for quantity, value in found.items()}
    values[UTILIZATION_TAG] = _model_utilization_ratio(measured)
    values[OVERHEAD_TAG] = measurement.overhead_ratio
    values[INTERVAL_TAG] = float(measurement.interval_steps)
    return {tag: float(value) for tag, value in values.items() if value is not None and math.isfinite(value)}


def _model_utilization_ratio(readings: list[Reading]) -> float | None:
    effective = capacity = 0.0
    for reading in readings:
        if reading.effective_size is not None and reading.state_capacity is not None and not reading.capacity_grows:
            effective += reading.effective_size
            capacity += reading.state_capacity
    return effective / capacity if capacity > 0 else None
