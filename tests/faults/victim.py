"""Runs a training that is killed, or that ends without closing its monitor. Runs in a process of its own.

    python -m tests.faults.victim FOLDER [leave]

Writes checkpoints and prints every step. At step `LAST` it waits until it is killed. With `leave` it ends by itself
while the worker computes, without closing the monitor.
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
"""Steps of the whole training, of this process at most, and from one checkpoint to the next."""


def resumable(folder: Path, last: int, *, say: bool = False) -> torch.nn.Module:
    """Train up to step `last`, from the checkpoint in `folder` if there is one."""
    model, data = backbone(), batches(TOTAL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    log = EventLogExporter(EventLogConfig(path=folder / "events.jsonl"))
    config = MonitorConfig.load(environment=False, **SETTINGS, handle_sigterm=True)
    monitor = Monitor(model, config, exporters=[log])
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
    """Train to the end, and leave the monitor open."""
    original = measuring.compute

    def slow(*arguments: Any) -> Any:
        matrix, ends = torch.eye(64), time.monotonic() + 0.1
        while time.monotonic() < ends:
            matrix = matrix @ matrix  # enters and leaves torch again and again
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background ignores SIGINT
    resumable(Path(sys.argv[1]), LAST, say=True)
