"""Trainings that end badly. A process of their own.

    python -m tests.faults.victim FOLDER [leave]

Writes checkpoints and prints every step; at step `LAST` it waits to be killed. With `leave` it ends by itself, with a
monitor that nobody has closed, while the worker computes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.exporters import EventLogConfig, EventLogExporter
from ess_monitor.pipeline import queue as measuring
from tests.faults.harness import SETTINGS, backbone, batches, loss_of, train

TOTAL, LAST, EVERY = 24, 16, 3
"""Steps of the whole training, of this process at most, and between two checkpoints."""


def resumable(folder: Path, last: int, *, say: bool = False) -> torch.nn.Module:
    """Train up to step `last`, from the checkpoint in `folder` where there is one."""
    model, data = backbone(), batches(TOTAL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    log = EventLogExporter(EventLogConfig(path=folder / "events.jsonl"))
    monitor = Monitor(model, MonitorConfig.load(environment=False, **SETTINGS), exporters=[log])
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
        first = state["step"]
    with monitor:
        for step in range(first, last):
            loss = loss_of(model, data[step])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step({"loss": loss})
            if (step + 1) % EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save({**state, "monitor": monitor.state_dict()}, folder / "new.pt")
                os.replace(folder / "new.pt", checkpoint)
            if say:
                print(step, flush=True)
        if say:
            sys.stdin.readline()
    return model


def left(folder: Path) -> None:
    """Train to the end and go."""
    original = measuring.compute

    def slow(*arguments: Any) -> Any:
        matrix, ends = torch.eye(64), time.monotonic() + 0.1
        while time.monotonic() < ends:
            matrix = matrix @ matrix  # in and out of torch
        return original(*arguments)

    measuring.compute = slow
    log = EventLogExporter(EventLogConfig(path=folder / "events.jsonl"))
    model = backbone()
    monitor = Monitor(model, MonitorConfig.load(environment=False, **SETTINGS), exporters=[log])
    monitor.start()
    state = train(model, after_step=lambda step, loss: monitor.step({"loss": loss}))
    (folder / "state").write_bytes(state)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "leave" in sys.argv:
        left(Path(sys.argv[1]))
        sys.exit(7)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background ignores it
    resumable(Path(sys.argv[1]), LAST, say=True)
