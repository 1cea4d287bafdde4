"""What a resumed run exports: counts of its process from 0 on, and where it stands, from the first scrape on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ess_monitor import ExporterError, Monitor
from ess_monitor.exporters import PrometheusConfig, PrometheusExporter, TextfileConfig, TextfileExporter
from ess_monitor.records import Counts, Measurement, Snapshot
from tests.exporters.helpers import RecordingExporter, free_port, snapshot
from tests.exporters.prometheus.scraping import ask
from tests.pipeline.test_autopilot import Loop, config

Opened = Callable[[Monitor | None], Monitor]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
GROWING = ("_total", "_bucket", "_count", "_sum")


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Takes a monitor that is to be closed at the end."""
    with ExitStack() as stack:

        def take(monitor: Monitor | None) -> Monitor:
            assert monitor is not None
            stack.callback(monitor.close)
            return monitor

        yield take


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """Of a run in mode auto whose autopilot has acted, after 13 steps."""
    loop = Loop(config("auto")).run(13)
    assert loop.monitor is not None
    state = copy.deepcopy(loop.monitor.state_dict())
    loop.monitor.close()
    assert sum(state["ledger"]["interventions"]["pull_to_identity"].values()) > 0
    state["ledger"]["nonfinite"] = dict.fromkeys(state["ledger"]["nonfinite"], 3)
    return state


def scraped(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counted(samples: Samples) -> Samples:
    return {key: value for key, value in samples.items() if key[0].endswith(GROWING)}


def total(samples: Samples, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: value for (key, labels), value in samples.items() if key == f"ess_monitor_{name}" and value}


def _endpoint(folder: Path) -> tuple[Any, Callable[[], Samples]]:
    exporter = PrometheusExporter(PrometheusConfig(port=0))
    return exporter, lambda: scraped(ask(exporter.url).body.decode())


def _textfile(folder: Path) -> tuple[Any, Callable[[], Samples]]:
    path = folder / "run.prom"
    exporter = TextfileExporter(TextfileConfig(path=path, run_id="wla-7"))

    def read() -> Samples:
        exporter.export(None)  # type: ignore[arg-type]  # writes what is counted now
        return {
            (name, frozenset(pair for pair in labels if pair[0] not in ("run_id", "rank"))): value
            for (name, labels), value in scraped(path.read_text()).items()
        }

    return exporter, read


@pytest.mark.parametrize("sink", [_endpoint, _textfile])
@pytest.mark.parametrize("loaded_first", [True, False])
def test_counters_begin_at_0_in_every_process_and_hold_what_it_did(
    state: dict[str, Any], opened: Opened, tmp_path: Path, sink: Callable[[Path], Any], loaded_first: bool
) -> None:
    exporter, scrape = sink(tmp_path)
    seen: list[Measurement] = []
    recording = RecordingExporter(inline=True, on_export=seen.append)
    loop = Loop(config("auto"), exporters=[exporter, recording])
    monitor = opened(loop.monitor)
    if loaded_first:
        monitor.load_state_dict(state)
        monitor.start()
    else:
        monitor.start()
        before = scrape()
        assert set(counted(before).values()) == {0.0}
        monitor.load_state_dict(state)
    resumed = scrape()
    assert set(counted(resumed).values()) == {0.0}
    loop.step = state["step"]
    loop.run(10)
    monitor.flush()
    after = scrape()
    assert total(after, "steps_total") == {frozenset(): 10}
    assert sum(total(after, "measurements_total").values()) == len(seen) > 0
    done = Counter((action.action, action.outcome) for each in seen for action in each.actions)
    assert total(after, "interventions_total") == {
        frozenset({("action", action), ("outcome", outcome)}): count for (action, outcome), count in done.items()
    }
    assert total(after, "nonfinite_states_total") == {}
    now = monitor.snapshot()
    assert now.steps_total == state["step"] + 10
    assert set(now.nonfinite_total.values()) == {3}
    assert monitor.state_dict()["ledger"]["steps_total"] == state["step"] + 10


def test_a_resumed_run_shows_where_it_stands_before_it_measures_again(state: dict[str, Any], opened: Opened) -> None:
    exporter = PrometheusExporter(PrometheusConfig(port=0))
    monitor = opened(Monitor(Loop(None).model, config("auto"), exporters=[exporter]))
    monitor.start()
    monitor.load_state_dict(state)
    now = scraped(ask(exporter.url).body.decode())
    conditions = {
        dict(labels)["layer"]: dict(labels)["condition"]
        for (name, labels), value in now.items()
        if name == "ess_monitor_layer_condition" and value
    }
    known = {layer["name"]: layer["condition"] for layer in state["diagnosis"]["layers"]}
    assert "collapsed" in known.values()
    assert known.items() <= conditions.items()
    assert now["ess_monitor_last_step", frozenset()] == state["step"]
    applied = state["ledger"]["interventions"]["pull_to_identity"]["applied"]
    budget = config("auto").autopilot.budget
    assert now["ess_monitor_intervention_budget_remaining", frozenset()] == budget - applied


def test_a_process_that_goes_back_to_an_earlier_state_counts_on(state: dict[str, Any], opened: Opened) -> None:
    loop = Loop(config("auto"))
    monitor = opened(loop.monitor)
    loop.run(16)
    before = monitor.snapshot()
    monitor.load_state_dict(state)
    after = monitor.snapshot()
    assert (before.steps_total, after.steps_total) == (16, state["step"])
    assert before.process == after.process
    loop.run(2)
    assert monitor.snapshot().of_process.steps_total == 18


def test_a_resumed_monitor_that_has_not_stepped_keeps_its_port(state: dict[str, Any], opened: Opened) -> None:
    port = free_port()
    monitors = [
        opened(Monitor(Loop(None).model, config("auto"), exporters=[PrometheusExporter(PrometheusConfig(port=port))]))
        for _ in range(2)
    ]
    for monitor in monitors:
        monitor.load_state_dict(state)
    monitors[0].start()
    with pytest.raises(ExporterError, match="another monitor of this process"):
        monitors[1].start()
    assert ask(f"http://127.0.0.1:{port}/metrics").status == 200


def test_a_snapshot_of_an_older_log_has_counts_of_the_run_alone() -> None:
    old = snapshot(steps_total=7)
    assert old.of_process == old
    counts = {name: getattr(old, name) for name in Counts.model_fields}
    new = Snapshot(**{**dict(old), "process": Counts(**{**counts, "steps_total": 2})})
    assert (new.steps_total, new.of_process.steps_total) == (7, 2)
    assert Snapshot.model_validate(new.model_dump(mode="json")) == new
