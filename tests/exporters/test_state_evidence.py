"""Evidence on the size of a state in the sinks: as ratios, fields of a log line, rows of a table, and a gauge."""

from __future__ import annotations

from typing import Any

import pytest

from ess_monitor.exporters.evidence import evidence_fields, evidence_ratios, evidence_rows, evidence_scalars
from ess_monitor.exporters.prometheus.collector import SnapshotCollector
from ess_monitor.exporters.scalars import scalars
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import Finding, Measurement, StateEvidence
from tests.exporters.helpers import PLAIN_LAYERS, run_info


def found(layer: str = "mixer", **fields: Any) -> StateEvidence:
    values: dict[str, Any] = {
        "basis": "loss",
        "base": 4.0,
        "quarter": 1.0,
        "half": 2.0,
        "whole": 8.0,
        "quarter_error": 0.25,
        "spectrum_end_ratio": 0.5,
        "outcome": "needed",
    }
    return StateEvidence(step=90, layer=layer, batches=8, reason="seen", **{**values, **fields})


BY_OUTPUTS = found(basis="kl", base=None, outcome="spare")


def test_changes_are_shares_of_the_loss_or_nats() -> None:
    assert evidence_ratios(found()) == {"quarter_ratio": 0.25, "half_ratio": 0.5, "whole_ratio": 2.0}
    assert evidence_ratios(BY_OUTPUTS) == {}
    assert evidence_scalars(BY_OUTPUTS) == {
        "evidence_quarter_nats": 1.0,
        "evidence_half_nats": 2.0,
        "evidence_whole_nats": 8.0,
    }


def test_a_log_line_has_outcome_and_numbers() -> None:
    fields = evidence_fields(found())
    assert (fields["evidence"], fields["evidence_basis"], fields["evidence_quarter"]) == ("needed", "loss", 1.0)
    assert (fields["evidence_quarter_error"], fields["evidence_spectrum_end_ratio"]) == (0.25, 0.5)
    assert not any("m50" in name or "far" in name for name in fields)


def test_rows_say_what_was_left_out() -> None:
    assert dict(evidence_rows(found())) == {
        "outcome": "too small: the loss needs the last state dimensions",
        "compared": "the loss, on 8 batches that were run again",
        "loss as it is": "4",
        "change without a quarter of the state": "+1 ± 0.25, +25.00% of the loss",
        "change without half of the state": "+2, +50.00% of the loss",
        "change without the state": "+8, +200.00% of the loss",
        "last singular value / largest": "50.0%",
    }
    rows = dict(evidence_rows(found(basis="kl", base=None, outcome="spare", spectrum_end_ratio=None)))
    assert rows["outcome"] == "large enough: the outputs hardly depend on the last state dimensions"
    assert rows["last singular value / largest"] == "–"


def test_a_finding_on_it_is_restored_from_the_log_and_has_scalars() -> None:
    finding = Finding(
        step=100, layer="mixer", condition="saturated", previous="healthy", reason="full", evidence=found()
    )
    assert Finding.model_validate_json(finding.model_dump_json()) == finding
    measurement = Measurement(step=100, timestamp_seconds=0.0, readings=(), conditions={}, findings=(finding,))
    assert scalars(measurement)["ess_evidence_quarter_ratio/mixer"] == pytest.approx(0.25)


def test_the_latest_is_scraped_for_the_layers_of_the_run() -> None:
    counters, (first, second) = RunCounters(PLAIN_LAYERS), PLAIN_LAYERS
    counters.measured("ok", state_evidence={first: found(first), "vanished": found("vanished")})
    counters.measured("ok", state_evidence={second: found(second, quarter=0.5)})
    families = {family.name: family for family in SnapshotCollector(run_info(), counters.snapshot).collect()}
    samples = families["ess_monitor_layer_evidence_quarter_ratio"].samples
    assert {sample.labels["layer"]: sample.value for sample in samples} == {first: 0.25, second: 0.125}
