"""Shared code of the cases: trains from one seed with and without a monitor, and compares the results."""

from __future__ import annotations

import logging
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor import Measurement, Monitor, MonitorConfig
from ess_monitor.exporters import Exporter
from ess_monitor.featurizers import Backbone, BackboneConfig
from ess_monitor.records import RunInfo, RunStatus, Snapshot

ROOT = Path(__file__).parents[2]
"""Working directory of the processes that cases start."""
STEPS = 12
SETTINGS: dict[str, Any] = {
    "every_n_steps": 2,
    "overhead_budget_ratio": None,
    # The queue holds every sample, so that none is dropped on a busy machine: some cases count them.
    "runtime": {"queue_length": 64},
}

Edit = Callable[[int, nn.Module], None]
"""`(step, model)`: called before the step's forward pass, in both trainings."""


@dataclass(frozen=True)
class Outcome:
    """The result of one case."""

    unchanged: bool
    """Losses and parameters are those of the training without the monitor, bit for bit."""
    seen: Mapping[str, bool]
    """Place where the event must be visible -> whether it is."""


@dataclass(frozen=True)
class Case:
    """One injected fault."""

    name: str
    injected: str
    run: Callable[[Injection], Outcome]


@dataclass
class Injection:
    """The tools of a case. Everything that the case changed is undone after it."""

    folder: Path
    """Empty at the beginning."""
    patch: pytest.MonkeyPatch
    logged: list[str] = field(default_factory=list)
    """Warnings of the monitor so far."""

    def said(self, text: str) -> int:
        """Count the warnings that contain this text."""
        return sum(text in line for line in self.logged)


CASES: list[Case] = []
"""In the order of the table."""


def case(injected: str) -> Callable[[Callable[[Injection], Outcome]], Callable[[Injection], Outcome]]:
    """Register a function as a case, which is named after the function."""

    def register(run: Callable[[Injection], Outcome]) -> Callable[[Injection], Outcome]:
        CASES.append(Case(run.__name__.replace("_", " "), injected, run))
        return run

    return register


@contextmanager
def injecting() -> Iterator[Injection]:
    """Provide the folder, the patches and the log of one case. Not a fixture: the table is printed without pytest."""
    logger = logging.getLogger("ess_monitor")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        injection = Injection(Path(folder), patch)
        handler = _Keeping(injection.logged)
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield injection
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagates


class _Keeping(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


class Collecting:
    """An exporter that keeps all measurements."""

    name, inline = "collecting", True

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.closed: list[RunStatus] = []

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Do nothing."""

    def export(self, measurement: Measurement) -> None:
        """Keep the measurement."""
        self.measurements.append(measurement)

    def close(self, status: RunStatus) -> None:
        """Keep the status at the end of the run."""
        self.closed.append(status)

    @property
    def steps(self) -> list[int]:
        """Steps of all measurements."""
        return [measurement.step for measurement in self.measurements]


def backbone(featurizer: str = "gla") -> Backbone:
    """Build the model that the cases train: two layers with a state of 8 dimensions."""
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=16, width=16, featurizer=featurizer, state_size=8))


def batches(steps: int = STEPS) -> list[torch.Tensor]:
    """Return batches of tokens (batch, length), the same in every training."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 16, (4, 24), generator=generator) for _ in range(steps)]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the next-token cross-entropy of a model that returns logits, or an output with logits."""
    output = model(tokens)
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: nn.Module,
    data: Iterable[torch.Tensor] | None = None,
    *,
    edit: Edit | None = None,
    after_step: Callable[[int, torch.Tensor], None] | None = None,
    make_optimizer: Any = torch.optim.AdamW,
) -> bytes:
    """Train a model in a plain loop.

    Args:
        model: is trained in place.
        data: one batch per step.
        edit: a fault of the training itself.
        after_step: `(step, loss)`, called where a loop calls a monitor's `step`.
        make_optimizer: takes parameters and `lr`.

    Returns:
        Losses and final state, as bytes, in which NaN is equal to itself.
    """
    optimizer = make_optimizer(model.parameters(), lr=1e-2)
    losses = []
    for step, tokens in enumerate(batches() if data is None else data):
        if edit is not None:
            edit(step, model)
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step, loss)
    return struct.pack(f"{len(losses)}d", *losses) + state_bytes(model)


def state_bytes(model: nn.Module) -> bytes:
    """Return parameters and buffers as bytes."""
    tensors = (tensor.detach().contiguous().view(-1) for tensor in model.state_dict().values())
    return b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)


@dataclass
class Watched:
    """The result of a training with a monitor."""

    unchanged: bool
    sink: Collecting
    monitor: Monitor
    snapshot: Snapshot
    """Counters after the end of the run."""

    @property
    def statuses(self) -> list[str]:
        """Statuses of all readings, in order."""
        return [reading.status for measurement in self.sink.measurements for reading in measurement.readings]


def watch(
    *,
    settings: Mapping[str, Any] | None = None,
    exporters: tuple[Exporter, ...] = (),
    edit: Edit | None = None,
    meanwhile: Callable[[int, Monitor], None] | None = None,
    build: Callable[[], nn.Module] = backbone,
    steps: int = STEPS,
    data: Iterable[torch.Tensor] | None = None,
    bare_data: Iterable[torch.Tensor] | None = None,
    make_optimizer: Any = torch.optim.AdamW,
    **options: Any,
) -> Watched:
    """Train with and without the monitor.

    Args:
        settings: settings of the monitor, which override `SETTINGS`.
        exporters: in addition to `Collecting`.
        edit: a fault of the training itself.
        meanwhile: `(step, monitor)`, called after each step of the training with a monitor.
        build: builds the model, always the same.
        steps: steps of both trainings, if `data` is None.
        data: one batch per step.
        bare_data: the same data for the training without a monitor, if it must be loaded differently.
        make_optimizer: builds the optimizer of both trainings.
        options: further arguments of `Monitor`.
    """
    data = batches(steps) if data is None else data
    bare = data if bare_data is None else bare_data
    expected = train(build(), bare, edit=edit, make_optimizer=make_optimizer)
    model, sink = build(), Collecting()
    config = MonitorConfig.load(environment=False, **{**SETTINGS, **(settings or {})})
    with Monitor(model, config, exporters=(sink, *exporters), **options) as monitor:

        def after_step(step: int, loss: torch.Tensor) -> None:
            monitor.step({"loss": loss})
            if meanwhile is not None:
                meanwhile(step, monitor)

        result = train(model, data, edit=edit, after_step=after_step, make_optimizer=make_optimizer)
    return Watched(result == expected and not hooks_of(model), sink, monitor, monitor.snapshot())


def hooks_of(model: nn.Module) -> int:
    """Count the forward hooks in the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def no_thread_stays(before: list[threading.Thread]) -> bool:
    """Return whether every new thread ends by itself within seconds."""
    later = [thread for thread in threading.enumerate() if thread not in before]
    for thread in later:
        thread.join(10.0)
    return not any(thread.is_alive() for thread in later)
