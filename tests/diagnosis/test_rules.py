"""The rules against the runs of the experiments: what was seen, and what has to be said of it."""

from __future__ import annotations

from typing import Any

import pytest

from ess_monitor.diagnosis import Context, DiagnosisConfig, judge
from ess_monitor.diagnosis.rules import attainable_utilization, full_state_utilization, is_rising, task_improves
from ess_monitor.records import Reading, Status
from tests.diagnosis.helpers import TASK, reading

ALONE = DiagnosisConfig()


def plateau(accuracy: float) -> Context:
    return Context(metrics=(accuracy,) * 10)


# Layer 1, 2 heads, TSS 16 unless said otherwise. (run, length, ESS/TSS, retention, accuracy, expected)
RUNS = [
    ("WLA beta 1, collapsed, low end", 32, 0.14, 0.54, 0.25, "collapsed"),
    ("WLA beta 1, collapsed, high end", 32, 0.16, 0.54, 0.28, "collapsed"),
    ("WLA beta 1, collapsed, random tokens", 32, 0.16, 0.27, 0.28, "collapsed"),
    ("WLA beta 1, rescued, low end", 32, 0.28, 1.0, 0.98, "healthy"),
    ("WLA beta 1, rescued, high end", 32, 0.33, 1.0, 1.0, "healthy"),
    ("GLA beta 1, collapsed, low end", 64, 0.21, 0.88, 0.147, "collapsed"),
    ("GLA beta 1, collapsed, high end", 64, 0.29, 0.42, 0.157, "collapsed"),
    ("GLA beta 1, solved by itself", 64, 0.18, 0.78, 0.958, "healthy"),
    ("GLA beta 1, solved by itself, random tokens", 64, 0.26, 0.35, 0.958, "healthy"),
    ("GLA beta 1, rescued", 64, 0.36, 1.0, 0.987, "healthy"),
    ("GLA-S6 alpha 1, collapsed", 64, 0.2, 0.59, 0.156, "collapsed"),
    ("GLA-S6 alpha 100, rescued", 64, 0.31, 1.29, 0.988, "healthy"),
    ("LA", 64, 0.4, None, 0.974, "healthy"),
]


@pytest.mark.parametrize(
    ("length", "utilization", "retention", "accuracy", "expected"),
    [run[1:] for run in RUNS],
    ids=[run[0] for run in RUNS],
)
def test_with_a_task_metric_every_run_of_the_experiments_is_judged_as_it_ended(
    length: int, utilization: float, retention: float | None, accuracy: float, expected: str
) -> None:
    verdict = judge(reading(utilization, retention, length=length), plateau(accuracy), TASK)
    assert verdict is not None
    assert verdict.condition == expected


@pytest.mark.parametrize(
    ("length", "utilization", "retention", "expected"),
    [
        (32, 0.15, 0.54, "collapsed"),  # WLA beta 1 collapsed
        (64, 0.2, 0.59, "collapsed"),  # GLA-S6 alpha 1
        (64, 0.18, 0.78, "healthy"),  # GLA that solved the task by itself
        (32, 0.15, 0.92, "healthy"),  # WLA stuck for want of positions: not a matter of memory
        (64, 0.2, None, "healthy"),  # LA: no decay to lose anything to
        (128, 0.55, 0.9, "healthy"),  # a GLA language model with beta 16
        (128, 0.2, 0.9, "healthy"),  # the same with a memory that its text does not need
    ],
)
def test_without_a_task_metric_only_low_use_that_the_decay_causes_is_a_collapse(
    length: int, utilization: float, retention: float | None, expected: str
) -> None:
    verdict = judge(reading(utilization, retention, length=length), Context(), ALONE)
    assert verdict is not None
    assert verdict.condition == expected


# WLA beta 16, L=32, kv=8 (state size, ESS/TSS, accuracy, expected)
SATURATION = [
    (2, 1.0, 0.76, "saturated"),
    (2, 1.0, 0.33, "saturated"),
    (2, 1.0, 0.80, "saturated"),
    (4, 1.0, 1.0, "healthy"),
    (4, 1.0, 0.70, "saturated"),
    (4, 1.0, 0.98, "healthy"),
    (8, 0.90, 1.0, "healthy"),
    (8, 0.96, 1.0, "healthy"),
    (16, 0.50, 1.0, "healthy"),
    (16, 0.56, 1.0, "healthy"),
]


@pytest.mark.parametrize(("state_capacity", "utilization", "accuracy", "expected"), SATURATION)
def test_a_full_state_is_saturated_when_its_task_is_not_solved(
    state_capacity: int, utilization: float, accuracy: float, expected: str
) -> None:
    full = reading(utilization, 1.0, length=32, state_capacity=state_capacity)
    verdict = judge(full, plateau(accuracy), TASK)
    assert verdict is not None
    assert verdict.condition == expected


@pytest.mark.parametrize("utilization", [0.97, 1.0])
def test_a_full_state_is_not_called_saturated_without_a_task_metric(utilization: float) -> None:
    verdict = judge(reading(utilization, None), Context(), ALONE)
    assert verdict is not None
    assert verdict.condition == "healthy"


def test_a_state_that_the_sequence_is_too_short_to_fill_is_never_saturated() -> None:
    as_full_as_can_be = reading(8 / 16, 1.0, length=16, positions=(8,))
    assert attainable_utilization(as_full_as_can_be) == 1.0
    assert full_state_utilization(as_full_as_can_be) is None
    verdict = judge(as_full_as_can_be, plateau(0.2), TASK)
    assert verdict is not None
    assert verdict.condition == "healthy"


def test_a_state_that_the_sequence_is_too_short_to_fill_is_not_taken_for_collapsed() -> None:
    # TSS 64 at length 16: an ESS of 7 is .11 of TSS, and 7/8 of what H_8 can have.
    verdict = judge(reading(7 / 64, 0.5, length=16, state_capacity=64, positions=(8,)), plateau(0.2), TASK)
    assert verdict is not None
    assert verdict.condition == "healthy"


def test_fullness_is_taken_only_at_positions_where_the_state_can_be_full() -> None:
    everywhere = reading(1.0, length=32, state_capacity=4, positions=range(1, 32))
    at_cap = everywhere.model_copy(
        update={
            "effective_size": everywhere.attainable_size,
            "per_position": tuple(min(4, p, 32 - p) for p in range(1, 32)),
        }
    )
    assert at_cap.effective_size is not None
    assert at_cap.effective_size < 4
    assert full_state_utilization(at_cap) == 1.0
    without_positions = at_cap.model_copy(update={"per_position": ()})
    assert full_state_utilization(without_positions) is None


@pytest.mark.parametrize("status", ["nonfinite", "too_short", "timed_out", "dropped", "failed"])
def test_a_reading_that_is_not_ok_is_not_judged(status: Status) -> None:
    assert judge(reading(0.1, 0.3, status=status), plateau(0.2), TASK) is None


def test_a_reading_without_sizes_is_not_judged() -> None:
    assert judge(Reading(step=1, layer="a", status="ok"), plateau(0.2), TASK) is None
    assert (
        judge(Reading(step=1, layer="a", status="ok", effective_size=0.0, attainable_size=0.0), Context(), TASK) is None
    )


@pytest.mark.parametrize("utilization", [0.01, 1.0])
def test_softmax_attention_is_not_judged(utilization: float) -> None:
    assert judge(reading(utilization, None, capacity_grows=True), plateau(0.2), TASK) is None


def test_the_first_of_several_layers_may_be_local() -> None:
    local = reading(0.15, 0.3, layer="mixer.0")
    first, config = Context(metrics=(0.2,), first_of_several=True), TASK
    assert judge(local, first, config).condition == "unknown", "nobody has seen that it is healthy"  # type: ignore[union-attr]
    assert judge(reading(0.6, 0.9, layer="mixer.0"), first, config).condition == "healthy"  # type: ignore[union-attr]
    strict = config.model_copy(update={"spare_first_layer": False})
    assert judge(local, first, strict).condition == "collapsed"  # type: ignore[union-attr]
    full = reading(1.0, layer="mixer.0")
    assert judge(full, first, config).condition == "saturated"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("utilizations", "expected"),
    [
        ((0.20, 0.19, 0.18, 0.17, 0.16, 0.15), "collapsed"),  # falling
        ((0.15,) * 6, "collapsed"),  # flat
        ((0.15, 0.16, 0.14, 0.16, 0.15, 0.15), "collapsed"),  # flat with noise
        ((0.14, 0.15, 0.17, 0.20, 0.22, 0.24), "healthy"),  # on its way up
        ((0.0,) * 6, "collapsed"),  # nothing at all (the paper's 4-layer GLA, figure 30a)
        ((0.0, 0.0, 0.0, 0.0, 0.1, 0.1), "healthy"),
    ],
)
def test_a_layer_whose_use_rises_is_not_collapsed(utilizations: tuple[float, ...], expected: str) -> None:
    low = reading(utilizations[-1], 0.4)
    context = Context(utilizations=utilizations, metrics=(0.2,) * 6)
    assert judge(low, context, TASK).condition == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("utilization", "retention", "metrics", "expected"),
    [
        (0.34, 0.65, (0.25,) * 10, "collapsed"),  # WLA beta 1 at a quarter of a run that never learns
        (0.49, 0.74, (0.25,) * 10, "collapsed"),
        (0.34, None, (0.25,) * 10, "healthy"),  # no decay
        (0.34, 0.78, (0.25,) * 10, "healthy"),  # the decay takes little
        (0.51, 0.65, (0.25,) * 10, "healthy"),  # half the memory is in use
        (0.34, 0.65, (0.25,) * 9 + (0.96,), "healthy"),  # solved
        (0.34, 0.65, (), "healthy"),  # nobody knows whether the task needs more
    ],
)
def test_a_memory_that_the_decay_starves_is_collapsed_before_it_is_nearly_empty(
    utilization: float, retention: float | None, metrics: tuple[float, ...], expected: str
) -> None:
    verdict = judge(reading(utilization, retention), Context(metrics=metrics), TASK)
    assert verdict is not None
    assert verdict.condition == expected
    assert verdict.suspected is None


@pytest.mark.parametrize(
    ("previous", "suspected"), [("unknown", "collapsed"), ("healthy", "collapsed"), ("saturated", None)]
)
@pytest.mark.parametrize(
    "rising", [{"utilizations": (0.1, 0.1, 0.2, 0.2), "metrics": (0.2,)}, {"metrics": (0.2, 0.2, 0.4, 0.4)}]
)
def test_a_layer_that_looks_collapsed_and_rises_is_suspected_unless_another_finding_stands(
    rising: dict[str, tuple[float, ...]], previous: str, suspected: str | None
) -> None:
    verdict = judge(reading(0.2, 0.5), Context(previous=previous, **rising), TASK)  # type: ignore[arg-type]
    assert verdict is not None
    assert (verdict.condition, verdict.suspected) == ("healthy", suspected)
    assert "on its way up" in verdict.reason


def test_a_full_memory_whose_task_moves_too_slowly_for_the_trend_window_is_still_learning() -> None:
    creeping = tuple(0.16 + 0.009 * index for index in range(20))
    full = reading(1.0)
    assert judge(full, Context(metrics=creeping), TASK).condition == "healthy"  # type: ignore[union-attr]
    assert judge(full, Context(metrics=creeping[-10:]), TASK).condition == "saturated"  # type: ignore[union-attr]
    short = TASK.model_copy(update={"plateau_window": 10})
    assert judge(full, Context(metrics=creeping), short).condition == "saturated"  # type: ignore[union-attr]


def test_the_trend_of_a_little_used_memory_is_that_of_the_trend_window_alone() -> None:
    long_ago = Context(metrics=(0.05,) * 10 + (0.25,) * 10)
    assert judge(reading(0.2, 0.5), long_ago, TASK).condition == "collapsed"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("utilization", "condition"),
    [(0.2, "collapsed"), (1.0, "saturated")],
)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_task_that_is_being_learned_is_left_alone(utilization: float, condition: str, mode: str) -> None:
    if mode == "max":
        config, learning, stuck = TASK, (0.25, 0.3, 0.4, 0.5, 0.6, 0.7), (0.25, 0.27, 0.26, 0.28, 0.25, 0.27)
    else:
        config = DiagnosisConfig(metric="loss", metric_mode="min", metric_solved=0.1)
        learning, stuck = (2.0, 1.8, 1.6, 1.4, 1.2, 1.0), (2.0, 1.98, 2.02, 2.0, 1.97, 1.99)
    low = reading(utilization, 0.4)
    assert judge(low, Context(metrics=learning), config).condition == "healthy"  # type: ignore[union-attr]
    assert judge(low, Context(metrics=stuck), config).condition == condition  # type: ignore[union-attr]


def test_a_loss_that_reached_its_target_is_solved() -> None:
    config = DiagnosisConfig(metric="loss", metric_mode="min", metric_solved=0.1)
    assert judge(reading(0.2, 0.4), Context(metrics=(0.09,)), config).condition == "healthy"  # type: ignore[union-attr]
    assert judge(reading(0.2, 0.4), Context(metrics=(0.11,)), config).condition == "collapsed"  # type: ignore[union-attr]


def test_a_metric_that_hovers_around_its_target_counts_as_solved() -> None:
    hovering = Context(metrics=(0.96, 0.93, 0.94, 0.93, 0.94))
    assert judge(reading(0.2, 0.4), hovering, TASK).condition == "healthy"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("retention", "says", "does_not_say"),
    [
        (0.54, "A->I regularizer", "not the decay"),  # WLA beta 1
        (0.92, "not the decay", "A->I"),  # WLA beta 16 without position information
        (None, "not the decay", "A->I"),  # LA
    ],
)
def test_the_advice_says_whether_the_decay_is_to_blame(retention: float | None, says: str, does_not_say: str) -> None:
    verdict = judge(reading(0.15, retention), plateau(0.27), TASK)
    assert verdict is not None
    assert verdict.condition == "collapsed"
    assert says in verdict.advice
    assert does_not_say not in verdict.advice


def test_the_reason_names_what_was_seen_and_the_threshold() -> None:
    verdict = judge(reading(0.15, 0.54), plateau(0.27), TASK)
    assert verdict is not None
    for text in ("0.15", "0.3", "0.54", "accuracy 0.27", "0.95"):
        assert text in verdict.reason
    starved = judge(reading(0.4, 0.54), plateau(0.27), TASK)
    assert starved is not None
    for text in ("0.40", "0.5", "0.54, below 0.75", "accuracy 0.27"):
        assert text in starved.reason
    assert judge(reading(1.0), plateau(0.27), TASK).advice.startswith(
        "the memory is full: raise the state size (now 16"
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("previous", "utilization", "retention", "metrics", "expected"),
    [
        ("collapsed", 0.32, 1.0, (0.3,), "collapsed"),  # between the lines: stays
        ("healthy", 0.32, 1.0, (0.3,), "healthy"),
        ("collapsed", 0.36, 1.0, (0.3,), "healthy"),
        ("collapsed", 0.52, 0.5, (0.3,), "collapsed"),  # between the lines of a starved layer: stays
        ("healthy", 0.52, 0.5, (0.3,), "healthy"),
        ("collapsed", 0.56, 0.5, (0.3,), "healthy"),
        ("collapsed", 0.4, 0.8, (0.3,), "collapsed"),  # and between those of its retention
        ("healthy", 0.4, 0.8, (0.3,), "healthy"),
        ("collapsed", 0.4, 0.86, (0.3,), "healthy"),
        ("collapsed", 0.2, 0.5, (0.97,), "healthy"),  # solved at low use
        ("collapsed", 0.2, 0.8, (), "collapsed"),  # without a metric the retention leads out
        ("healthy", 0.2, 0.8, (), "healthy"),
        ("collapsed", 0.2, 0.9, (), "healthy"),
        ("saturated", 0.93, 1.0, (0.3,), "saturated"),
        ("healthy", 0.93, 1.0, (0.3,), "healthy"),
        ("saturated", 0.89, 1.0, (0.3,), "healthy"),
        ("saturated", 1.0, 1.0, (0.97,), "healthy"),
        ("saturated", 0.2, 1.0, (0.3,), "collapsed"),
    ],
)
def test_a_layer_leaves_a_condition_on_another_line_than_it_enters(
    previous: str, utilization: float, retention: float, metrics: tuple[float, ...], expected: str
) -> None:
    context = Context(previous=previous, metrics=metrics)  # type: ignore[arg-type]
    assert judge(reading(utilization, retention), context, TASK).condition == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("new", "low", "full"),
    [
        (None, "collapsed", "saturated"),  # every known value is new
        ((), "suspected", "healthy"),
        ((0.25, 0.26, 0.25), "suspected", "healthy"),
        ((0.25, 0.26, 0.25, 0.26), "collapsed", "saturated"),
        ((0.1, 0.2, 0.3, 0.4), "suspected", "healthy"),
        ((0.3, 0.97, 0.9, 0.9), "healthy", "healthy"),  # solved by a value that is still among the newest
    ],
)
def test_only_new_values_of_the_metric_show_that_the_task_stands_still(
    new: tuple[float, ...] | None, low: str, full: str
) -> None:
    context = Context(metrics=(0.25,) * 20, new_in_trend=new, new_in_plateau=new)
    verdicts = [judge(reading(use, 0.5), context, TASK) for use in (0.2, 1.0)]
    assert all(verdict is not None for verdict in verdicts)
    said = ["suspected" if verdict.suspected == "collapsed" else verdict.condition for verdict in verdicts]  # type: ignore[union-attr]
    assert said == [low, full]
    if new is not None and len(new) < TASK.metric_new_values:
        assert f"too few new values ({len(new)})" in verdicts[0].reason  # type: ignore[union-attr]
    under_a_finding = Context(previous="collapsed", metrics=(0.25,), new_in_trend=())
    assert judge(reading(0.2, 0.5), under_a_finding, TASK).condition == "collapsed"  # type: ignore[union-attr]


def test_two_measurements_make_a_trend_and_one_does_not() -> None:
    assert is_rising((0.1, 0.2), ALONE)
    assert not is_rising((0.2,), ALONE)
    assert task_improves((0.1, 0.6), TASK)
    assert not task_improves((0.6,), TASK)


@pytest.mark.parametrize(("attainable", "expected"), [(None, 0.75), (16.0, 0.75), (15.9, None)])
def test_without_sizes_by_position_fullness_is_taken_where_the_geometry_caps_nothing(
    attainable: float | None, expected: float | None
) -> None:
    one = Reading(step=0, layer="a", status="ok", length=64, state_capacity=16, effective_size=12.0)
    assert full_state_utilization(one.model_copy(update={"attainable_size": attainable})) == expected


@pytest.mark.parametrize(("utilization", "condition"), [(0.5, "saturated"), (0.499, "healthy")])
def test_a_full_memory_stays_so_down_to_its_lower_line_included(utilization: float, condition: str) -> None:
    config = DiagnosisConfig(metric="accuracy", metric_solved=0.95, saturated_recovers_below=0.5)
    context = Context(previous="saturated", metrics=(0.5,) * 10)
    verdict = judge(reading(utilization), context, config)
    assert verdict is not None
    assert verdict.condition == condition


def test_a_healthy_layer_has_a_reason_too() -> None:
    solved = judge(reading(0.2), plateau(0.97), TASK)
    assert solved is not None
    assert solved.reason == "utilization 0.20, and the task is solved: accuracy reached 0.95"
    usual = judge(reading(0.6), Context(), ALONE)
    assert usual is not None
    assert "0.60" in usual.reason


@pytest.mark.parametrize(
    ("previous", "reason"),
    [
        ("healthy", "neither lost nor full"),
        ("unknown", "neither lost nor full"),
        ("saturated", f"below {TASK.saturated_recovers_below:g}, there is room again"),
        ("collapsed", f"above {TASK.collapsed_recovers_above:g}, or no longer lost to the decay"),
    ],
)
def test_the_reason_of_a_healthy_layer_says_what_it_recovered_from(previous: Any, reason: str) -> None:
    verdict = judge(reading(0.6, 0.9), Context(previous=previous, metrics=(0.5,) * 10), TASK)
    assert verdict is not None
    assert verdict.reason == f"utilization 0.60: {reason}"


def test_retention_is_named_as_too_low_only_where_it_decided() -> None:
    by_use_alone, by_retention = (judge(reading(use, 0.5), plateau(0.3), TASK) for use in (0.1, 0.4))
    assert by_use_alone is not None
    assert by_retention is not None
    assert "retention is 0.50" in by_use_alone.reason
    assert "retention is 0.50, accuracy" in by_use_alone.reason
    assert f"retention is 0.50, below {TASK.retention_below:g}" in by_retention.reason
