"""The metric table, scraped over HTTP from a real endpoint and read by the client's parser and by promtool."""

from __future__ import annotations

import gzip
import logging
import math
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from ess_monitor.errors import ExporterError
from ess_monitor.exporters import ExporterHub, PrometheusConfig, PrometheusExporter
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import (
    ACTION_OUTCOMES,
    ACTIONS,
    CONDITIONS,
    PARTS,
    PHASES,
    HealthData,
    HistogramData,
    RunInfo,
    Snapshot,
)
from tests.exporters.helpers import (
    ODD_LAYERS,
    PLAIN_LAYERS,
    RecordingExporter,
    action,
    evidence,
    free_port,
    reading,
    run_info,
    snapshot,
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@contextmanager
def _serving(run: RunInfo, now: Snapshot, registry: CollectorRegistry | None = None) -> Iterator[PrometheusExporter]:
    exporter = PrometheusExporter(PrometheusConfig(port=0), registry)
    exporter.start(run, lambda: now)
    try:
        yield exporter
    finally:
        exporter.close("finished")


def _get(url: str | None, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    assert url is not None
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def _scrape(run: RunInfo, now: Snapshot) -> Samples:
    with _serving(run, now) as exporter:
        status, _, body = _get(exporter.url)
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def _value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"ess_monitor_{name}", frozenset(labels.items())))


def _busy() -> Snapshot:
    histogram = HistogramData(bounds=(0.001, 0.01), counts=(3, 5), total_seconds=0.75, count=6)
    return snapshot(
        last_step=200,
        steps_total=150,
        last_step_timestamp_seconds=1_000_200.5,
        last_measurement_timestamp_seconds=1_000_100.5,
        step_seconds=histogram,
        overhead_seconds={"measure": histogram},
        overhead_ratio=0.004,
        interval_steps=120,
        measurements_total={"ok": 2, "failed": 1},
        readings={PLAIN_LAYERS[0]: reading(), "vanished": reading("vanished")},
        conditions={PLAIN_LAYERS[0]: "collapsed"},
        condition_changes_total={"collapsed": 1},
        nonfinite_total={PLAIN_LAYERS[1]: 4},
        interventions_total={"pull_to_identity": {"applied": 3, "rolled_back": 1}, "advise": {"dry_run": 2}},
        interventions_active={"pull_to_identity": 2},
        intervention_budget_remaining=4,
        last_intervention_timestamp_seconds={"pull_to_identity": 1_000_150.5, "rescale_alpha": 0.0},
        autopilot_enabled=True,
        export_errors_total={"event_log": 3},
        export_dropped_total={"event_log": 2},
        export_queue_length={"event_log": 1},
    )


def test_the_numbers_of_the_snapshot_are_scraped() -> None:
    samples = _scrape(run_info(), _busy())
    first, second = PLAIN_LAYERS
    assert _value(samples, "build_info", ess_monitor="0.1.0", torch="2.5.0") == 1
    assert (
        _value(samples, "run_info", run_name="demo", model="Net", strategy="single", world_size="1", precision="32")
        == 1
    )
    expected = {
        "run_start_timestamp_seconds": 1_000_000.0,
        "last_step_timestamp_seconds": 1_000_200.5,
        "last_measurement_timestamp_seconds": 1_000_100.5,
        "last_step": 200,
        "steps_total": 150,
        "layers": 2,
        "overhead_ratio": 0.004,
        "overhead_budget_ratio": 0.01,
        "measurement_interval_steps": 120,
        "intervention_budget_remaining": 4,
        "autopilot_enabled": 1,
        "training_step_seconds_sum": 0.75,
        "training_step_seconds_count": 6,
    }
    assert {name: _value(samples, name) for name in expected} == expected
    buckets = {bound: _value(samples, "training_step_seconds_bucket", le=bound) for bound in ("0.001", "0.01", "+Inf")}
    assert buckets == {"0.001": 3, "0.01": 5, "+Inf": 6}
    assert _value(samples, "overhead_seconds_count", phase="measure") == 6
    assert _value(samples, "state_capacity", layer=first) == 16
    assert _value(samples, "state_effective_size", layer=first) == 4
    assert _value(samples, "state_utilization_ratio", layer=first) == 0.25
    assert _value(samples, "state_retention_ratio", layer=first) == 0.5
    assert _value(samples, "layer_far_share_ratio", layer=first) == 0.125
    assert _value(samples, "layer_condition", layer=first, condition="collapsed") == 1
    assert _value(samples, "layer_condition", layer=first, condition="unknown") == 0
    assert _value(samples, "layer_condition", layer=second, condition="unknown") == 1
    assert _value(samples, "run_status", status="running") == 1
    assert _value(samples, "run_status", status="failed") == 0
    assert _value(samples, "condition_threshold_ratio", condition="collapsed", bound="upper") == 0.2
    assert _value(samples, "nonfinite_states_total", layer=second) == 4
    assert _value(samples, "measurements_total", outcome="failed") == 1
    assert _value(samples, "interventions_total", action="pull_to_identity", outcome="applied") == 3
    assert _value(samples, "interventions_total", action="pull_to_identity", outcome="rolled_back") == 1
    assert _value(samples, "interventions_total", action="advise", outcome="dry_run") == 2
    assert _value(samples, "interventions_active", action="pull_to_identity") == 2
    assert _value(samples, "export_errors_total", exporter="event_log") == 3
    assert _value(samples, "export_dropped_total", exporter="event_log") == 2
    assert _value(samples, "export_queue_length", exporter="event_log") == 1


def test_every_label_child_is_there_at_zero_from_the_start() -> None:
    hub = ExporterHub([RecordingExporter("event_log"), RecordingExporter("terminal")])
    at_start = snapshot(
        "starting",
        export_errors_total=hub.errors,
        export_dropped_total=hub.dropped,
        export_queue_length=hub.queue_lengths,
    )
    born = set(_scrape(run_info(), at_start))
    later = snapshot(
        overhead_seconds={
            phase: HistogramData(bounds=(0.001, 0.01, 0.1), counts=(1, 1, 1), total_seconds=0.1, count=1)
            for phase in PHASES
        },
        measurements_total={"ok": 1, "skipped": 1, "failed": 1},
        condition_changes_total=dict.fromkeys(CONDITIONS, 1),
        conditions=dict.fromkeys(PLAIN_LAYERS, "healthy"),
        nonfinite_total=dict.fromkeys(PLAIN_LAYERS, 1),
        interventions_total={kind: dict.fromkeys(ACTION_OUTCOMES, 1) for kind in ACTIONS},
        interventions_active=dict.fromkeys(ACTIONS, 1),
        intervention_budget_remaining=0,
        autopilot_enabled=True,
        export_errors_total={"event_log": 1, "terminal": 1},
        export_dropped_total={"event_log": 1, "terminal": 1},
        export_queue_length={"event_log": 1, "terminal": 1},
    )
    assert set(_scrape(run_info(), later)) == born


def test_every_phase_is_there_although_the_snapshot_knows_none() -> None:
    samples = _scrape(run_info(), snapshot(overhead_seconds={}))
    for phase in PHASES:
        assert _value(samples, "overhead_seconds_count", phase=phase) == 0


def test_a_run_without_interventions_shows_all_of_them_at_zero_but_no_time_of_the_last() -> None:
    samples = _scrape(run_info(), snapshot(autopilot_enabled=False))
    for action_kind in ACTIONS:
        assert _value(samples, "interventions_active", action=action_kind) == 0
        for outcome in ACTION_OUTCOMES:
            assert _value(samples, "interventions_total", action=action_kind, outcome=outcome) == 0
    assert _value(samples, "autopilot_enabled") == 0
    assert not any(name == "ess_monitor_last_intervention_timestamp_seconds" for name, _ in samples)


def test_what_the_ledger_counts_is_scraped() -> None:
    ledger = RunCounters(PLAIN_LAYERS, wall_clock=lambda: 1_000_300.25)
    ledger.autopilot(
        (action(), action(outcome="dry_run", action="rescale_alpha")), ("pull_to_identity",), budget=5, enabled=True
    )
    samples = _scrape(run_info(), ledger.snapshot())
    counts = {
        (dict(labels)["action"], dict(labels)["outcome"]): value
        for (name, labels), value in samples.items()
        if name == "ess_monitor_interventions_total" and value
    }
    assert counts == {("pull_to_identity", "applied"): 1, ("rescale_alpha", "dry_run"): 1}
    assert [_value(samples, "interventions_active", action=kind) for kind in ACTIONS] == [1, 0, 0]
    assert _value(samples, "intervention_budget_remaining") == 5
    assert _value(samples, "last_intervention_timestamp_seconds", action="pull_to_identity") == 1_000_300.25
    assert _value(samples, "autopilot_enabled") == 1


def test_what_has_failed_and_what_is_off_is_scraped() -> None:
    health = HealthData(
        part_failures_total={"capture": 7},
        parts_off=("export",),
        layers_off=(PLAIN_LAYERS[1], "not a layer of the run"),
        exporters_off=("event_log",),
    )
    samples = _scrape(run_info(), snapshot(health=health, export_errors_total={"event_log": 5, "tensorboard": 0}))
    assert {part: _value(samples, "part_failures_total", part=part) for part in PARTS} == {
        part: 7 if part == "capture" else 0 for part in PARTS
    }
    assert [part for part in PARTS if not _value(samples, "part_enabled", part=part)] == ["export"]
    assert _value(samples, "layers_enabled") == len(PLAIN_LAYERS) - 1
    assert _value(samples, "exporter_enabled", exporter="event_log") == 0
    assert _value(samples, "exporter_enabled", exporter="tensorboard") == 1


def test_the_latest_evidence_by_the_loss_is_scraped_as_shares_of_it() -> None:
    ledger, (first, second) = RunCounters(PLAIN_LAYERS), PLAIN_LAYERS
    assert not any("evidence" in name for name, _ in _scrape(run_info(), ledger.snapshot()))
    by_outputs = evidence(second, basis="kl", base=None)
    ledger.measured("ok", evidence={first: evidence(first, m50=0.0), second: by_outputs})
    ledger.measured("ok", evidence={first: evidence(first), "vanished": evidence("vanished")})
    ledger.measured("ok")
    samples = _scrape(run_info(), ledger.snapshot())
    assert {labels: value for (name, labels), value in samples.items() if "layer_evidence_m50_ratio" in name} == {
        frozenset({("layer", first)}): 0.125
    }
    assert _value(samples, "layer_evidence_cut_ratio", layer=first) == 0.5


def test_what_is_not_known_is_left_out_and_nothing_is_nan() -> None:
    bare = reading(effective_size=None, utilization_ratio=None, retention_ratio=None)
    broken = bare.model_copy(update={"state_capacity": math.nan})
    samples = _scrape(
        run_info(start_timestamp_seconds=0.0), snapshot(readings=dict(zip(PLAIN_LAYERS, (bare, broken), strict=True)))
    )
    names = [name for name, _ in samples]
    assert names.count("ess_monitor_state_capacity") == 1
    for name in ("state_effective_size", "run_start_timestamp_seconds", "last_measurement_timestamp_seconds"):
        assert f"ess_monitor_{name}" not in names
    assert not any(math.isnan(value) for value in samples.values())


def test_layers_that_are_not_of_the_run_are_not_shown() -> None:
    samples = _scrape(run_info(), _busy())
    assert {dict(labels)["layer"] for _, labels in samples if "layer" in dict(labels)} == set(PLAIN_LAYERS)


def test_odd_layer_names_survive_as_they_are() -> None:
    samples = _scrape(run_info(ODD_LAYERS), snapshot(nonfinite_total={name: k for k, name in enumerate(ODD_LAYERS)}))
    found = {
        dict(labels)["layer"]: value
        for (name, labels), value in samples.items()
        if name.endswith("nonfinite_states_total")
    }
    assert found == {name or "root": float(k) for k, name in enumerate(ODD_LAYERS)}


@pytest.mark.parametrize(
    ("fields", "examined", "cost"),
    [
        ({}, False, 14),
        ({"utilization_min_ratio": None, "worst_rank": None}, False, 12),
        ({"utilization_min_ratio": None, "worst_rank": None}, True, 14),
    ],
)
def test_a_layer_costs_twelve_series_two_more_with_several_ranks_or_evidence_and_the_rest_stays_below_two_hundred(
    fields: dict[str, None], examined: bool, cost: int
) -> None:
    def series(count: int) -> int:
        layers = tuple(f"blocks.{k}" for k in range(count))
        found = {name: evidence(name) for name in layers if examined}
        readings = {name: reading(name, **fields) for name in layers}
        return len(_scrape(run_info(layers), snapshot(readings=readings, evidence=found)))

    assert series(11) - series(10) == cost, "interventions are counted by kind, never by layer"
    assert series(0) < 200


def test_no_created_series() -> None:
    names = {name for name, _ in _scrape(run_info(), _busy())}
    assert not [name for name in names if name.endswith("_created")]


def test_two_runs_in_one_process_do_not_clash_and_the_global_registry_stays_clean() -> None:
    with _serving(run_info(), snapshot()) as one, _serving(run_info(run_name="other"), snapshot()) as two:
        assert one.url != two.url
        assert b'run_name="other"' not in _get(one.url)[2]
        assert b'run_name="other"' in _get(two.url)[2]
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("ess_monitor")]


@pytest.mark.parametrize("auto_describe", [True, False])
def test_an_injected_registry_is_used_and_left_as_it_was(auto_describe: bool) -> None:
    registry = CollectorRegistry(auto_describe=auto_describe)
    for _ in range(2):
        with _serving(run_info(), snapshot(), registry):
            assert registry.get_sample_value("ess_monitor_layers") == 2
        assert list(registry.collect()) == []


def test_openmetrics_and_gzip_are_negotiated() -> None:
    with _serving(run_info(), _busy()) as exporter:
        _, plain_headers, plain = _get(exporter.url)
        _, gzip_headers, packed = _get(exporter.url, Accept_Encoding="br, gzip;q=0.5")
        _, open_headers, opened = _get(exporter.url, Accept="application/openmetrics-text;version=1.0.0")
    assert "Content-Encoding" not in plain_headers
    assert plain_headers["Content-Type"].startswith("text/plain")
    assert gzip_headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed) == plain
    assert open_headers["Content-Type"].startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(opened.decode())} >= {"ess_monitor_layers", "ess_monitor_steps"}


def test_only_metrics_and_health_are_served_and_only_to_readers() -> None:
    with _serving(run_info(), snapshot()) as exporter:
        assert exporter.url is not None
        base = exporter.url.removesuffix("/metrics")
        assert _get(f"{base}/-/healthy")[::2] == (200, b"ok\n")
        for path in ("/", "/metrics/", "/metrics2", "/-/ready", "/../etc/passwd"):
            assert _get(base + path)[0] == 404
        assert _get(f"{base}/metrics?name[]=x")[0] == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            status, headers, _ = _get(exporter.url, method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        status, headers, body = _get(exporter.url, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 1000


def test_a_snapshot_that_fails_is_a_500_without_details_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Snapshot:
        raise RuntimeError("secret path")

    exporter = PrometheusExporter(PrometheusConfig(port=0))
    exporter.start(run_info(), failing)
    with caplog.at_level(logging.WARNING, "ess_monitor.exporters"):
        answers = [_get(exporter.url) for _ in range(3)]
    exporter.close("failed")
    assert [status for status, _, _ in answers] == [500] * 3
    assert not any(b"secret" in body for _, _, body in answers)
    assert [re.sub(".*500: ", "", record.getMessage())[:25] for record in caplog.records] == [
        "RuntimeError: secret path"
    ]


def test_a_port_in_use_is_an_error_that_names_the_way_out() -> None:
    with _serving(run_info(), snapshot()) as first:
        assert first.url is not None
        port = int(first.url.removesuffix("/metrics").rpartition(":")[2])
        second = PrometheusExporter(PrometheusConfig(port=port))
        with pytest.raises(ExporterError, match=rf"port {port} is in use.*port=0"):
            second.start(run_info(), snapshot)
        assert second.url is None
        assert _get(first.url)[0] == 200


def test_a_fixed_port_is_free_again_after_the_run() -> None:
    port = free_port()
    for _ in range(3):
        exporter = PrometheusExporter(PrometheusConfig(port=port))
        exporter.start(run_info(), lambda: snapshot())
        assert exporter.url == f"http://127.0.0.1:{port}/metrics"
        assert _get(exporter.url)[0] == 200
        exporter.close("finished")


@pytest.mark.servers
@pytest.mark.parametrize("now", [snapshot(), _busy()], ids=["at_start", "busy"])
def test_promtool_has_nothing_to_say(now: Snapshot) -> None:
    with _serving(run_info((*PLAIN_LAYERS, *ODD_LAYERS)), now) as exporter:
        body = _get(exporter.url)[2]
    result = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
