"""The training that the sections watch, on the device that is checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import current_thread
from typing import Any

import torch
import torch.nn.functional as F

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import Backbone, BackboneConfig

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
Row = dict[str, Any]


def synchronize() -> None:
    """Wait for the device."""
    if HAS_CUDA:
        torch.cuda.synchronize()


class Training:
    """Trains a net on random tokens; the loss of each step stays on the device."""

    def __init__(
        self,
        dry: bool,
        *,
        featurizer: str = "gla",
        width: int = 64,
        depth: int = 24,
        length: int = 128,
        batch: int = 4,
        autocast: bool = False,
        compiled: bool = False,
    ) -> None:
        if dry:
            width, depth, length, batch = 16, 2, 16, 2
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "width": width, "depth": depth, "state_size": 8 if dry else 16}
        self.model = Backbone(BackboneConfig(**sizes, featurizer=featurizer)).to(DEVICE)
        self._call = torch.compile(self.model, backend="eager") if compiled else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        self._tokens = torch.randint(0, 64, (8, batch, length + 1)).to(DEVICE)
        self._autocast = autocast
        self.losses: list[torch.Tensor] = []

    def step(self, monitor: Monitor | None = None) -> None:
        """Take one step, and tell the monitor."""
        tokens = self._tokens[len(self.losses) % len(self._tokens)]
        with torch.autocast(DEVICE.type, torch.bfloat16) if self._autocast else nullcontext():
            logits = self._call(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.losses.append(loss.detach())
        if monitor is not None:
            monitor.step({"loss": loss})

    def monitor(self, every_n_steps: int, **settings: Any) -> Monitor:
        """Return a monitor that samples every so many steps, whatever it costs."""
        config = MonitorConfig(every_n_steps=every_n_steps, overhead_budget_ratio=None, strict=False, **settings)
        return Monitor(self.model, config, exporters=[])


def statuses(monitor: Monitor) -> dict[str, int]:
    """Return the measurements so far by status."""
    return {status: count for status, count in monitor.snapshot().measurements_total.items() if count}


@contextmanager
def waits_of_threads() -> Iterator[dict[str, int]]:
    """Count by thread the calls inside the block that wait for the device, as torch warns of them."""
    found: dict[str, int] = {}

    def note(message: object, *details: object, **named: object) -> None:
        if "synchroniz" in str(message).lower():
            name = current_thread().name
            found[name] = found.get(name, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if HAS_CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if HAS_CUDA:
                torch.cuda.set_sync_debug_mode("default")
