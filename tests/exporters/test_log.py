"""Findings and actions in the process's own log: one line each, for people and for machines."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from ess_monitor.exporters import LogExporter
from tests.exporters.helpers import (
    ODD_LAYERS,
    action,
    evidence,
    examined,
    finding,
    measurement,
    run_info,
    snapshot,
)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What reaches a handler of the package's logger."""
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger, level = logging.getLogger("ess_monitor"), logging.getLogger("ess_monitor").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


def _run(*measurements: object, status: str = "finished") -> None:
    exporter = LogExporter()
    exporter.start(run_info(), snapshot)
    for each in measurements:
        exporter.export(each)  # type: ignore[arg-type]
    exporter.close(status)  # type: ignore[arg-type]


def test_a_run_is_one_line_per_event_and_none_per_measurement(records: list[logging.LogRecord]) -> None:
    _run(measurement(1), measurement(2, findings=(finding(step=2),), actions=(action(step=2),)), measurement(3))
    assert [record.getMessage().split()[0] for record in records] == [
        "run_started",
        "finding",
        "action",
        "run_finished",
    ]
    assert {record.name for record in records} == {"ess_monitor"}


def test_a_line_says_everything_as_pairs_in_the_order_of_the_record(records: list[logging.LogRecord]) -> None:
    _run(measurement(2, findings=(finding(step=2),), actions=(action(step=2),)))
    assert [record.getMessage() for record in records[1:3]] == [
        'finding run="demo" step=2 layer="blocks.0.mixer" condition=collapsed previous=healthy reason="used 2 of 16." '
        'advice="Raise alpha."',
        'action run="demo" step=2 layer="blocks.0.mixer" action=pull_to_identity outcome=applied '
        'finding="used 2 of 16." message="regularizer attached" strength=0.5 utilization_before=0.125 '
        "retention_before=0.5",
    ]


def test_the_same_fields_travel_as_a_dictionary(records: list[logging.LogRecord]) -> None:
    _run(measurement(2, findings=(finding(step=2),)))
    fields = records[1].ess_monitor  # type: ignore[attr-defined]
    assert fields["event"] == "finding"
    assert (fields["run"], fields["layer"], fields["condition"]) == ("demo", "blocks.0.mixer", "collapsed")
    assert "utilization_ratio" not in fields, "what is not known is left out"


def test_the_evidence_of_a_finding_is_short_fields_of_its_line(records: list[logging.LogRecord]) -> None:
    by_outputs = evidence(basis="kl", base=None, outcome="silent", far_share_ratio=None)
    _run(measurement(100, findings=(examined(), examined(found=by_outputs))))
    by_choice, silent = records[1:3]
    assert by_choice.levelno == logging.INFO, "a layer that forgets by choice needs no attention"
    assert "condition=forgets_by_choice previous=healthy" in by_choice.getMessage()
    assert by_choice.getMessage().endswith(
        'advice="Raise alpha." evidence=by_choice evidence_basis=loss evidence_step=100 evidence_batches=8 '
        "evidence_base=8 evidence_m50=1 evidence_m90=2 evidence_cut=4 evidence_m50_error=0.25 "
        "evidence_far_share_ratio=0.125"
    )
    assert by_choice.ess_monitor["evidence_m50"] == 1.0  # type: ignore[attr-defined]
    assert silent.levelno == logging.WARNING
    assert "evidence=silent evidence_basis=kl" in silent.getMessage()
    assert "evidence_base=" not in silent.getMessage()


def test_what_a_person_must_see_is_a_warning(records: list[logging.LogRecord]) -> None:
    healthy = finding().model_copy(update={"condition": "healthy", "previous": "collapsed"})
    outcomes = ("applied", "dry_run", "rejected", "recovered", "released", "failed", "rolled_back")
    actions = tuple(action(outcome=outcome) for outcome in outcomes)
    _run(measurement(2, findings=(finding(), healthy), actions=actions), status="failed")
    warned = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    assert len(warned) == 4
    for message, part in zip(warned, ("=collapsed", "=failed", "=rolled_back", 'status="failed"'), strict=True):
        assert part in message
    assert {record.levelno for record in records} == {logging.INFO, logging.WARNING}


def test_no_name_breaks_out_of_its_line_or_reaches_the_terminal(records: list[logging.LogRecord]) -> None:
    _run(measurement(2, findings=tuple(finding(layer) for layer in ODD_LAYERS)))
    lines = [record.getMessage() for record in records[1:-1]]
    assert len(lines) == len(ODD_LAYERS)
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert 'layer=""' in lines[0], "the model itself is the layer"
