"""A run of an event log, opened in Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ess_monitor
from ess_monitor import ConfigError
from ess_monitor.records import Reading
from tests.report.helpers import LAYERS, rescued_run, run_info, write_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "events.jsonl"
    write_log(path, rescued_run()[:3], run_info(run_name="first", start_timestamp_seconds=1.0))
    return write_log(path, rescued_run(), run_info(run_name="second"))


def test_a_run_is_chosen_by_name_or_number_and_is_the_last_by_default(log: Path) -> None:
    assert ess_monitor.load_run(log).name == "second"
    for chosen in ("first", 1, "1"):
        run = ess_monitor.load_run(log.parent, chosen)
        assert (run.name, len(run.readings)) == ("first", 3 * len(LAYERS))
    with pytest.raises(ConfigError, match=r"run: .*holds no 'third'.*1 first, 2 second"):
        ess_monitor.load_run(log, "third")
    with pytest.raises(ConfigError, match="does not exist; give the folder of a run"):
        ess_monitor.load_run(log.parent / "nowhere")


def test_its_records_are_those_that_were_measured(log: Path) -> None:
    run, measurements = ess_monitor.load_run(log), rescued_run()
    assert list(run.readings) == [reading for each in measurements for reading in each.readings]
    assert list(run.findings) == [finding for each in measurements for finding in each.findings]
    assert list(run.actions) == [action for each in measurements for action in each.actions]
    assert (run.layers, run.status, run.info.model) == (LAYERS, "finished", "Net")
    assert run.readings[-1].step == 900
    assert [reading.step for reading in run.readings[:2]] == [0, 0]
    assert set(run.conditions.values()) == {"healthy"}


def test_print_says_what_it_is(log: Path) -> None:
    run = ess_monitor.load_run(log)
    assert str(run).splitlines() == [
        "second: Net, finished",
        "2 layers, 20 readings from step 0 to 900",
        "findings: 2, actions: 1",
        "layers at the end: 2 healthy",
    ]
    assert repr(run) == "<Run 'second' of Net: finished, 20 readings>"
    assert repr(run.readings) == "<20 records: Reading>"
    assert repr(run.readings[:1]) == "<1 record: Reading>"


def test_a_data_frame_has_a_row_for_each_reading(log: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run = ess_monitor.load_run(log)
    frame = run.readings.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(Reading.model_fields)
    assert frame["step"].tolist() == [step for step in range(0, 1000, 100) for _ in LAYERS]
    by_layer = frame.groupby("layer")["utilization_ratio"].agg(["min", "max", "count"])
    assert by_layer.loc[LAYERS[1]].tolist() == [0.1, 0.6, 10]
    assert frame["per_position"].iloc[0] == pytest.approx((9.6, 9.0, 8.4))
    assert frame["mean_decay"].isna().all(), "it was not measured"
    assert len(run.findings.to_dataframe()) == 2
    empty = run.readings[:0].to_dataframe()
    assert (len(empty), list(empty.columns)) == (0, list(Reading.model_fields))


def test_a_figure_is_plotlys_own_by_its_name(log: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    run = ess_monitor.load_run(log)
    utilization = run.figure("utilization")
    assert isinstance(utilization, graph_objects.Figure)
    assert list(utilization.data[0].z[1]) == [0.6] * 4 + [0.1] * 3 + [0.6] * 3
    assert utilization.layout.title.text == "Utilization of every layer, ESS / TSS"
    for name in ("retention", "metrics", "overhead", "sizes", "positions"):
        assert isinstance(run.figure(name), graph_objects.Figure)
    sizes = run.figure("sizes", layer=LAYERS[0])
    assert sizes.layout.title.text == f"{LAYERS[0]}: State dimensions over steps"
    (ess,) = (list(line.y) for line in sizes.data if line.name == "ESS")
    assert ess[0] == pytest.approx(9.6)
    assert run.figure("sizes").layout.title.text.startswith(LAYERS[1]), "the one that needs attention most"


def test_a_wrong_figure_or_layer_is_told_what_there_is(log: Path) -> None:
    run = ess_monitor.load_run(log)
    names = "utilization, retention, metrics, modulation, overhead, sizes, positions, tolerances, spectra"
    with pytest.raises(
        ConfigError, match=rf"name: no 'utilization_'; did you mean 'utilization'\? give one of {names}"
    ):
        run.figure("utilization_")
    with pytest.raises(ConfigError, match=rf"layer: no 'blocks.1.mixr'; did you mean '{LAYERS[1]}'\? give one of"):
        run.figure("sizes", "blocks.1.mixr")
    with pytest.raises(ConfigError, match="layer: utilization shows all layers; leave it out"):
        run.figure("utilization", LAYERS[0])
    with pytest.raises(ConfigError, match=r"the log of second has no data for spectra of 'blocks\.1\.mixer'"):
        run.figure("spectra")
    with pytest.raises(ConfigError, match="name: no 7; give one of utilization"):
        run.figure(7)  # type: ignore[arg-type]


def test_without_plotly_the_error_says_what_to_install(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match=r'figure: needs plotly: pip install "ess-monitor\[plotly\]"'):
        ess_monitor.load_run(log).figure("utilization")


def test_without_pandas_the_error_says_what_to_install(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r'to_dataframe: needs pandas: pip install "ess-monitor\[pandas\]"'):
        ess_monitor.load_run(log).readings.to_dataframe()


def test_reading_a_log_loads_no_torch_pandas_or_plotly(log: Path) -> None:
    code = (
        "import sys, ess_monitor; name = ess_monitor.load_run(sys.argv[1]).name; "
        "print(name, {'torch', 'pandas', 'plotly'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=False)
    assert out.stdout.split() == ["second", "set()"], out.stderr
