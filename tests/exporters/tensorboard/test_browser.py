"""What a person sees: a real TensorBoard on the log of a real run, in a real browser."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ess_monitor import Measurement, Monitor, MonitorConfig
from ess_monitor.exporters import TensorBoardConfig, TensorBoardExporter
from ess_monitor.exporters.tensorboard.exporter import OVERVIEW_TAG
from ess_monitor.exporters.tensorboard.layout import custom_scalars_layout
from ess_monitor.featurizers import build_mixer
from tests.browser import Browser, fresh_picture
from tests.devtools import Page, page_in
from tests.exporters.helpers import RecordingExporter, action, finding, free_port, run_info, snapshot

pytestmark = pytest.mark.servers

LAYERS = ("first", "second")
STEPS = 12
PATIENCE_SECONDS = 120.0

DEEP = """const deep = (root, name) => [...root.querySelectorAll("*")].flatMap(element => [
  ...(element.localName === name ? [element] : []),
  ...(element.shadowRoot ? deep(element.shadowRoot, name) : []),
]);"""
"""Elements of a name, also those inside other elements' shadow roots."""

# Every chart's title, in the order of the page, and whether it has drawn a line.
CHARTS = f"""(() => {{ {DEEP}
  const cards = ["multi-line", "margin"].flatMap(kind => deep(document, `tf-custom-scalar-${{kind}}-chart-card`));
  return cards.map(card => [
    deep(card.shadowRoot, "tf-card-heading")[0].displayName,
    deep(card.shadowRoot, "path").some(path => path.matches(".line") && path.getAttribute("d")),
  ]);
}})()"""
CATEGORIES = f"""(() => {{ {DEEP}
  return deep(document, "tf-category-paginated-view").map(pane => pane.category.name);
}})()"""


def _real_run() -> list[Measurement]:
    """A short training of two layers; the autopilot's part, which such a run does not need, is added by hand."""
    torch.manual_seed(0)
    names = dict(zip(LAYERS, (build_mixer("gla", 16, 2, 8), build_mixer("gla", 16, 2, 8)), strict=True))
    model = nn.Sequential()
    for name, layer in names.items():
        model.add_module(name, layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    measurements: list[Measurement] = []
    sink = RecordingExporter(inline=True, on_export=measurements.append)
    config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=None, positions=8)
    with Monitor(model, config, exporters=[sink]) as monitor:
        for _ in range(STEPS):
            loss = model(torch.randn(4, 32, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(metrics={"loss": loss})
            monitor.flush()
    step = STEPS // 2
    acted = {"findings": (finding(LAYERS[1], step),), "actions": tuple(action(layer, step) for layer in LAYERS)}
    measurements[step] = measurements[step].model_copy(update=acted)
    return measurements


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard that has read the run."""
    folder = tmp_path_factory.mktemp("logs")
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=folder))
    exporter.start(run_info(LAYERS), snapshot)
    for measurement in _real_run():
        exporter.export(measurement)
    exporter.close("finished")
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert process.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < deadline, "TensorBoard does not answer"
            try:
                with urllib.request.urlopen(f"{url}data/runs", timeout=10) as answer:
                    if b"demo" in answer.read():
                        break
            except OSError:
                pass  # not up yet
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page_in(Browser(tmp_path_factory.mktemp("browser"))) as opened:
        yield opened


def test_the_layout_is_there_and_every_chart_has_drawn_a_line(tensorboard: str, page: Page) -> None:
    layout = custom_scalars_layout(LAYERS)
    titles = sorted(title for charts in layout.values() for title in charts)
    page.open(f"{tensorboard}#custom_scalars", width=1400, height=3000)
    page.ask_until_true(f"{CHARTS}.length === {len(titles)} && {CHARTS}.every(([title, drawn]) => drawn)")
    assert sorted(title for title, _ in page.ask(CHARTS)) == titles
    assert page.ask(CATEGORIES) == list(layout)
    page.save_picture(fresh_picture("tensorboard-custom-scalars.png"))


def test_the_pictures_of_every_layer_are_shown(tensorboard: str, page: Page) -> None:
    pictures = f"""(() => {{ {DEEP}
      const shown = deep(document, "tf-image-loader").flatMap(loader =>
        deep(loader.shadowRoot, "img").map(image => [loader.tag, [image.naturalWidth, image.naturalHeight]]));
      return Object.fromEntries(shown);
    }})()"""
    page.open(f"{tensorboard}#images&tagFilter=ess", width=1400, height=2000)
    expected = {
        f"{section}/{layer}": [8 * STEPS, 8 * rows]
        for section, rows in {"ess_heads": 2, "ess_positions": 8, "ess_spectrum": 8}.items()
        for layer in LAYERS
    }
    expected[OVERVIEW_TAG] = [8 * STEPS, 64 * len(LAYERS)]
    page.ask_until_true(f"Object.values({pictures}).filter(([width]) => width > 0).length === {len(expected)}")
    assert page.ask(pictures) == expected
    page.save_picture(fresh_picture("tensorboard-images.png"))


def test_interventions_are_text_and_the_pictures_have_their_legend(tensorboard: str, page: Page) -> None:
    texts = f"""(() => {{ {DEEP}
      const cells = loader => deep(loader.shadowRoot, "td").filter(cell => !cell.children.length);
      return Object.fromEntries(deep(document, "tf-text-loader").map(loader =>
        [loader.tag, cells(loader).map(cell => cell.textContent)]));
    }})()"""
    page.open(f"{tensorboard}#text&tagFilter=ess_", width=1400, height=2000)
    page.ask_until_true(f"Object.values({texts}).filter(cells => cells.length).length >= 2")
    cells = page.ask(texts)
    assert cells["ess_actions/table/text_summary"][:3] == [str(STEPS // 2), "first", "pull_to_identity"]
    assert "ess_spectrum" in cells["ess_help/pictures/text_summary"]
    assert f"ess_findings/{LAYERS[1]}/text_summary" in cells
