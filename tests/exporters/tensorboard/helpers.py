"""Runs written to TensorBoard and read back."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ess_monitor.exporters import TensorBoardExporter
from ess_monitor.records import Measurement
from tests.exporters.helpers import run_info, snapshot


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return events.Reload()


def write(exporter: TensorBoardExporter, *measurements: Measurement, layers: tuple[str, ...] | None = None) -> None:
    exporter.start(run_info() if layers is None else run_info(layers), lambda: snapshot())
    for each in measurements:
        exporter.export(each)
    exporter.close("finished")


def as_page(markdown: bytes) -> ElementTree.Element:
    """What TensorBoard's text page makes of a text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the HTML library that TensorBoard brings along
        from tensorboard.plugin_util import markdown_to_safe_html
    return ElementTree.fromstring(f"<page>{markdown_to_safe_html(markdown)}</page>")
