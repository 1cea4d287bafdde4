"""Makes the pictures of the documentation: `python -m tests.gallery [NAME ...] [--demo runs/demo]`.

Reports, comparison and TensorBoard are of the runs of `make demo`, which has to be run before. The analyses are of a
GLA and a softmax attention at initialization, state modulation of a GLA that is trained here for half a minute, and the
study of made-up runs. Needs Chromium; the notebook also needs nbconvert (`pip install nbconvert`).
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ess_monitor.analysis import StudyRun, correlate, length_profile, minimal_state, state_modulation
from ess_monitor.exporters import TensorBoardConfig, TensorBoardExporter
from ess_monitor.featurizers import Backbone, BackboneConfig, build_mixer
from ess_monitor.report import (
    load_history,
    render_comparison,
    render_length_profile,
    render_minimal_state,
    render_report,
    render_state_modulation,
    render_study,
)
from ess_monitor.tasks import Documents, DocumentsConfig, loss
from tests.browser import Browser
from tests.devtools import page_in
from tests.exporters.helpers import free_port, snapshot

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLORS = 256
"""Of a picture: a small file, in which figures still look the same."""
WIDTH = 880
DRAWN = """document.readyState === "complete" && [...document.querySelectorAll("[data-figure], .plotly-graph-div")]
  .filter(plot => plot.checkVisibility() && plot.getBoundingClientRect().top < innerHeight)
  .every(plot => plot.querySelector(".main-svg .xy"))"""
"""Whether all figures on the screen are there."""
Pictures = Callable[[Path, Path], None]
"""Takes the folder of the demo and one for temporary files."""


def save(picture: Path, name: str, height: int, left: int = 0) -> None:
    """Cut a picture at a height, and write it with few colors."""
    with Image.open(picture) as image:
        cut = image.convert("RGB").crop((left, 0, image.width, min(height, image.height)))
        IMAGES.mkdir(exist_ok=True)
        few = cut.quantize(COLORS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(IMAGES / f"{name}.png", optimize=True)


def shoot(html: str, name: str, height: int, folder: Path, theme: str = "light") -> None:
    """Take a picture of the beginning of a page, when its figures have been drawn."""
    path, picture = folder / f"{name}.html", folder / f"{name}.png"
    path.write_text(html, encoding="utf-8")
    with page_in(Browser(folder)) as page:
        page.open(path.as_uri(), width=WIDTH, height=height, theme=theme)
        page.ask_until_true(DRAWN)
        page.save_picture(picture)
    save(picture, name, height)


def report(theme: str, demo: Path, folder: Path) -> None:
    """Take a picture of the report of the run that was treated."""
    shoot(render_report(load_history(demo / "auto")), f"report-{theme}", 1500, folder, theme)


def compare(demo: Path, folder: Path) -> None:
    """Take a picture of the comparison of both runs."""
    page = render_comparison(load_history(demo / "advise"), load_history(demo / "auto"))
    shoot(page, "compare", 1400, folder)


def mixers() -> tuple[nn.Module, torch.Tensor]:
    """Return a GLA and a softmax attention at initialization, and their input."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(gla=build_mixer("gla", 32, 2, 16), attention=build_mixer("sa", 32, 2, 16)))
    return model, torch.randn(2, 256, 32)


def smallest_states(demo: Path, folder: Path) -> None:
    """Take a picture of the page of `minimal_state`."""
    model, inputs = mixers()
    shoot(render_minimal_state(minimal_state(model, inputs[:, :128])), "minimal-state", 720, folder)


def lengths(demo: Path, folder: Path) -> None:
    """Take a picture of the page of `length_profile`."""
    model, inputs = mixers()
    page = render_length_profile(length_profile(model, inputs, lengths=[16, 32, 64, 128, 256]))
    shoot(page, "length-profile", 1180, folder)


def modulation(demo: Path, folder: Path) -> None:
    """Train a GLA on documents, and take a picture of what it does at separators."""
    torch.manual_seed(1)
    data = Documents(DocumentsConfig(length=64, samples=10**6, seed=1))
    options = {"beta": 4.0}
    model = Backbone(BackboneConfig(vocab_size=17, width=32, featurizer="gla", state_size=16, mixer_options=options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    for step in range(900):
        inputs, targets = data.batch(range(16 * step, 16 * step + 16))
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    tokens = data.batch(range(10**5, 10**5 + 32))[0]
    shoot(render_state_modulation(state_modulation(model, tokens, separators=[0])), "modulation", 980, folder)


def study(demo: Path, folder: Path) -> None:
    """Take a picture of the page of a study of made-up runs."""
    drawn = torch.Generator().manual_seed(0)
    runs = []
    for size in (4.0, 8.0, 16.0, 32.0):
        for demand in (2.0, 4.0, 8.0, 16.0):
            for name, share in (("gla", 0.7), ("wla", 0.5)):
                ess = size * (share + 0.2 * float(torch.rand(1, generator=drawn)))
                accuracy = 1 / (
                    1 + math.exp(-3 * math.log(ess / demand) + 0.5 * float(torch.randn(1, generator=drawn)))
                )
                runs.append(StudyRun(name=f"{name} {size:g} {demand:g}", task="mqar", featurizer=name, demand=demand,
                                     state_capacity=size, effective_size=ess, entropy_size=ess / 2, metric=accuracy,
                                     utilization_ratio=ess / size))  # fmt: skip
    shoot(render_study(correlate(runs, metric="accuracy", demand="kv_pairs")), "study", 1300, folder)


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve a folder, and yield the address."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}data/plugin/scalars/tags", timeout=10) as answer:
                    if b"ess_monitor" in answer.read():
                        break
            except OSError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def charts(demo: Path, folder: Path) -> None:
    """Take pictures of what TensorBoard shows first, and of its page of charts."""
    pages = {"tensorboard-first": ("timeseries", 620, 0), "tensorboard": ("custom_scalars", 1000, 0)}
    history = load_history(demo / "auto")
    exporter = TensorBoardExporter(TensorBoardConfig(log_dir=folder / "runs"))
    exporter.start(history.info.model_copy(update={"run_name": "demo"}), snapshot)
    for measurement in history.measurements:
        exporter.export(measurement)
    exporter.close("finished")
    with tensorboard(folder / "runs") as url, page_in(Browser(folder)) as page:
        for name, (tab, height, left) in pages.items():
            page.open(f"{url}#{tab}", width=1100, height=height)
            time.sleep(15)  # until its charts have been drawn: TensorBoard does not say when
            page.save_picture(folder / f"{name}.png")
            save(folder / f"{name}.png", name, height, left)


def notebook(demo: Path, folder: Path) -> None:
    """Run the notebook of the examples, and take a picture of its end."""
    environment = os.environ | {"PLOTLY_RENDERER": "notebook", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    source = ROOT / "examples" / "look_at_a_run.ipynb"
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", str(source)]
    subprocess.run([*command, "--output-dir", str(folder), "--output", "notebook"], check=True, env=environment)
    page = (folder / "notebook.html").read_text(encoding="utf-8")
    beginning, cells = page.index("<main"), page.index(">Open the log")
    cut = page[: page.index(">", beginning) + 1] + page[page.rindex('<div class="jp-Cell', 0, cells) :]
    shoot(cut, "notebook", 1400, folder)


PICTURES: dict[str, Pictures] = {
    "report-light": partial(report, "light"),
    "report-dark": partial(report, "dark"),
    "compare": compare,
    "minimal-state": smallest_states,
    "length-profile": lengths,
    "modulation": modulation,
    "study": study,
    "tensorboard": charts,
    "notebook": notebook,
}


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="folder of the logs of `make demo`")
    arguments = parser.parse_args()
    for name in arguments.names or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](arguments.demo, Path(folder))
        print(name)


if __name__ == "__main__":
    main()
