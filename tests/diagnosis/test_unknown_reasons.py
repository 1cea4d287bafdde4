"""Why the condition of a layer is unknown, and until when."""

from __future__ import annotations

from tests.diagnosis.helpers import TASK, Run, reading

COLLAPSED = reading(0.15, 0.54, length=32)


def why(run: Run, layer: str = "mixer.1") -> str | None:
    return run.tracker.unknown_reasons.get(layer)


def test_it_is_said_why_a_condition_is_unknown_and_until_when() -> None:
    run = Run(TASK).measure(COLLAPSED, accuracy=0.25)
    assert why(run) == "warm-up until step 1000"
    run.measure(COLLAPSED, accuracy=0.25, times=11)
    assert run.step == 1200
    assert why(run) == "collapsed in 3 of 5 measurements in a row"
    run.measure(COLLAPSED, accuracy=0.25, times=3)
    assert why(run) is None


def test_a_layer_that_is_never_judged_says_why() -> None:
    attention = reading(0.02, None, layer="attention", capacity_grows=True)
    lost = COLLAPSED.model_copy(update={"status": "nonfinite", "effective_size": None, "message": "q has a NaN"})
    run = Run(TASK).measure(attention, lost, accuracy=0.25, times=12)
    assert why(run, "attention") == "a state that grows with the sequence is not judged"
    assert why(run) == "nonfinite: q has a NaN"


def test_a_first_layer_that_is_spared_says_why() -> None:
    first = COLLAPSED.model_copy(update={"layer": "mixer.0"})
    run = Run(TASK).measure(first, COLLAPSED, accuracy=0.25, times=20)
    assert "which may be right in a first layer" in str(why(run, "mixer.0"))
