from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.diagnosis.rules import is_rising
from ess_monitor.errors import CheckpointError
from ess_monitor.records import Finding, Reading
from tests.diagnosis.helpers import TASK, Run, reading

COLLAPSED = reading(0.15, 0.54, length=32)
RESCUED = reading(0.31, 1.0, length=32)


def test_a_collapse_is_found_once_warm_up_and_patience_are_over_and_its_rescue_too() -> None:
    run = Run(TASK).measure(COLLAPSED, accuracy=0.25, times=13)
    assert run.findings == []
    assert run.condition() == "unknown"
    run.measure(COLLAPSED, accuracy=0.25)
    [found] = run.findings
    assert (found.step, found.layer, found.previous, found.condition) == (1400, "mixer.1", "unknown", "collapsed")
    assert (found.metric, found.utilization_ratio, found.retention_ratio) == (0.25, 0.15, 0.54)
    assert "5 measurements" in found.reason

    run.measure(COLLAPSED, accuracy=0.25, times=10).measure(RESCUED, accuracy=0.99, times=4)
    assert run.findings == [found]
    run.measure(RESCUED, accuracy=0.99)
    assert (run.findings[1].previous, run.findings[1].condition) == ("collapsed", "healthy")
    assert run.condition() == "healthy"


def test_turning_out_healthy_after_the_warm_up_is_no_finding() -> None:
    run = Run(TASK).measure(RESCUED, accuracy=0.99, times=30)
    assert run.findings == []
    assert run.tracker.conditions == {"mixer.1": "healthy"}


def test_the_fall_of_ess_at_the_start_of_a_healthy_run_is_not_a_collapse() -> None:
    run = Run(TASK)
    falling_then_rising = [0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.15, 0.15, 0.16, 0.18, 0.2, 0.23, 0.27, 0.31, 0.36, 0.42]
    for utilization in falling_then_rising:
        run.measure(reading(utilization, 0.6), accuracy=0.25)
    run.measure(reading(0.45, 0.8), accuracy=0.5).measure(reading(0.5, 0.9), accuracy=0.99, times=20)
    assert run.findings == []
    assert run.condition() == "healthy"


def test_the_warm_up_hides_a_collapse_that_is_there_from_the_start() -> None:
    late = Run(TASK.model_copy(update={"warmup_steps": 5000})).measure(COLLAPSED, accuracy=0.25, times=49)
    assert late.condition() == "unknown"
    early = Run(TASK.model_copy(update={"warmup_steps": 0})).measure(COLLAPSED, accuracy=0.25, times=5)
    assert early.condition() == "collapsed"


def test_a_streak_that_breaks_starts_again() -> None:
    run = Run(TASK).measure(RESCUED, accuracy=0.25, times=20)
    for _ in range(10):
        run.measure(COLLAPSED, accuracy=0.25, times=4).measure(RESCUED, accuracy=0.25)
    assert run.findings == []


def test_a_small_language_model_without_a_task_metric_gives_no_finding() -> None:
    run = Run(DiagnosisConfig())
    for index in range(60):
        use = 0.8 - 0.01 * min(index, 50)
        layers = [reading(use - 0.02 * k, 0.9 + 0.03 * (index % 3), layer=f"mixer.{k}") for k in range(4)]
        run.measure(*layers)
    assert run.findings == []
    assert set(run.tracker.conditions.values()) == {"healthy"}


def test_only_the_upper_layer_of_a_collapsed_run_is_reported() -> None:
    local = reading(0.16, 0.3, layer="mixer.0")
    run = Run(TASK).measure(local, COLLAPSED, accuracy=0.25, times=20)
    assert [finding.layer for finding in run.findings] == ["mixer.1"]
    assert run.tracker.conditions == {"mixer.0": "unknown", "mixer.1": "collapsed"}


HEALTHY = reading(0.6, 0.95)


def test_a_first_layer_comes_and_goes_between_unknown_and_healthy_without_a_word() -> None:
    low, used = reading(0.16, 0.3, layer="mixer.0"), reading(0.7, layer="mixer.0")
    run = Run(TASK).measure(used, HEALTHY, accuracy=0.25, times=20)
    assert run.condition("mixer.0") == "healthy"
    run.measure(low, HEALTHY, accuracy=0.25, times=TASK.patience)
    assert run.condition("mixer.0") == "unknown"
    run.measure(used, HEALTHY, accuracy=0.25, times=TASK.patience)
    assert run.condition("mixer.0") == "healthy"
    assert run.findings == []


def test_a_first_layer_that_was_full_and_uses_little_has_left_its_condition() -> None:
    full, low = reading(1.0, layer="mixer.0"), reading(0.16, 0.3, layer="mixer.0")
    run = Run(TASK).measure(full, HEALTHY, accuracy=0.25, times=40)
    run.measure(low, HEALTHY, accuracy=0.25, times=10)
    assert [(found.previous, found.condition) for found in run.findings][-1] == ("saturated", "unknown")


def test_the_only_layer_of_a_model_is_not_spared() -> None:
    assert Run(TASK).measure(COLLAPSED, accuracy=0.25, times=20).condition() == "collapsed"


def test_softmax_attention_stays_unknown() -> None:
    attention = reading(0.02, None, layer="attention", capacity_grows=True)
    run = Run(TASK).measure(attention, COLLAPSED, accuracy=0.25, times=30)
    assert run.condition("attention") == "unknown"
    assert [finding.layer for finding in run.findings] == ["mixer.1"]


@pytest.mark.parametrize("status", ["nonfinite", "dropped", "timed_out"])
def test_a_reading_that_is_not_ok_neither_counts_nor_breaks_a_streak(status: Any) -> None:
    lost = COLLAPSED.model_copy(update={"status": status, "effective_size": None})
    run = Run(TASK).measure(COLLAPSED, accuracy=0.25, times=12).measure(lost, accuracy=0.25, times=10)
    assert run.condition() == "unknown"
    assert run.measure(COLLAPSED, accuracy=0.25, times=2).condition() == "collapsed"
    assert run.measure(lost, accuracy=0.25, times=20).condition() == "collapsed"


@pytest.mark.parametrize("gap", [None, float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_missing_or_not_finite_leaves_the_last_known_one_valid(gap: float | None) -> None:
    low = reading(0.2, 0.4)
    solved = Run(TASK).measure(low, accuracy=0.99).measure(low, accuracy=gap, times=40)
    assert solved.findings == []
    unsolved = Run(TASK).measure(low, accuracy=0.2, times=4).measure(low, accuracy=gap, times=20)
    assert [finding.metric for finding in unsolved.findings] == [0.2]


def test_until_a_metric_is_known_the_rules_without_one_apply() -> None:
    full, stuck_for_another_reason = reading(1.0, None), reading(0.15, 0.92)
    assert Run(TASK).measure(full, times=30).condition() == "healthy"
    assert Run(TASK).measure(stuck_for_another_reason, times=30).condition() == "healthy"
    run = Run(TASK).measure(reading(0.15, 0.54), times=30)
    assert run.condition() == "collapsed"
    assert run.findings[0].advice.endswith("accuracy, the task metric, is not given: with it the diagnosis is surer")


def test_a_saturated_layer_gets_room_again_when_its_task_is_solved() -> None:
    run = Run(TASK).measure(reading(1.0), accuracy=0.7, times=20)
    assert run.condition() == "saturated"
    run.measure(reading(1.0), accuracy=0.97, times=5)
    assert [finding.condition for finding in run.findings] == ["saturated", "healthy"]


BETWEEN_THE_LINES_OF_USE = st.tuples(st.floats(0.3, 0.35, exclude_max=True), st.floats(0.75, 1.5))
BETWEEN_THE_LINES_OF_A_STARVED_LAYER = st.tuples(
    st.floats(0.3, 0.55, exclude_max=True), st.floats(0.75, 0.85, exclude_max=True)
) | st.tuples(st.floats(0.5, 0.55, exclude_max=True), st.floats(0.0, 0.85, exclude_max=True))
ADVERSARIAL = st.lists(
    BETWEEN_THE_LINES_OF_USE | BETWEEN_THE_LINES_OF_A_STARVED_LAYER,
    min_size=30,
    max_size=80,
)


@pytest.mark.parametrize("start", [0.1, 0.6])
@given(noise=ADVERSARIAL)
def test_noise_between_the_two_lines_never_changes_a_condition(start: float, noise: list[tuple[float, float]]) -> None:
    run = Run(TASK).measure(reading(start, 0.5), accuracy=0.2, times=20)
    settled, found = run.condition(), len(run.findings)
    for utilization, retention in noise:
        run.measure(reading(utilization, retention), accuracy=0.2)
    assert run.condition() == settled
    assert len(run.findings) == found


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.5), st.floats(0.0, 1.0)), max_size=120),
    st.integers(1, 6),
)
def test_a_condition_changes_at_most_once_in_patience_measurements(
    measurements: list[tuple[float, float, float]], patience: int
) -> None:
    run = Run(TASK.model_copy(update={"patience": patience, "warmup_steps": 0}))
    changes = []
    for index, (utilization, retention, accuracy) in enumerate(measurements, start=1):
        before = run.tracker.conditions.get("mixer.1", "unknown")
        run.measure(reading(utilization, retention), accuracy=accuracy)
        if run.condition() != before:
            changes.append(index)
    assert all(later - earlier >= patience for earlier, later in zip([0, *changes], changes, strict=False))
    assert len(run.findings) <= len(measurements) // patience


MEASUREMENT = st.tuples(
    st.lists(
        st.builds(
            reading,
            st.floats(0.0, 1.0),
            st.none() | st.floats(0.0, 1.5),
            layer=st.sampled_from(["mixer.0", "mixer.1", "b", "a"]),
            status=st.sampled_from(["ok", "ok", "ok", "nonfinite"]),
            capacity_grows=st.sampled_from([False, False, True]),
        ),
        max_size=4,
    ),
    st.sampled_from([None, float("nan"), 0.2, 0.25, 0.5, 0.94, 0.96]),
)


@given(st.lists(MEASUREMENT, max_size=40), st.integers(0, 40), st.integers(1, 3))
def test_a_run_that_resumes_goes_on_exactly_as_if_it_had_not_stopped(
    measurements: list[tuple[list[Reading], float | None]], stop: int, patience: int
) -> None:
    config = TASK.model_copy(update={"patience": patience, "warmup_steps": 300})

    def observe(tracker: Tracker, index: int) -> tuple[Finding, ...]:
        readings, accuracy = measurements[index]
        return tracker.observe(readings, {} if accuracy is None else {"accuracy": accuracy}, 100 * index)

    whole, first, second = Tracker(config), Tracker(config), Tracker(config)
    stop = min(stop, len(measurements))
    expected = [observe(whole, index) for index in range(len(measurements))]
    got = [observe(first, index) for index in range(stop)]
    # A writer that sorts keys must not change the order of the layers: the first one is special.
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), sort_keys=True, allow_nan=False)))
    got += [observe(second, index) for index in range(stop, len(measurements))]
    assert got == expected
    assert second.conditions == whole.conditions
    assert list(second.conditions) == list(whole.conditions)
    assert second.state_dict() == whole.state_dict()


def test_the_state_does_not_grow_with_the_run() -> None:
    run = Run(TASK).measure(COLLAPSED, accuracy=0.25, times=50)
    size = len(json.dumps(run.tracker.state_dict()))
    assert len(json.dumps(run.measure(COLLAPSED, accuracy=0.25, times=500).tracker.state_dict())) == size


@pytest.mark.parametrize(
    "breakage",
    [
        lambda state: state.pop("layers"),
        lambda state: state.update(version=2),
        lambda state: state.update(extra=1),
        lambda state: state.update(metrics=[float("nan")]),
        lambda state: state["layers"][0].update(condition="sick"),
        lambda state: state["layers"][0].update(streak=-1),
        lambda state: state["layers"][0].update(utilizations="full"),
        lambda state: state.clear(),
    ],
    ids=["no layers", "other version", "unknown field", "nan", "no condition", "negative", "no list", "empty"],
)
def test_a_state_that_cannot_be_read_is_refused_and_changes_nothing(breakage: Any) -> None:
    run = Run(TASK).measure(COLLAPSED, accuracy=0.25, times=20)
    broken = run.tracker.state_dict()
    breakage(broken)
    before = run.tracker.state_dict()
    with pytest.raises(CheckpointError, match="state of the diagnosis"):
        run.tracker.load_state_dict(broken)
    assert run.tracker.state_dict() == before


@pytest.mark.parametrize("nonsense", [None, 3, "state", ["a"]])
def test_something_that_is_no_state_at_all_is_refused(nonsense: Any) -> None:
    with pytest.raises(CheckpointError, match="start afresh"):
        Tracker().load_state_dict(nonsense)


def test_resuming_under_another_metric_forgets_the_old_ones_values() -> None:
    solved = Run(TASK).measure(COLLAPSED, accuracy=0.99, times=20).tracker.state_dict()
    tracker = Tracker(DiagnosisConfig(metric="loss", metric_mode="min", metric_solved=0.1))
    tracker.load_state_dict(solved)
    assert tracker.conditions == {"mixer.1": "healthy"}
    assert tracker.state_dict()["metrics"] == []
    without = Tracker()
    without.load_state_dict(solved)
    assert without.observe([COLLAPSED], {"accuracy": 0.9}, 3000) == ()


def test_resuming_under_a_smaller_window_keeps_the_newest_values() -> None:
    run = Run(TASK)
    for index in range(20):
        run.measure(reading(0.4 + index / 100), accuracy=index / 100, repeated=True)
    small = Tracker(TASK.model_copy(update={"trend_window": 4, "plateau_window": 4}))
    small.load_state_dict(run.tracker.state_dict())
    assert small.state_dict()["metrics"] == [0.16, 0.17, 0.18, 0.19]


def test_a_layer_that_fills_slowly_is_left_alone_and_found_when_it_stops() -> None:
    run = Run(TASK)
    for index in range(30):
        run.measure(reading(0.1 * 1.035**index, 0.5), accuracy=0.25)
    assert run.findings == []
    run.measure(reading(0.1 * 1.035**30, 0.5), accuracy=0.25, times=20)
    assert run.condition() == "collapsed"


def test_a_collapse_whose_rise_ends_is_found_without_waiting_for_patience_once_more() -> None:
    run = Run(TASK)
    for index in range(15):
        run.measure(reading(0.1 + 0.015 * index, 0.5), accuracy=0.25)
    assert run.condition() == "unknown"
    run.measure(reading(0.32, 0.5), accuracy=0.25, times=20)
    [found] = run.findings
    first_flat = next(
        step
        for step in range(1600, 3600, 100)
        if not is_rising(tuple(use_at(s) for s in range(step - 900, step + 1, 100)), TASK)
    )
    assert found.step == first_flat


def use_at(step: int) -> float:
    return min(0.1 + 0.015 * (step // 100 - 1), 0.32)


def test_a_suspicion_that_is_not_confirmed_leaves_no_trace() -> None:
    run = Run(TASK)
    for index in range(20):
        run.measure(reading(0.1 * 1.08**index, 0.5), accuracy=0.25)
    assert run.condition() == "unknown"
    run.measure(reading(0.6), accuracy=0.97, times=20)
    assert run.findings == []
    assert run.condition() == "healthy"


def test_saturation_needs_more_measurements_than_a_collapse() -> None:
    run = Run(TASK).measure(reading(1.0), accuracy=0.3, times=18)
    assert run.condition() == "unknown"
    run.measure(reading(1.0), accuracy=0.3)
    [found] = run.findings
    assert (found.condition, found.step) == ("saturated", 1900)
    assert "for 10 measurements" in found.reason


def test_a_small_full_state_that_learns_late_and_slowly_is_never_called_saturated() -> None:
    accuracies = [0.05, 0.1, 0.15, *[0.2 + 0.009 * index for index in range(30)], 0.5, 0.7, 0.9, 0.96, *[0.98] * 10]
    run = Run(TASK.model_copy(update={"warmup_steps": 300}))
    for accuracy in accuracies:
        run.measure(reading(1.0), accuracy=accuracy)
    assert run.findings == []


def test_a_state_of_the_same_version_with_a_shorter_metric_window_is_taken_up() -> None:
    state = Run(TASK).measure(COLLAPSED, accuracy=0.25, times=60, repeated=True).tracker.state_dict()
    state["metrics"] = state["metrics"][-10:]
    tracker = Tracker(TASK)
    tracker.load_state_dict(state)
    assert tracker.conditions == {"mixer.1": "collapsed"}
    assert tracker.state_dict()["metrics"] == [0.25] * 10


def test_a_metric_that_is_no_longer_given_no_longer_counts_as_learning() -> None:
    run = Run(TASK)
    for index in range(15):
        run.measure(reading(0.2, 0.5), accuracy=0.2 + 0.03 * index)
    assert run.findings == []
    run.measure(reading(0.2, 0.5), times=TASK.metric_constant_after + TASK.patience)
    assert run.condition() == "collapsed"


@pytest.mark.parametrize("stop", range(24))
def test_a_streak_goes_on_after_a_restart(stop: int) -> None:
    whole, first, second = Run(TASK), Run(TASK), Run(TASK)
    script = [COLLAPSED] * 14 + [RESCUED.model_copy(update={"effective_size": 8.0})] * 10
    for measurement in script:
        whole.measure(measurement, accuracy=0.25)
    for measurement in script[:stop]:
        first.measure(measurement, accuracy=0.25)
    second.step = first.step
    second.tracker.load_state_dict(first.tracker.state_dict())
    for measurement in script[stop:]:
        second.measure(measurement, accuracy=0.25)
    assert [finding.condition for finding in whole.findings] == ["collapsed", "healthy"]
    assert first.findings + second.findings == whole.findings
