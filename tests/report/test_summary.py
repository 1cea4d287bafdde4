"""What is said of a run follows from what happened in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ess_monitor.records import HealthData, LayerInfo, Measurement
from ess_monitor.report import RunHistory, render_report
from ess_monitor.report.summary import Paragraph, headline, paragraphs
from tests.report.helpers import LAYERS, Page, action, finding, measurement, reading, rescued_run, run_info, snapshot

FIRST, SECOND = LAYERS


def _history(measurements: list[Measurement], **fields: Any) -> RunHistory:
    values: dict[str, Any] = {"final": snapshot("finished"), "info": run_info(), **fields}
    return RunHistory(
        Path("log"),
        measurements=tuple(measurements),
        findings=tuple(found for each in measurements for found in each.findings),
        actions=tuple(done for each in measurements for done in each.actions),
        **values,
    )


def _about(history: RunHistory, heading: str) -> Paragraph:
    (paragraph,) = [each for each in paragraphs(history) if each.heading.startswith(heading)]
    return paragraph


def _run_with(condition: Any, *outcomes: str) -> RunHistory:
    last = measurement(
        200,
        conditions={FIRST: "healthy", SECOND: condition},
        findings=(finding(SECOND, 200, condition),),
        actions=tuple(action(SECOND, 200, outcome) for outcome in outcomes),
    )
    return _history([measurement(0), last])


def test_a_healthy_run_needs_no_attention() -> None:
    history = _history([measurement(0), measurement(100)])
    assert headline(history) == "No layer was collapsed or saturated; 2 of 2 were judged."
    assert paragraphs(history) == ()


@pytest.mark.parametrize("condition", ["collapsed", "saturated"])
def test_a_layer_that_needs_attention_is_named_with_what_was_seen_and_what_to_do(condition: str) -> None:
    history = _run_with(condition)
    assert headline(history) == f"1 of 2 layers ended {condition}: {SECOND}."
    paragraph = _about(history, SECOND)
    assert paragraph.condition == condition
    assert paragraph.seen == (f"Step 200: healthy → {condition}: seen so",)
    assert paragraph.advice[0] == "Pull A towards I."


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ((), "No treatment was tried"),
        (("dry_run",), "only advised"),
        (("applied",), "did not restore the layer"),
        (("applied", "failed"), "did not restore the layer"),
        (("rolled_back",), "did not restore the layer"),
    ],
)
def test_advice_on_a_collapse_follows_from_what_was_tried(outcomes: tuple[str, ...], said: str) -> None:
    assert said in _about(_run_with("collapsed", *outcomes), SECOND).advice[-1]


def test_a_recovery_after_a_treatment_is_not_claimed_for_it() -> None:
    history = _history(rescued_run())
    assert headline(history) == f"1 of 2 layers recovered after being collapsed or saturated: {SECOND}."
    paragraph = _about(history, SECOND)
    assert paragraph.condition == "healthy"
    assert [line.split(":")[0] for line in paragraph.seen] == ["Step 400", "Step 400", "Step 700"]
    assert "One run cannot tell" in paragraph.advice[0]


def test_a_layer_that_forgets_by_choice_is_named_and_asks_for_nothing() -> None:
    found = finding(SECOND, 200, "forgets_by_choice", "unknown")
    last = measurement(200, conditions={FIRST: "healthy", SECOND: "forgets_by_choice"}, findings=(found,))
    assert headline(_history([last])) == (
        f"No layer was collapsed or saturated; 2 of 2 were judged. 1 of 2 layers ended forgetting by choice: {SECOND}."
    )
    assert paragraphs(_history([last])) == ()


def test_the_worst_layer_comes_first() -> None:
    last = measurement(
        100,
        conditions={FIRST: "saturated", SECOND: "collapsed"},
        findings=(finding(FIRST, 100, "saturated"), finding(SECOND, 100)),
    )
    assert [each.heading for each in paragraphs(_history([last]))] == [SECOND, FIRST]


def test_a_killed_run_and_a_failed_one_say_so() -> None:
    assert "The log has no end" in headline(_history([measurement(0)], final=None))
    assert "The run failed." in headline(_history([measurement(0)], final=snapshot("failed")))
    assert "told to end (SIGTERM)" in headline(_history([measurement(0)], final=snapshot("terminated")))
    assert headline(_history([])).startswith("Nothing was measured")


def test_layers_that_were_not_judged_are_explained() -> None:
    layers = ("young", "softmax", "said", "broken")
    info = run_info(layers).model_copy(
        update={
            "layers": tuple(
                LayerInfo(
                    name=name, module="M", supported=True, uninformative="it is full by construction" * (name == "said")
                )
                for name in layers
            )
        }
    )
    readings = (
        reading("young", 0),
        reading("softmax", 0, capacity_grows=True),
        reading("said", 0),
        reading("broken", 0, status="failed", message="ValueError: odd shape"),
    )
    history = _history(
        [measurement(0, layers, readings=readings, conditions=dict.fromkeys(layers, "unknown"))], info=info
    )
    assert headline(history) == "No layer was judged; the reasons are below."
    seen = dict(line.split(": ", 1) for line in _about(history, "Layers that were not judged").seen)
    assert "warm-up" in seen["young"]
    assert "grows with the position" in seen["softmax"]
    assert seen["said"] == "It is full by construction."
    assert "no valid reading" in seen["broken"]
    assert "ValueError: odd shape" in _about(history, "Readings without a size: failed").advice[0]


def test_a_first_layer_that_uses_little_is_neither_said_to_be_healthy_nor_to_be_young() -> None:
    settings = {"spare_first_layer": True, "warmup_steps": 100}
    after = measurement(100, conditions={FIRST: "unknown", LAYERS[1]: "healthy"})
    (seen,) = _about(_history([after], info=run_info(diagnosis=settings)), "Layers that were not judged").seen
    assert seen.startswith(f"{FIRST}: It uses little of its state, which may be right in the first of several layers")
    before = measurement(99, conditions=dict.fromkeys(LAYERS, "unknown"))
    (seen,) = _about(_history([before], info=run_info(diagnosis=settings)), "Layers that were not judged").seen
    assert "the warm-up was not over" in seen.lower()


@pytest.mark.parametrize("status", ["nonfinite", "too_short", "timed_out", "dropped"])
def test_readings_without_a_size_are_counted_and_explained(status: str) -> None:
    bad = tuple(reading(FIRST, 100, status=status) for _ in range(3))
    paragraph = _about(_history([measurement(0), measurement(100, readings=bad)]), f"Readings without a size: {status}")
    assert paragraph.seen == (f"3 readings of {FIRST}, the last at step 100.",)
    assert len(paragraph.advice[0]) > 40


def test_the_last_bad_reading_is_the_last_of_all_layers() -> None:
    late = measurement(200, readings=(reading(FIRST, 200, status="failed", message="late"),))
    early = measurement(100, readings=(reading(SECOND, 100, status="failed", message="early"),))
    paragraph = _about(_history([early, late]), "Readings without a size: failed")
    assert paragraph.seen == (f"2 readings of {FIRST} and {SECOND}, the last at step 200.",)
    assert paragraph.advice[0].endswith("late.")


def test_short_sequences_an_exceeded_budget_and_lost_lines_are_said() -> None:
    short = measurement(0, readings=(reading(FIRST, 0, attainable_size=10.0),), overhead_ratio=0.2)
    final = snapshot("finished", export_dropped_total={"prometheus": 3}, export_errors_total={"tensorboard": 2})
    history = _history([short], final=final, skipped_lines=4)
    assert FIRST in _about(history, "Sequences too short").seen[0]
    assert "20.00%" in _about(history, "The monitor cost more").seen[0]
    missing = " ".join(_about(history, "What is missing").seen)
    assert all(part in missing for part in ("4 lines", "prometheus dropped 3", "tensorboard failed 2"))


UNREAD = measurement(100, readings=tuple(reading(layer, 100, status="failed", message="odd") for layer in LAYERS))
OFF = HealthData(part_failures_total={"capture": 5}, parts_off=("capture",))
NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"info": run_info(())}, "no layer that can be measured"),
    "killed": ({"final": None}, "the log has no sample; the run was killed before its first one"),
    "short": ({"final": snapshot(steps_total=7, measurements_total={})}, "after 7 steps, before its first sample"),
    "skipped": ({"final": snapshot(measurements_total={"skipped": 3, "failed": 0})}, "3 sampled steps were skipped"),
    "failed": ({"final": snapshot(measurements_total={"failed": 2})}, "2 sampled steps failed"),
    "off": ({"final": snapshot(measurements_total={"failed": 5}, health=OFF)}, "capture turned itself off"),
    "lost": ({"final": snapshot(measurements_total={"ok": 4})}, "4 sampled steps were measured, and none reached this"),
    "unread": ({"measurements": (UNREAD,)}, "no reading of 1 sample has a size"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_run_without_a_measurement_says_so_and_why(case: str) -> None:
    fields, why = NOTHING[case]
    history = RunHistory(**{"path": Path("log"), "info": run_info(), "final": snapshot(), **fields})
    assert headline(history).startswith("Nothing was measured: ")
    assert why in headline(history)
    first = paragraphs(history)[0]
    assert first.heading == "Nothing was measured"
    assert why.lower() in " ".join(first.seen).lower()
    assert first.advice
    page = Page(render_report(history)).text
    assert "Nothing that needs attention" not in page
    assert why in page


def test_a_run_with_a_measurement_does_not_say_that_there_is_none() -> None:
    history = RunHistory(Path("log"), run_info(), (UNREAD, measurement(200)), final=snapshot())
    assert "Nothing was measured" not in Page(render_report(history)).text
