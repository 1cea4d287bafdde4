"""Reads back what the loggers of training frameworks have written: for each tag, steps and values in order."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]
_BLOCK = 32768
"""Bytes of a block of W&B's file, in which each piece of a record has a header of 7."""


def tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Series = {}
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        found |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def wandb(folder: Path) -> Series:
    """Our tags by their step metric, those of the loop by W&B's own step."""
    found: Series = defaultdict(list)
    for row in wandb_rows(folder):
        for tag, value in row.items():
            if isinstance(value, (int, float)):
                found[tag].append((int(row["ess_monitor/step" if tag.startswith("ess_") else "_step"]), value))
    return found


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the one run below the folder. Its file is complete a moment after the run has ended."""
    (path,) = folder.rglob("run-*.wandb")
    for _ in range(100):
        kinds = [kind for kind, _ in _wandb_records(path)]
        if "exit" in kinds:
            break
        time.sleep(0.1)
    histories = [record.history for kind, record in _wandb_records(path) if kind == "history"]
    return [{(i.key or i.nested_key[0]): json.loads(i.value_json) for i in history.item} for history in histories]


def wandb_step_metrics(folder: Path) -> dict[str, str]:
    """Step metric of each tag for which one was defined."""
    (path,) = folder.rglob("run-*.wandb")
    defined = [record.metric for kind, record in _wandb_records(path) if kind == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in defined if metric.step_metric}


def _wandb_records(path: Path) -> Iterator[tuple[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if _BLOCK - position % _BLOCK < 7:  # too little for a header: filled with zeros
            position += _BLOCK - position % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            parsed = wandb_internal_pb2.Record.FromString(record)
            yield parsed.WhichOneof("record_type"), parsed
            record = b""


def mlflow(folder: Path) -> Series:
    found: Series = {}
    for metrics in folder.rglob("metrics"):
        for path in metrics.rglob("*"):
            if path.is_file():
                lines = (line.split() for line in path.read_text().splitlines())
                found[path.relative_to(metrics).as_posix()] = [(int(step), float(value)) for _, value, step in lines]
    return found


def csv_rows(folder: Path) -> Series:
    found: Series = defaultdict(list)
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag != "step":
                    found[tag].append((int(row["step"]), float(value)))
    return found


READERS = {"csv": csv_rows, "mlflow": mlflow, "tensorboard": tensorboard, "wandb": wandb}
