"""The framework-agnostic monitor that ties the rooms together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ess_monitor.capture import Captured, CaptureFailure, Sampler, layer_infos
from ess_monitor.capture.operators import require_layers
from ess_monitor.config import MonitorConfig
from ess_monitor.diagnosis import Tracker, thresholds
from ess_monitor.errors import CheckpointError, ConfigError
from ess_monitor.exporters import Exporter, ExporterHub, build_exporter
from ess_monitor.ledger import Ledger
from ess_monitor.readings import compute, lost_reading, positions_of
from ess_monitor.records import Condition, Finding, Measurement, Reading, RunInfo, RunStatus, Snapshot
from ess_monitor.runtime import Cadence, Executor, Guard, Job, Lane, Task, lane_for
from ess_monitor.samples import Metrics, Sample, read, split_metrics
from ess_monitor.versions import installed_versions

_STATE_VERSION = 1


class Monitor:
    """Measures how much of its memory a model uses while it trains.

    Call `step()` after every optimizer step; every `config.every_n_steps` of them the next forward pass in training is
    sampled. The training is not changed, not waited for, and not stopped by anything that goes wrong in here.

    Args:
        model: the module whose sequence mixers are watched. Wrappers (DDP, FSDP, torch.compile) are fine.
        config: settings; the defaults suit a long run.
        exporters: sinks, besides those that `config.exporters` asks for.
        strategy, world_size, precision: facts of the run that the exporters show.

    Raises:
        NoLayersError: at `start`, when nothing in the model can be measured.
        ConfigError: at `start`, when a layer pattern matches nothing.
        ExporterError: at `start`, when a sink that was asked for cannot be opened.

    Example:
        >>> import torch
        >>> from ess_monitor import Monitor, MonitorConfig
        >>> from ess_monitor.featurizers import GLA
        >>> model = GLA(16, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Monitor(model, MonitorConfig(every_n_steps=2)) as monitor:
        ...     for _ in range(4):
        ...         loss = model(torch.randn(4, 32, 16)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         monitor.step(metrics={"loss": loss})
        ...     readings = monitor.flush()
        >>> sorted({r.status for r in readings})
        ['ok']
    """

    def __init__(
        self,
        model: nn.Module,
        config: MonitorConfig | None = None,
        *,
        exporters: Iterable[Exporter] = (),
        strategy: str = "single",
        world_size: int = 1,
        precision: str = "32",
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        lanes: Callable[[torch.device], Lane] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: {type(model).__name__} is not a torch.nn.Module; pass the model that is trained")
        self.model = model
        self.config = config or MonitorConfig()
        self._facts: dict[str, Any] = {"strategy": strategy, "world_size": world_size, "precision": precision}
        self._exporters = tuple(exporters)
        self._clock, self._wall_clock = clock, wall_clock
        self._lane_of = lanes or (lambda device: lane_for(device, threads=self.config.runtime.threads))
        self._lanes: dict[torch.device, Lane] = {}
        self._cadence = Cadence(self.config.every_n_steps, self.config.overhead_budget_ratio)
        self._tracker = Tracker(self.config.diagnosis)
        self._guards = {part: Guard(part) for part in ("capture", "worker", "measurement", "diagnosis", "export")}
        self._layers = require_layers(model, self.config.layers)
        self._sampler = Sampler(self._layers, self.config.capture, clock=clock)
        self._executor: Executor[Sample] = Executor(self.config.runtime)
        self._ledger = Ledger((layer.name for layer in self._layers), wall_clock=wall_clock)
        self._hub = ExporterHub(())
        self._step = 0
        self._armed_at = 0
        self._last_call: float | None = None
        self._readings: dict[str, Reading] = {}
        self._findings: tuple[Finding, ...] = ()
        self._running = False

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def start(self) -> None:
        """Open the exporters and arm the first sample. A second call does nothing."""
        if self._running:
            return
        built = tuple(build_exporter(config) for config in self.config.exporters)
        self._hub = ExporterHub((*built, *self._exporters))
        self._hub.start(self._run_info(), self.snapshot)
        self._running = True
        if self.config.capture.source == "train" and self._cadence.due(self._step):
            self.arm()

    def close(self, status: RunStatus = "finished", *, timeout_seconds: float = 5.0) -> None:
        """Take the hooks away, bring in what is under way, close the exporters. A second call does nothing."""
        if not self._running:
            return
        self._running = False
        self._sampler.remove()
        with self._guards["worker"]:
            self._finish(self._executor.drain(timeout_seconds))
            self._executor.close()
        self._ledger.set_status(status)
        self._hub.close(status)

    # -- the training loop's side -------------------------------------------------------------------------------------

    def step(self, metrics: Metrics | None = None, *, step: int | None = None) -> None:
        """Tell the monitor that an optimizer step is done.

        Args:
            metrics: what the training loop knows (loss, accuracy): numbers or tensors of one element. They are
                looked at on sampled steps only, and tensors are copied without waiting for the device.
            step: optimizer steps so far, where the caller's own count differs from the number of calls.
        """
        if not self._running:
            return
        now = self._clock()
        seconds = None if self._last_call is None else now - self._last_call
        self._last_call = now
        self._step = self._step + 1 if step is None else step
        self._ledger.step(self._step, seconds)
        if seconds is not None:
            self._cadence.stepped(seconds)
        if self._sampler.armed:
            self.disarm(metrics)
        if len(self._executor):
            with self._guards["worker"]:
                self._finish(self._executor.poll())
        if self._cadence.due(self._step) and self.config.capture.source == "train":
            self.arm()

    @property
    def sample_due(self) -> bool:
        """True when the cadence asks for a sample now."""
        return self._running and self._cadence.due(self._step)

    @property
    def armed(self) -> bool:
        """True while the next forward pass is to be sampled."""
        return self._sampler.armed

    def arm(self) -> None:
        """Sample the next forward pass. `step` does this by itself when training batches are the source."""
        if self._running and self._guards["capture"].open:
            with self._guards["capture"]:
                self._armed_at = self._step
                self._sampler.arm()

    def disarm(self, metrics: Metrics | None = None) -> None:
        """Remove the hooks and send what they took to be measured."""
        if not self._sampler.armed:
            return
        with self._guards["capture"]:
            started = self._clock()
            taken = self._sampler.collect()
            hook_seconds = self._sampler.capture_seconds
            if not taken:
                return
            self._cadence.sampled(self._armed_at)
            self._submit(taken, metrics)
            self._spent("capture", hook_seconds + self._clock() - started)

    @contextmanager
    def sample(self, metrics: Metrics | None = None) -> Iterator[None]:
        """Sample the forward pass inside the block, whether it is due or not; for validation batches and notebooks."""
        self.arm()
        try:
            yield
        finally:
            self.disarm(metrics)

    def flush(self, timeout_seconds: float = 60.0) -> tuple[Reading, ...]:
        """Wait for the samples under way and return the latest reading of every layer."""
        self._finish(self._executor.drain(timeout_seconds))
        return self.readings

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the measured layers, in model order."""
        return tuple(layer.name for layer in self._layers)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Latest reading of every layer that has one, whatever its status."""
        return tuple(self._readings[layer.name] for layer in self._layers if layer.name in self._readings)

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer."""
        known = self._tracker.conditions
        return {name: known.get(name, "unknown") for name in self.layers}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The last 1000 changes of condition, oldest first."""
        return self._findings

    @property
    def overhead_ratio(self) -> float:
        """Measured cost of the monitor so far as a share of the training time."""
        return self._cadence.overhead_ratio

    @property
    def exporters(self) -> tuple[Exporter, ...]:
        """The sinks in use, from the configuration and from the argument."""
        return self._hub.exporters

    def snapshot(self) -> Snapshot:
        """All counters at this moment. Safe to call from any thread."""
        return self._ledger.snapshot(self._hub.errors, self._hub.dropped, self._hub.queue_lengths)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped: step, cadence, diagnosis, counters."""
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "cadence": self._cadence.state_dict(),
            "diagnosis": self._tracker.state_dict(),
            "ledger": self._ledger.state_dict(),
            "turn": self._sampler.turn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of an earlier run.

        Raises:
            CheckpointError: the state was written by another version, or is not a monitor's state.
        """
        if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f"state: version {found!r} cannot be read, only {_STATE_VERSION}; "
                "start without the monitor's state (its measurements begin anew, the training is not affected)"
            )
        try:
            self._step = int(state["step"])
            self._cadence.load_state_dict(state["cadence"])
            self._tracker.load_state_dict(state["diagnosis"])
            self._ledger.load_state_dict(state["ledger"])
            self._sampler.turn = int(state["turn"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"state: not a monitor's state ({type(error).__name__}: {error})") from error

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run_info(self) -> RunInfo:
        return RunInfo(
            run_name=self.config.run_name or f"{type(self.model).__name__}-{time.strftime('%Y%m%d-%H%M%S')}",
            model=type(self.model).__name__,
            layers=tuple(info for info in layer_infos(self.model, self.config.layers) if info.supported),
            versions=installed_versions(),
            thresholds=thresholds(self.config.diagnosis),
            start_timestamp_seconds=self._wall_clock(),
            overhead_budget_ratio=self.config.overhead_budget_ratio,
            **self._facts,
        )

    def _submit(self, taken: tuple[Captured | CaptureFailure, ...], metrics: Metrics | None) -> None:
        lost = []
        for failure in (item for item in taken if isinstance(item, CaptureFailure)):
            self._guards["capture"].failed(f"layer {failure.layer.name}: {failure.error}")
            lost.append(lost_reading(self._armed_at, failure.layer.name, "failed", failure.error))
        good = tuple(item for item in taken if isinstance(item, Captured))
        positions = tuple(positions_of(item, self.config.positions) for item in good)
        tasks = [self._measure_task(*pair) for pair in zip(good, positions, strict=True)]
        numbers, tensors = split_metrics(metrics or {})
        if tensors:
            tasks.append(self._metrics_task(tensors))
        sample = Sample(self._armed_at, good, positions, tuple(lost), numbers)
        if not self._guards["measurement"].open or not self._executor.submit(sample, tasks):
            why = "the measurement queue was full; raise every_n_steps or runtime.queue_length"
            self._ledger.measured("skipped", [lost_reading(self._armed_at, c.layer.name, "dropped", why) for c in good])

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = self._lane_of(device)
        return self._lanes[device]

    def _measure_task(self, captured: Captured, positions: tuple[int, ...]) -> Task:
        operator = captured.operator
        lane = self._lane(operator.device)
        return Task(lane, operator.tensors, lambda: compute(captured, positions, self.config.tolerance))

    def _metrics_task(self, tensors: dict[str, torch.Tensor]) -> Task:
        device = next(iter(tensors.values())).device
        return Task(self._lane(device), tuple(tensors.values()), lambda: tensors)

    def _spent(self, phase: Any, seconds: float) -> None:
        self._ledger.spent(phase, seconds)
        self._cadence.spent(seconds)
        self._ledger.overhead(self._cadence.overhead_ratio, self._cadence.interval_steps)

    def _finish(self, jobs: list[Job[Sample]]) -> None:
        for job in jobs:
            with self._guards["measurement"]:
                self._finish_one(job)

    def _finish_one(self, job: Job[Sample]) -> None:
        self._spent("measure", sum(t.launched.cost_seconds() for t in job.tasks if t.launched and t.launched.done()))
        started = self._clock()
        readings, metrics, errors = read(job, self.layers, self.config.tolerance)
        for error in errors:
            self._guards["measurement"].failed(error)
        findings: tuple[Finding, ...] = ()
        if self._guards["diagnosis"].open:
            with self._guards["diagnosis"]:
                findings = self._tracker.observe(readings, metrics, job.tag.step)
        self._readings.update({r.layer: r for r in readings})
        self._findings = (*self._findings, *findings)[-1000:]
        outcome = "ok" if any(r.status in ("ok", "nonfinite", "too_short") for r in readings) else "failed"
        self._ledger.measured(outcome, readings, findings, self.conditions)  # type: ignore[arg-type]
        diagnosed = self._clock()
        self._spent("diagnose", diagnosed - started)
        with self._guards["export"]:
            self._hub.export(
                Measurement(
                    step=job.tag.step,
                    timestamp_seconds=self._wall_clock(),
                    readings=readings,
                    conditions=self.conditions,
                    findings=findings,
                    metrics=metrics,
                    overhead_ratio=self._cadence.overhead_ratio,
                    interval_steps=self._cadence.interval_steps,
                )
            )
        self._spent("export", self._clock() - diagnosed)
