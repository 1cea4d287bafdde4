"""A study of many runs, against numpy, on logs that are written here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from ess_monitor.analysis import Study, StudyRun, correlate
from ess_monitor.analysis.correlation import pearson
from ess_monitor.errors import ConfigError
from ess_monitor.records import Measurement
from ess_monitor.report import load_study, render_study
from tests.report.helpers import measurement, reading, run_info, write_log

STEPS = (10, 20, 30, 40, 50)


def made(number: int) -> tuple[dict[str, Any], list[Measurement]]:
    """One run: its hyperparameters, and measurements of two layers whose ESS and accuracy go their own ways."""
    generator = numpy.random.default_rng(number)
    capacity = (4.0, 16.0)[number % 2]
    facts = {"task": "mqar", "featurizer": ("gla", "wla")[number // 2 % 2], "kv_pairs": (4, 8)[number // 4 % 2]}
    accuracies = generator.uniform(0, 1, len(STEPS))
    measured = []
    for step, accuracy in zip(STEPS, accuracies, strict=True):
        sizes = generator.uniform(0.5, capacity, 2)
        readings = tuple(
            reading(name, step, size / capacity, state_capacity=capacity, effective_size=size, entropy_size=size / 2)
            for name, size in zip("ab", sizes, strict=True)
        )
        measured.append(measurement(step, ("a", "b"), readings=readings, metrics={"accuracy": accuracy}))
    return {**facts, "seed": number}, measured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(16):
        facts, measured = made(number)
        path = tmp_path / str(number) / "events.jsonl"
        write_log(path, measured, run_info(("a", "b"), run_name=f"run-{number}", hyperparameters=facts))
    return tmp_path


def expected_runs() -> list[dict[str, Any]]:
    found = []
    for number in range(16):
        facts, measured = made(number)
        sizes = [numpy.mean([each.effective_size for each in one.readings]) for one in measured]
        values = [one.metrics["accuracy"] for one in measured]
        found.append({**facts, "ess": sizes[-1], "tss": (4.0, 16.0)[number % 2], "metric": values[-1],
                      "within": numpy.corrcoef(sizes[1:], values[1:])[0, 1]})  # fmt: skip
    return found


def test_runs_and_correlations_are_those_of_numpy(folder: Path) -> None:
    study, runs = load_study(folder, seed=3), expected_runs()
    assert (study.metric, study.demand) == ("accuracy", "kv_pairs")
    by_name = {run.name: run for run in study.runs}
    for number, expected in enumerate(runs):
        run = by_name[f"run-{number}"]
        assert (run.task, run.featurizer, run.demand) == ("mqar", expected["featurizer"], expected["kv_pairs"])
        assert (run.effective_size, run.metric) == pytest.approx((expected["ess"], expected["metric"]))
        assert run.state_capacity == expected["tss"]
        assert run.entropy_size == pytest.approx(expected["ess"] / 2)
        assert run.within_correlation == pytest.approx(expected["within"])
        assert run.hyperparameters["seed"] == number
    quantities = {
        "ESS / demand": lambda run: run["ess"] / run["kv_pairs"],
        "entropy-ESS / demand": lambda run: run["ess"] / 2 / run["kv_pairs"],
        "TSS / demand": lambda run: run["tss"] / run["kv_pairs"],
        "ESS": lambda run: run["ess"],
        "TSS": lambda run: run["tss"],
    }
    assert len(study.correlations) == 3 * len(quantities)
    for each in study.correlations:
        group = [run for run in runs if each.featurizer in ("", run["featurizer"])]
        x = numpy.array([quantities[each.quantity](run) for run in group])
        y = numpy.array([run["metric"] for run in group])
        assert each.runs == len(group)
        assert each.r == pytest.approx(numpy.corrcoef(x, y)[0, 1])
        generator = numpy.random.default_rng(0)
        drawn = generator.integers(len(group), size=(2000, len(group)))
        with numpy.errstate(invalid="ignore"):
            resampled = [numpy.corrcoef(x[each], y[each])[0, 1] for each in drawn]
        low, high = numpy.nanpercentile(resampled, [2.5, 97.5])
        assert (each.low, each.high) == pytest.approx((low, high), abs=0.12)  # other resamples
        assert each.low < each.r < each.high


def test_cells_are_means_over_the_runs_of_a_place(folder: Path) -> None:
    study, runs = load_study(folder, resamples=0), expected_runs()
    assert len(study.cells) == 8
    for cell in study.cells:
        group = [
            run
            for run in runs
            if (run["featurizer"], run["tss"], run["kv_pairs"]) == (cell.featurizer, cell.state_capacity, cell.demand)
        ]
        assert cell.runs == len(group) == 2
        assert cell.metric == pytest.approx(numpy.mean([run["metric"] for run in group]))
        assert cell.within_correlation == pytest.approx(numpy.mean([run["within"] for run in group]))
        assert cell.utilization_ratio == pytest.approx(numpy.mean([run["ess"] / run["tss"] for run in group]))
    assert {each.low for each in study.correlations} == {None}


def test_the_bootstrap_is_that_of_its_seed(folder: Path) -> None:
    runs = load_study(folder, resamples=0).runs
    first, same, other = (correlate(runs, resamples=100, seed=seed).correlations[0] for seed in (1, 1, 2))
    assert first == same
    assert (first.low, first.high) != (other.low, other.high)


def test_a_difference_of_correlations_has_the_interval_of_both_over_the_same_resamples(folder: Path) -> None:
    runs = expected_runs()
    tss = [run["tss"] / run["kv_pairs"] for run in runs]
    ess, entropy = ([run["ess"] / share / run["kv_pairs"] for run in runs] for share in (1, 2))
    metric = [run["metric"] for run in runs]
    for by_configuration in (False, True):
        study = load_study(folder, resamples=500, by_configuration=by_configuration)
        assert study.by_configuration is by_configuration
        found = {(each.featurizer, each.quantity, each.other): each for each in study.differences}
        assert len(found) == len(study.differences) == 9
        for quantity, x in (("ESS / demand", ess), ("entropy-ESS / demand", entropy)):
            each = found["", quantity, "TSS / demand"]
            table = numpy.array([x, tss, metric])
            assert each.runs == 16
            assert each.difference == pytest.approx(difference_of_r(table))
            place = [(run["featurizer"], run["tss"], run["kv_pairs"]) for run in runs]
            units = [[k for k in range(16) if place[k] == one] for one in sorted(set(place))]
            units = units if by_configuration else [[k] for k in range(16)]
            drawn = numpy.random.default_rng(1).integers(len(units), size=(2000, len(units)))
            resampled = [difference_of_r(table[:, [k for unit in one for k in units[unit]]]) for one in drawn]
            assert (each.low, each.high) == pytest.approx(numpy.nanpercentile(resampled, [2.5, 97.5]), abs=0.12)


def difference_of_r(table: Any) -> float:
    """r of the first row with the last, minus r of the second with the last."""
    with numpy.errstate(invalid="ignore"):
        return float(numpy.corrcoef(table)[0, -1] - numpy.corrcoef(table)[1, -1])


def test_copies_of_a_configuration_make_no_interval_narrower() -> None:
    generator = numpy.random.default_rng(5)
    one = [
        StudyRun(name=str(k), metric=float(y), effective_size=float(x), state_capacity=2.0**k, demand=4)
        for k, (x, y) in enumerate(generator.uniform(0, 1, (8, 2)))
    ]
    few, many = (correlate(one * copies, by_configuration=True).differences for copies in (1, 5))
    for each, again in zip(few, many, strict=True):
        assert (each.low, each.high) == pytest.approx((again.low, again.high), abs=1e-12)
    low, high = few[0].low, few[0].high
    narrow = correlate(one * 5).differences[0]
    assert None not in (low, high, narrow.low, narrow.high)
    assert narrow.high - narrow.low < 0.7 * (high - low)
    same = [run.model_copy(update={"state_capacity": 8.0, "metric": k / 40}) for k, run in enumerate(one * 5)]
    alone = correlate(same, by_configuration=True).correlations[0]
    assert alone.r is not None
    assert (alone.low, alone.high) == (None, None), "one configuration says nothing of others"


def test_a_difference_with_an_undefined_correlation_is_undefined() -> None:
    runs = [StudyRun(name=str(k), metric=k / 10, effective_size=2.0 * k, state_capacity=8, demand=4) for k in range(6)]
    found = {each.quantity: (each.difference, each.low, each.high, each.runs) for each in correlate(runs).differences}
    assert found == {"ESS / demand": (None, None, None, 6), "ESS": (None, None, None, 6)}


def test_points_on_a_line_have_an_interval_of_one_and_constants_have_no_correlation() -> None:
    runs = [StudyRun(name=str(k), metric=k / 10, effective_size=2.0 * k, state_capacity=8, demand=4) for k in range(6)]
    found = {each.quantity: each for each in correlate(runs).correlations}
    assert set(found) == {"ESS / demand", "TSS / demand", "ESS", "TSS"}, "no run has an entropy-ESS"
    assert (found["ESS"].r, found["ESS"].low, found["ESS"].high) == pytest.approx((1, 1, 1))
    assert (found["TSS"].r, found["TSS"].low, found["TSS"].runs) == (None, None, 6)
    few = correlate(runs[:2]).correlations[0]
    assert (few.r, few.runs) == (None, 2)
    shifted = [run.model_copy(update={"demand": 0.0}) for run in runs]
    assert {each.quantity for each in correlate(shifted).correlations} == {"ESS", "TSS"}


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 0.123])
def test_equal_values_have_no_correlation_whatever_their_mean_is_rounded_to(value: float) -> None:
    for count in range(3, 60):
        assert pearson([value] * count, [value] * count) is None
        assert pearson([value] * count, range(count)) is None


def test_a_correlation_does_not_depend_on_the_unit_of_its_values() -> None:
    x, y = [1.0, 2.0, 5.0, 3.0], [0.2, 0.1, 0.9, 0.4]
    expected = numpy.corrcoef(x, y)[0, 1]
    for unit in (1e-300, 1e-200, 1.0, 1e200, 1e307):
        assert pearson([unit * each for each in x], y) == pytest.approx(expected)


def test_logs_without_hyperparameters_still_say_what_ess_and_tss_do(tmp_path: Path) -> None:
    for number in range(4):
        write_log(tmp_path / f"{number}.jsonl", made(number)[1], run_info(("a", "b"), run_name=str(number)))
    study = load_study(tmp_path)
    assert study.demand == ""
    assert {each.quantity for each in study.correlations} == {"ESS", "TSS"}
    assert "hyperparameters={'kv_pairs': ...}" in study.notes[-1]
    assert not study.cells
    assert all(run.featurizer for run in study.runs)


def test_a_run_that_ended_without_the_metric_is_counted_and_said(folder: Path) -> None:
    facts, measured = made(0)
    bare = [each.model_copy(update={"metrics": {}}) for each in measured]
    write_log(folder / "bare.jsonl", bare, run_info(("a", "b"), run_name="bare", hyperparameters=facts))
    study = load_study(folder)
    assert study.notes == ("16 of 17 runs have accuracy and ESS.",)
    assert study.correlations[0].runs == 16


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run has 'recall'; give one of accuracy"):
        load_study(folder, metric="recall")
    with pytest.raises(ConfigError, match=r"no run has the hyperparameter 'kv'; they have featurizer, kv_pairs, seed"):
        load_study(folder, demand="kv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no event log"):
        load_study(tmp_path / "empty")
    with pytest.raises(ConfigError, match="runs is empty"):
        correlate([])


def test_rows_and_page_show_every_run_and_escape_its_name(folder: Path) -> None:
    facts, measured = made(1)
    hostile = {**facts, "featurizer": "<script>"}
    write_log(folder / "x.jsonl", measured, run_info(("a", "b"), run_name="<b>run</b>", hyperparameters=hostile))
    study = load_study(folder)
    rows = study.rows()
    assert len(rows) == 17
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert {row["hyperparameter_kv_pairs"] for row in rows} == {4, 8}
    assert Study.model_validate(study.model_dump(mode="json")) == study
    page = render_study(study)
    assert "<b>run" not in page
    assert "Show layers" not in page, "its rows are no layers"
    assert "bootstrap over configurations" in render_study(load_study(folder, by_configuration=True, resamples=9))
    for text in (
        "Study of 17 runs: accuracy",
        "bootstrap over runs",
        "ESS / demand minus TSS / demand",
        "kv_pairs 8",
        "TSS 16",
        "&lt;script&gt;",
        "run-15",
    ):
        assert text in page
    assert not math.isnan(sum(each.r or 0.0 for each in study.correlations))
