"""TensorBoard, read back with its own reader."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from ess_monitor.errors import ExporterError
from ess_monitor.exporters import TensorBoardConfig, TensorBoardExporter, scalars
from ess_monitor.exporters.tensorboard.exporter import OVERVIEW_TAG
from ess_monitor.exporters.tensorboard.heatmaps import Heatmap, colorize, heads, positions, spectrum
from ess_monitor.exporters.tensorboard.layout import OPEN_LAYERS, Spikes
from tests.exporters.helpers import ODD_LAYERS, action, finding, measurement, reading, run_info, snapshot
from tests.exporters.tensorboard.helpers import read, write


def _layout(events: EventAccumulator) -> layout_pb2.Layout:
    (event,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def test_every_scalar_is_there_with_its_step_and_time(tmp_path: Path) -> None:
    measurements = [measurement(step, ODD_LAYERS) for step in (100, 200)]
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), *measurements)
    events = read(tmp_path / "demo")
    expected = {**scalars(measurements[0]), "ess_metrics/loss": 0.5, "ess_monitor/loss_ratio": 1.0}
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        points = events.Scalars(tag)
        assert [point.step for point in points] == [100, 200]
        assert [point.wall_time for point in points] == [1_000_100.0, 1_000_200.0]
        assert points[0].value == pytest.approx(value)


@pytest.mark.parametrize("count", [OPEN_LAYERS, OPEN_LAYERS + 1])
def test_charts_of_many_layers_are_closed_at_first(tmp_path: Path, count: int) -> None:
    layers = tuple(f"blocks.{place}.mixer" for place in range(count))
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), measurement(10, layers), layers=layers)
    closed = {category.title: category.closed for category in _layout(read(tmp_path / "demo")).category}
    assert len(closed) == count + 2
    assert not any(closed[title] for title in ("ESS overview", "ESS and loss"))
    assert {closed[f"ESS layer: {name}"] for name in layers} == {count > OPEN_LAYERS}


def test_the_layout_is_written_once_and_its_charts_find_what_is_written(tmp_path: Path) -> None:
    layers = ("blocks.0.mixer", "blocks.1.mixer", "a b")
    write(
        TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)),
        measurement(10, layers, actions=tuple(action(layer, 10) for layer in layers)),
        measurement(20, layers),
        layers=layers,
    )
    events = read(tmp_path / "demo")
    tags = events.Tags()["scalars"]
    layout = _layout(events)
    assert [category.title for category in layout.category] == [
        "ESS overview",
        "ESS and loss",
        *(f"ESS layer: {name}" for name in layers),
    ]
    for category in layout.category:
        for chart in category.chart:
            if chart.HasField("margin"):
                (series,) = chart.margin.series
                assert {series.value, series.lower, series.upper} <= set(tags)
            for pattern in chart.multiline.tag:
                assert any(re.search(pattern, tag) for tag in tags), f"{chart.title}: nothing matches {pattern}"
    assert "ess_interventions/a_b-806c5cd3" in tags
    utilization = layout.category[0].chart[0]
    assert {tag for tag in tags if re.search(utilization.multiline.tag[1], tag)} == {
        "ess_intervention_steps/blocks.0.mixer",
        "ess_intervention_steps/blocks.1.mixer",
        "ess_intervention_steps/a_b-806c5cd3",
    }
    assert [tag for tag in tags if re.search(utilization.multiline.tag[0], tag)] == [
        tag for tag in tags if tag.startswith("ess_utilization_ratio/")
    ]


def test_a_chart_of_one_layer_does_not_show_another(tmp_path: Path) -> None:
    layers = ("blocks.1", "blocks.1.mixer", "blocks.11")
    acted = measurement(1, layers, actions=tuple(action(layer, 1) for layer in layers))
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), acted, layers=layers)
    events = read(tmp_path / "demo")
    category = _layout(events).category[2]
    matched = {
        tag
        for chart in category.chart
        for pattern in chart.multiline.tag
        for tag in events.Tags()["scalars"]
        if re.search(pattern, tag)
    }
    assert matched
    assert {tag.partition("/")[2] for tag in matched} == {"blocks.1"}


def test_scalars_and_layout_can_be_left_to_others(tmp_path: Path) -> None:
    config = TensorBoardConfig(log_dir=tmp_path, scalars=False, layout=False, heatmap_columns=0)
    write(TensorBoardExporter(config), measurement(findings=(finding(),)))
    tags = read(tmp_path / "demo").Tags()
    assert (tags["scalars"], tags["images"]) == ([], [])
    assert tags["tensors"] == ["ess_findings/blocks.0.mixer/text_summary"]


def test_what_was_applied_is_a_spike_at_its_own_step_and_its_strength_a_scalar(tmp_path: Path) -> None:
    write(
        TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)),
        measurement(100, actions=(action(step=110), action("blocks.1.mixer", 110, outcome="rejected"))),
        measurement(200, actions=(action(step=210, outcome="recovered"),)),
        measurement(300, actions=(action(step=310, strength=2.0),)),
    )
    events = read(tmp_path / "demo")
    spikes = [(point.step, point.value) for point in events.Scalars("ess_intervention_steps/blocks.0.mixer")]
    assert spikes == [(109, 0), (110, 1), (111, 0), (309, 0), (310, 1), (311, 0)]
    strengths = [(point.step, point.value) for point in events.Scalars("ess_interventions/blocks.0.mixer")]
    assert strengths == [(100, 0.5), (300, 2.0)]
    assert {tag for tag in events.Tags()["scalars"] if "intervention" in tag and "blocks.1" in tag} == set()


def test_spikes_of_neighboring_steps_and_of_the_first_step_never_go_back() -> None:
    spikes = Spikes()
    assert spikes.at(0) == [(0, 1.0), (1, 0.0)]
    points = [point for step in (1, 2, 5, 6, 7, 30) for point in spikes.at(step)]
    steps = [step for step, _ in points]
    assert steps == sorted(steps)
    assert [step for step, height in points if height == 1.0] == [1, 2, 5, 6, 7, 30]


def test_heat_maps_take_turns_and_the_last_ones_are_complete(tmp_path: Path) -> None:
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), *(measurement(step) for step in range(1, 6)))
    events = read(tmp_path / "demo")
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {
        OVERVIEW_TAG: [1, 3, 5],
        "ess_heads/blocks.0.mixer": [2, 5],
        "ess_positions/blocks.0.mixer": [4, 5],
        "ess_heads/blocks.1.mixer": [5],
        "ess_positions/blocks.1.mixer": [5],
    }, "a layer without a spectrum takes no turn"
    for tag in steps.keys() - {OVERVIEW_TAG}:
        picture = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
        rows = 4 if "heads" in tag else 3
        assert picture.size == (5 * 8, rows * 8), "five measurements of four heads or three positions, a square of 8"


def test_the_first_tag_is_a_map_of_all_layers_and_names_the_page_of_charts(tmp_path: Path) -> None:
    names = ("blocks.0.mixer", "blocks.1.mixer", "blocks.2.mixer")
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path))
    shares = ((0.0, 1.0, None), (0.25, 0.5, 2.0))
    readings = [
        tuple(
            reading(name, utilization_ratio=share) for name, share in zip(names, each, strict=True) if share is not None
        )
        for each in shares
    ]
    write(exporter, *(measurement(step, readings=each) for step, each in enumerate(readings)), layers=names)
    events = read(tmp_path / "demo")
    tags = [tag for kind in ("scalars", "images") for tag in events.Tags()[kind]]
    assert min(tags) == OVERVIEW_TAG
    assert "CUSTOM_SCALARS" in OVERVIEW_TAG
    picture = Image.open(io.BytesIO(events.Images(OVERVIEW_TAG)[-1].encoded_image_string))
    assert picture.size == (2 * 8, 3 * (128 // 3)), "high enough to be seen"
    seen = [[picture.getpixel((8 * column + 4, 42 * row + 20)) for column in (0, 1)] for row in range(3)]
    (dark, quarter), (full, half), (missing, more) = seen
    assert dark != full == more
    assert len({dark, quarter, half, full}) == 4
    assert missing == (128, 128, 128) or missing == (127, 127, 127)
    assert exporter.shown_by is not None
    assert exporter.shown_by.endswith(f"tensorboard --logdir {tmp_path} (charts of every layer: page CUSTOM SCALARS)")
    plain = TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path, layout=False)).shown_by
    assert plain is not None
    assert plain.endswith(f"tensorboard --logdir {tmp_path}")


def test_an_injected_writer_is_flushed_and_stays_open(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path / "unused"), writer=writer)
    assert exporter.inline, "a framework's writer is called on the framework's thread"
    write(exporter, measurement())
    assert read(tmp_path).Scalars("ess_effective_size/blocks.0.mixer")[0].value == 4.0
    writer.add_scalar("after", 1.0, 7)
    writer.close()
    assert [point.step for point in read(tmp_path).Scalars("after")] == [7]
    assert not (tmp_path / "unused").exists()


def test_an_own_writer_has_its_own_thread() -> None:
    assert not TensorBoardExporter().inline


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "", "what? a: name"])
def test_a_run_name_never_leaves_the_log_folder(tmp_path: Path, name: str) -> None:
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path / "logs"))
    exporter.start(run_info(run_name=name), lambda: snapshot())
    exporter.close("finished")
    (folder,) = (tmp_path / "logs").iterdir()
    assert [path for path in tmp_path.rglob("events*") if path.parent != folder] == []


@pytest.mark.parametrize(
    ("module", "message"),
    [("torch.utils.tensorboard", r'pip install "ess-monitor\[tensorboard\]"'), ("PIL", "heatmap_columns=0")],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module == "PIL":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExporterError, match=message):
        TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)).start(run_info(), lambda: snapshot())


def test_a_writer_that_fails_to_draw_is_still_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path))
    exporter.start(run_info(), lambda: snapshot())
    exporter.export(measurement(1))
    exporter.export(measurement(2))
    writer, closed = exporter._writer, []

    def no_image(*arguments: Any, **keywords: Any) -> None:
        raise OSError("disk full")

    real_close = writer.close
    monkeypatch.setattr(writer, "add_image", no_image)
    monkeypatch.setattr(writer, "close", lambda: (closed.append(True), real_close()))
    with pytest.raises(OSError, match="disk full"):
        exporter.close("finished")
    assert closed == [True]


def test_colours_get_brighter_with_the_value_and_nan_is_grey() -> None:
    colors_CHT = colorize(torch.linspace(0, 1, 101).unsqueeze(0))
    luminance = (torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1) * colors_CHT[:, 0]).sum(0)
    assert (luminance.diff() > 0).all()
    assert colors_CHT.min() >= 0
    assert colors_CHT.max() <= 1
    assert colorize(torch.tensor([[float("nan")]])).flatten().tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(colorize(torch.tensor([[-3.0, 9.0]])), colorize(torch.tensor([[0.0, 1.0]])))


def test_a_history_of_heads_is_bounded_and_leaves_gaps_for_heads_that_were_not_measured() -> None:
    history = Heatmap(columns=3, rows=2)
    for measured, sizes in (((0, 1), (9.0, 9.0)), ((0, 1), (4.0, 8.0)), ((1, 2), (16.0, 5.0)), ((0,), (0.0,))):
        history.add(heads(reading(heads=measured, per_head=sizes, state_capacity=16.0)))
    values = history.values().nan_to_num(-1.0)
    assert values.tolist() == [[0.25, -1.0, 0.0], [0.5, 1.0, -1.0]]


def test_a_history_scales_growing_capacity_by_what_was_seen() -> None:
    history = Heatmap(columns=3, rows=2)
    history.add(heads(reading(heads=(), per_head=(5.0, 10.0), state_capacity=1000.0, capacity_grows=True)))
    assert history.values().tolist() == [[0.5], [1.0]]
    assert history.changed
    history.image()
    assert not history.changed


def test_a_history_of_positions_keeps_evenly_spaced_ones() -> None:
    history = Heatmap(columns=2, rows=3)
    places = tuple(range(1, 10))
    history.add(
        positions(reading(positions=places, per_position=tuple(float(place) for place in places), state_capacity=10.0))
    )
    torch.testing.assert_close(history.values(), torch.tensor([[0.1], [0.4], [0.7]]))


def test_a_picture_of_spectra_lights_up_what_the_tolerance_counts() -> None:
    history = Heatmap(columns=4, rows=32)
    ranks = (1, 2, 3, 4)
    history.add(spectrum(reading(spectrum=(10.0, 0.1, 1e-3, 0.0), spectrum_ranks=ranks, tolerance=1e-3)))
    history.add(spectrum(reading(spectrum=(1e-3, 1e-4, 1e-9, 0.0), spectrum_ranks=ranks, tolerance=1e-3)))
    torch.testing.assert_close(history.values(), torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]))


def test_a_spectrum_without_a_tolerance_is_dark_from_single_precision_down() -> None:
    lit = spectrum(reading(spectrum=(1.0, 1e-8, 0.0), spectrum_ranks=(1, 2, 3), tolerance=0.0)).cells
    assert lit == {1: pytest.approx(7.0), 2: 0.0, 3: 0.0}
    assert spectrum(reading(spectrum=(0.0,), spectrum_ranks=(1,), tolerance=0.0)).cells == {1: 0.0}


def test_the_loss_is_drawn_as_a_share_of_its_highest_so_far(tmp_path: Path) -> None:
    losses = ({"acc": 0.1, "train/loss": 4.0}, {"train/loss": 2.0}, {"loss": 9.0}, {"train/loss": -1.0})
    steps = [measurement(step, metrics=metrics) for step, metrics in enumerate((*losses, {"train/loss": 8.0}))]
    write(TensorBoardExporter(TensorBoardConfig(log_dir=tmp_path)), *steps)
    events = read(tmp_path / "demo")
    assert [(point.step, point.value) for point in events.Scalars("ess_monitor/loss_ratio")] == [
        (0, 1),
        (1, 0.5),
        (4, 1),
    ]
    assert [point.value for point in events.Scalars("ess_metrics/acc")] == [pytest.approx(0.1)]


def _steps(folder: Path, tag: str = "ess_effective_size/blocks.0.mixer") -> list[int]:
    return [point.step for point in read(folder).Scalars(tag)]


def _write_run(folder: Path, steps: range, first_step: int) -> None:
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=folder))
    exporter.start(run_info(first_step=first_step), lambda: snapshot())
    for step in steps:
        exporter.export(measurement(step))
    exporter.close("finished")


@pytest.mark.parametrize("first_step", [0, 10])
def test_what_a_later_run_overtakes_is_purged(first_step: int, tmp_path: Path) -> None:
    _write_run(tmp_path, range(20), 0)
    _write_run(tmp_path, range(first_step, 15), first_step)
    assert _steps(tmp_path / "demo") == list(range(15))
    heat_maps = read(tmp_path / "demo").Images("ess_heads/blocks.0.mixer")
    assert [image.step for image in heat_maps] == sorted({image.step for image in heat_maps})


def test_curves_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    def write_another(steps: range) -> None:
        with SummaryWriter(str(tmp_path / "demo")) as writer:
            for step in steps:
                writer.add_scalar("tokens", 1.0, step)

    write_another(range(0, 20_000, 1000))
    _write_run(tmp_path, range(10), 0)
    _write_run(tmp_path, range(5, 10), 5)
    assert _steps(tmp_path / "demo", "tokens") == list(range(0, 20_000, 1000))


def test_an_injected_writer_is_not_purged(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("tokens", 1.0, 4096)
        exporter = TensorBoardExporter(writer=writer)
        exporter.start(run_info(first_step=10), lambda: snapshot())
        exporter.close("finished")
    assert _steps(tmp_path, "tokens") == [4096]
