"""How the findings were made: what the page says of it, and that it is what the diagnosis did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ess_monitor.diagnosis import DiagnosisConfig
from ess_monitor.report import load_history, render_report
from ess_monitor.report.history import RunHistory
from ess_monitor.report.sections.diagnosis import (
    BENCHMARK,
    BENCHMARKED_SETTINGS,
    detector_facts,
    detector_table,
    was_judged_as_benchmarked,
)
from tests.report.helpers import (
    HOSTILE,
    LAYERS,
    Page,
    measurement,
    reading,
    rescued_run,
    run_info,
    unwanted_scripts,
    write_log,
)

TASK = DiagnosisConfig(metric="accuracy", metric_solved=0.9, warmup_steps=200)
SHORT_OF_THE_WHOLE = {"warmup_steps", "metric", "metric_mode", "metric_solved"}
"""What a user states of a run, and no figure depends on."""


def _history(tmp_path: Path, config: DiagnosisConfig | None = TASK, **log: Any) -> RunHistory:
    info = run_info(diagnosis={} if config is None else config.model_dump())
    return load_history(write_log(tmp_path / "log.jsonl", rescued_run(), info, **log))


def _rows(history: RunHistory) -> dict[str, dict[str, str]]:
    table = detector_table(history)
    assert table is not None
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def test_samples_waiting_times_and_findings_are_told(tmp_path: Path) -> None:
    history = _history(tmp_path, measurements_total={"ok": 10, "failed": 1, "skipped": 2})
    facts = dict(detector_facts(history))
    assert facts["Samples measured"] == "10, those of the warm-up included"
    assert facts["Samples judged"] == "8", "those at steps 0 and 100 fell into the warm-up"
    assert (facts["Samples failed"], facts["Samples skipped"]) == ("1", "2")
    assert facts["Warm-up"] == "200 steps, 22.2 % of the 900 steps"
    assert facts["Patience"] == "5 measurements; 10 for saturation"
    assert facts["Task metric"] == "accuracy, solved at 0.9 or more"
    assert facts["Collapsed"] == "utilization below 0.3, until 0.35"
    assert facts["Collapsed by its decay"].startswith("utilization below 0.5 at a retention below 0.75, until 0.55")
    assert facts["Saturated"] == "utilization 0.97 or more, until below 0.9"
    assert (facts["Findings raised"], facts["Findings cleared"]) == ("1", "1")
    assert facts["Findings with evidence"] == "1"
    assert facts["First finding"] == "step 400, 44.4 % of the 900 steps"


def test_each_layer_tells_where_its_judged_readings_lay(tmp_path: Path) -> None:
    rows = _rows(_history(tmp_path))
    assert rows[LAYERS[1]] == {
        "judged": "8",
        "below 0.3": "3",
        "below 0.5, retention below 0.75": "3",
        "0.97 or more": "0",
        "raised": "1",
        "cleared": "1",
        "first finding": "step 400 (44.4 %)",
    }
    assert rows[LAYERS[0]]["first finding"] == "–"


def test_without_a_task_metric_the_line_asks_for_low_retention(tmp_path: Path) -> None:
    history = _history(tmp_path, DiagnosisConfig(warmup_steps=0))
    facts = dict(detector_facts(history))
    assert facts["Task metric"] == "none"
    assert facts["Collapsed"] == "utilization below 0.3 at a retention below 0.75, until 0.35"
    assert "Collapsed by its decay" not in facts
    assert _rows(history)[LAYERS[1]]["below 0.3, retention below 0.75"] == "3"


def test_a_full_layer_counts_as_full_and_one_that_is_not_judged_counts_nowhere(tmp_path: Path) -> None:
    layers = ("full", "softmax")
    readings = (
        reading("full", 500, 1.0, per_position=(16.0, 16.0, 16.0)),
        reading("softmax", 500, 1.0, capacity_grows=True),
    )
    info = run_info(layers, diagnosis=TASK.model_dump())
    rows = _rows(load_history(write_log(tmp_path / "log.jsonl", [measurement(500, layers, readings=readings)], info)))
    assert rows["full"]["0.97 or more"] == "1"
    assert rows["softmax"]["judged"] == "0"
    assert rows["softmax"]["0.97 or more"] == "–"


def test_a_warmup_that_the_run_never_ended_is_said(tmp_path: Path) -> None:
    facts = dict(detector_facts(_history(tmp_path, DiagnosisConfig())))
    assert facts["Warm-up"] == "1000 steps, longer than the run"
    assert facts["Samples judged"] == "0"


def test_a_log_without_an_end_does_not_make_up_its_counters(tmp_path: Path) -> None:
    facts = dict(detector_facts(_history(tmp_path, finished=None)))
    assert facts["Samples failed, skipped"] == "unknown: the log has no end"
    assert facts["First finding"] == "step 400, 44.4 % of the 900 steps so far"


def test_an_old_log_says_what_it_does_not_hold(tmp_path: Path) -> None:
    history = _history(tmp_path, None)
    facts = dict(detector_facts(history))
    assert facts["Warm-up"] == facts["Patience"] == facts["Task metric"] == "not in this log"
    assert facts["Collapsed"] == "utilization below 0.3, until an unknown threshold"
    assert _rows(history)[LAYERS[1]]["below 0.3"] == "3"
    assert "How good these rules are" not in Page(render_report(history)).text


def test_the_first_of_several_layers_is_said_to_be_spared(tmp_path: Path) -> None:
    sentence = "blocks.0.mixer, the first of several layers, is never called collapsed"
    assert sentence in Page(render_report(_history(tmp_path))).text
    strict = TASK.model_copy(update={"spare_first_layer": False})
    assert sentence not in Page(render_report(_history(tmp_path / "strict", strict))).text


def test_the_quality_of_the_rules_is_told_of_runs_that_were_judged_by_them(tmp_path: Path) -> None:
    text = Page(render_report(_history(tmp_path))).text
    assert "How good these rules are" in text
    assert "collapsed 7 5 5 (precision 1.00) 5 of 7" in text
    assert "healthy 8 0" in text
    assert "too small a state 2 0" in text
    assert "no task metric" not in text
    assert "The default rules alone, without evidence, on 17 labeled runs" in text
    assert "All figures are those of the rules alone." in text
    alone = Page(render_report(_history(tmp_path / "alone", DiagnosisConfig()))).text
    assert "how good the rules are without one was not measured" in alone


@pytest.mark.parametrize("change", [{"patience": 3}, {"collapsed_below": 0.29}, {"spare_first_layer": False}])
def test_the_quality_of_other_rules_is_not_told(tmp_path: Path, change: dict[str, Any]) -> None:
    history = _history(tmp_path, TASK.model_copy(update=change))
    assert "How good these rules are" not in Page(render_report(history)).text


def test_what_was_measured_are_the_defaults() -> None:
    defaults = DiagnosisConfig().model_dump()
    assert set(BENCHMARKED_SETTINGS) == set(defaults) - SHORT_OF_THE_WHOLE
    assert was_judged_as_benchmarked(defaults), (
        "the defaults have changed: run benchmarks.detector and write its figures here"
    )


def test_the_figures_are_those_of_the_benchmark() -> None:
    import gzip
    import json

    from benchmarks.detector import RECORDED, evaluate, split

    rows, _ = evaluate(split(json.loads(gzip.decompress(RECORDED.read_bytes())))[1])
    figures = {row["condition"]: row for row in rows}
    said = {row[0]: row[1:] for row in BENCHMARK.rows}
    assert said["healthy"][:2] == (str(figures["healthy"]["runs"]), str(figures["healthy"]["flagged"]))
    for condition, name in (("collapsed", "collapsed"), ("saturated", "too small a state")):
        found = figures[condition]
        assert said[name][:2] == (str(found["runs"]), str(found["flagged"]))
        assert said[name][3] == found["found before 40%"]
    assert (
        said["collapsed"][2] == f"{figures['collapsed']['flagged']} (precision {figures['collapsed']['precision']:.2f})"
    )
    assert str(sum(row["runs"] for row in rows)) in BENCHMARK.caption


def test_the_name_of_the_task_metric_is_text(tmp_path: Path) -> None:
    html = render_report(_history(tmp_path, TASK.model_copy(update={"metric": HOSTILE[0]})))
    assert unwanted_scripts(html) == []
    assert f"{HOSTILE[0]}, solved at" in Page(html).text


def test_a_real_run_writes_its_settings_down(real_log: Path) -> None:
    assert load_history(real_log).info.diagnosis == DiagnosisConfig().model_dump()
