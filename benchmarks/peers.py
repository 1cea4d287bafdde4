"""Measures what the monitor costs a training beside three tools that watch a training, each at its defaults.

    python -m benchmarks.peers [--json FILE]

- `wandb.watch`: a histogram of the gradient of each parameter in every 1000th step. wandb runs offline.
- DeviceStatsMonitor of Lightning: statistics of the device before and after every 50th step, to a CSVLogger.
- delve 0.1.50, layer saturation: covariances of each linear layer's outputs in every step, of the last token, and their
  eigenvalues at the end of an epoch (here 1000 steps). Left out where it is not installed: tests do not need it, and it
  brings pandas, matplotlib, tqdm and tensorboardX.

All is the libraries' own code. In one run steps with a tool alternate with bare ones of the same model: steps in which
it does its work, and steps in which it stands by. What is compared is processor time of the process, all threads
together, on which other load has little influence; so the monitor is charged for what its worker computes beside the
training, and wandb is not charged for its service, which is another process.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from benchmarks.layer_overhead import MODELS, Training, quiet
from benchmarks.report import Result, main
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.tasks import loss

PAIRS = 10
"""Pairs of a bare and a watched step, for each tool, model and kind of step."""
EPOCH = 1000
"""Steps after which delve computes eigenvalues."""
NEVER = 10**9

Step = Callable[[], float | None]
"""Takes one step of the training. Returns the seconds of the tool's calls if they are all it does, otherwise None."""
Tool = Callable[[Training, bool], AbstractContextManager[Step]]
"""Watches a training; does its work in every step with True, and in none with False."""


class Recall(nn.Module):
    """The model of `step_overhead`, a GLA of two layers, with the arguments of a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Backbone(BackboneConfig(vocab_size=256, width=64, depth=2, featurizer="gla", state_size=32))

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=loss(self.model(input_ids), labels))


def timed(call: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


@contextmanager
def ess_monitor(training: Training, works: bool) -> Iterator[Step]:
    """Sample every layer and wait for the readings, or call the monitor at the end of the step."""
    with Monitor(training.model, MonitorConfig(every_n_steps=10**6)) as monitor:
        training.step(monitor)
        monitor.flush()

        def stand_by() -> float:
            return training.step(monitor)[1]

        def sample() -> None:
            monitor.arm()
            training.step(monitor)
            monitor.flush()

        yield sample if works else stand_by


@contextmanager
def wandb_watch(training: Training, works: bool) -> Iterator[Step]:
    """Make a histogram of each gradient and log it, or count in the hooks of the gradients.

    Counting is taken for nothing, to the advantage of wandb: it is less than what two steps differ by.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        with wandb.init(mode="offline", project="peers", dir=folder, settings=settings) as run:
            run.watch(training.model, log="gradients", log_freq=1 if works else NEVER)

            def stand_by() -> float:
                training.step(None)
                return 0.0

            def log() -> None:
                training.step(None)
                run.log({})

            yield log if works else stand_by
            run.unwatch(training.model)


@contextmanager
def device_stats(training: Training, works: bool) -> Iterator[Step]:
    """Log the statistics of the device before and after the step."""
    accelerator, device = pl.accelerators.CPUAccelerator(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder)

        def log(moment: str) -> None:
            found = accelerator.get_device_stats(device)
            logger.log_metrics({f"DeviceStatsMonitor.{moment}/{name}": value for name, value in found.items()}, step=1)

        def step() -> float:
            before = timed(partial(log, "on_train_batch_start")) if works else 0.0
            training.step(None)
            return before + (timed(partial(log, "on_train_batch_end")) if works else 0.0)

        yield step


@contextmanager
def layer_saturation(training: Training, works: bool) -> Iterator[Step]:
    """Update the covariances of each linear layer, and where it works compute and save what follows from them."""
    saturation_tracker = import_module("delve").SaturationTracker
    with tempfile.TemporaryDirectory() as folder:
        tracker = saturation_tracker(f"{folder}/run", save_to="csv", modules=training.model, device="cpu")

        def step() -> None:
            training.step(None)
            if works:
                tracker.add_saturations()

        training.step(None)
        yield step
        tracker.close()


TOOLS: dict[str, tuple[Tool, int]] = {
    "ess_monitor": (ess_monitor, MonitorConfig().every_n_steps),
    "wandb.watch, gradients": (wandb_watch, 1000),
    "DeviceStatsMonitor": (device_stats, 50),
    "delve, layer saturation": (layer_saturation, EPOCH),
}
"""Name -> the tool, and the steps from one piece of its work to the next."""


def extra_seconds(
    tool: Tool, works: bool, build: Callable[[], nn.Module], batch: int, pairs: int
) -> tuple[float, float]:
    """Return the medians of what a watched step takes more than a bare one, and of a bare one, in seconds."""
    watched, other = Training(build, batch), Training(build, batch)
    own: list[float | None] = []
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tool(watched, works) as step:
        step()
        for pair in range(pairs):
            for is_watched in (True, False) if pair % 2 else (False, True):
                started = time.process_time()
                if is_watched:
                    own.append(step())
                else:
                    other.step(None)
                seconds[is_watched].append(time.process_time() - started)
    pairwise = zip(own, seconds[True], seconds[False], strict=True)
    more = [on - off if calls is None else calls for calls, on, off in pairwise]
    return statistics.median(more), statistics.median(seconds[False])


def rows_of(model: str, build: Callable[[], nn.Module], batch: int, pairs: int) -> list[dict[str, Any]]:
    """Return a row for each tool that is installed."""
    rows: list[dict[str, Any]] = []
    for name, (tool, interval) in TOOLS.items():
        if tool is layer_saturation and find_spec("delve") is None:
            continue
        standing_by, _ = extra_seconds(tool, False, build, batch, pairs)
        working, bare = extra_seconds(tool, True, build, batch, pairs)
        if tool is ess_monitor:
            interval = max(interval, math.ceil(working / (MonitorConfig().overhead_budget_ratio or 1.0) / bare))
        standing_by = max(0.0, standing_by)
        cost = standing_by + max(0.0, working - standing_by) / interval
        ours = rows[0]["mean, ms"] if rows else 1e3 * cost
        rows.append(
            {
                "model": model,
                "tool": name,
                "bare step, ms": 1e3 * bare,
                "standing by, ms": 1e3 * standing_by,
                "at work, ms": 1e3 * working,
                "every ... steps": interval,
                "mean, ms": 1e3 * cost,
                "of a step": f"{cost / bare:.3%}",
                "ess_monitor / this": ours / (1e3 * cost) if cost else math.inf,
            }
        )
    return rows


def run(pairs: int = PAIRS) -> Result:
    """Compare the cost of the tools on each model."""
    models = {**MODELS, "GLA": (Recall, 16)}
    with quiet():
        rows = [row for name, (build, batch) in models.items() for row in rows_of(name, build, batch, pairs)]
    notes = ["standing by, at work: what such a step takes more than a bare one; mean: per step at the tool's defaults"]
    if find_spec("delve") is None:
        notes.append("delve is not installed, and left out")
    return Result(f"What watching costs, processor time, medians of {pairs} pairs of steps", rows, notes)


if __name__ == "__main__":
    sys.exit(main([run], __doc__))
