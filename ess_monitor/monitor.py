"""The framework-agnostic monitor that ties the rooms together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ess_monitor.capture import Sampler, TokenProbe, layer_infos
from ess_monitor.capture.operators import require_layers
from ess_monitor.config import MonitorConfig
from ess_monitor.diagnosis import Tracker, thresholds
from ess_monitor.errors import CaptureError, ConfigError
from ess_monitor.evidence import Evidence, agree
from ess_monitor.exporters import Exporter, ExporterHub, build_exporter
from ess_monitor.interventions import Autopilot
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.judging import Judge, undiagnosed
from ess_monitor.ledger import Ledger
from ess_monitor.measuring import Measuring
from ess_monitor.records import Action, Condition, Finding, Reading, RunInfo, RunStatus, Snapshot
from ess_monitor.runtime import Agreement, Cadence, Guard, Lane, lane_for
from ess_monitor.samples import Metrics
from ess_monitor.state import STATE_VERSION, read_state
from ess_monitor.versions import installed_versions

_STATE_VERSION = 1
_UNSEEN_STEPS = 3  # without a forward pass in training: up to here taken for an evaluation, then it is said


class Monitor:
    """Measures how much of its memory a model uses while it trains.

    Call `step()` after every optimizer step; every `config.every_n_steps` of them the next forward pass in training is
    sampled. The training is not changed, not waited for, and not stopped by anything that goes wrong in here.

    In mode "auto" of `config.autopilot` it also acts on what it finds; otherwise it changes nothing.

    Args:
        model: the module whose sequence mixers are watched. Wrappers (DDP, FSDP, torch.compile) are fine.
        config: settings; the defaults suit a long run.
        exporters: sinks, besides those that `config.exporters` asks for.
        strategy, world_size, precision: facts of the run that the exporters show.
        grad_scale: what the loss is multiplied with before backward (the loss scaler's scale, 1 / accumulation steps),
            so that the regulariser is scaled alike. The default is 1.
        agreement: the exchange between the ranks of a distributed run, on every rank; without it ranks decide alone.

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
        grad_scale: Callable[[], float | torch.Tensor] = lambda: 1.0,
        agreement: Agreement | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        lanes: Callable[[torch.device], Lane] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: {type(model).__name__} is not a torch.nn.Module; pass the trained model")
        self.model = model
        self.config = config or MonitorConfig()
        self._facts: dict[str, Any] = {"strategy": strategy, "world_size": world_size, "precision": precision}
        self._exporters, self._clock, self._wall_clock = tuple(exporters), clock, wall_clock
        self._cadence = Cadence(self.config.every_n_steps, self.config.overhead_budget_ratio)
        self._tracker = Tracker(self.config.diagnosis)
        parts = ("capture", "worker", "measurement", "diagnosis", "intervention", "export")
        self._guards = {part: Guard(part) for part in parts}
        self._layers = require_layers(model, self.config.layers)
        self._sampler = Sampler(self._layers, self.config.capture, clock=clock)
        probing = self.config.capture.source == "random_tokens"
        self._probe = TokenProbe(model, self.config.capture.samples) if probing else None
        self._ledger = Ledger((layer.name for layer in self._layers), wall_clock=wall_clock)
        self._autopilot = Autopilot(
            self.config.autopilot,
            self._layers,
            retention_below=self.config.diagnosis.retention_below,
            grad_scale=grad_scale,
        )
        self._agreement = agreement
        self._lockstep = self.config.autopilot.mode == "auto" or agreement is not None
        """Samples are judged a fixed number of steps after they were taken, instead of as soon as they are measured."""
        self._judge_at: int | None = None
        self._evidence: Evidence | None = None
        """In lockstep: the sample that waits for its step, when it was read early for a checkpoint."""
        self._optimizer: Optimizers = None
        self._step = self._armed_at = self._unseen = 0
        self._last_call: float | None = None
        self._judge = Judge(
            self.layers,
            self._tracker,
            self._autopilot,
            self._ledger,
            self._cadence,
            self._guards,
            undiagnosed=undiagnosed(self._layers, self.config.diagnosis),
            clock=clock,
            wall_clock=wall_clock,
        )
        lane_of = cache(lanes or (lambda device: lane_for(device, threads=self.config.runtime.threads)))
        self._measuring = Measuring(self.config, self.layers, lane_of, self._ledger, self._guards, self._judge.spent)
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
        self._judge.hub = ExporterHub((*built, *self._exporters))
        self._judge.report_autopilot()
        self._judge.hub.start(self._run_info(), self.snapshot)
        self._running = True
        if self.config.capture.source == "train" and self._cadence.due(self._step):
            self.arm()
        if self._probe is not None:
            self._probe.watch()

    def close(self, status: RunStatus = "finished", *, timeout_seconds: float = 5.0) -> None:
        """Take the hooks away, bring in what is under way, close the exporters. A second call does nothing."""
        if not self._running:
            return
        self._running = False
        self._sampler.remove()
        if self._probe is not None:
            self._probe.unwatch()
        with self._guards["worker"]:
            if self._lockstep:
                self._read_ahead()
            else:
                self._finish(self._measuring.drain(timeout_seconds))
            self._measuring.close()
        self._autopilot.close()
        self._ledger.set_status(status)
        self._judge.hub.close(status)

    # -- the training loop's side -------------------------------------------------------------------------------------

    def step(self, metrics: Metrics | None = None, *, optimizer: Optimizers = None, step: int | None = None) -> None:
        """Tell the monitor that an optimizer step is done.

        Args:
            metrics: what the training loop knows (loss, accuracy): numbers or tensors of one element. They are
                looked at on sampled steps only, and tensors are copied without waiting for the device.
            optimizer: the optimizer (or all of them), whose moments are reset with a parameter that the autopilot
                rescales. Needed in mode auto for layers with an alpha that is trained.
            step: optimizer steps so far, where the caller's own count differs from the number of calls.
        """
        if not self._running:
            return
        now = self._clock()
        seconds = None if self._last_call is None or now < self._last_call else now - self._last_call
        self._last_call = now
        self._step = self._step + 1 if step is None else step
        self._optimizer = optimizer
        self._ledger.step(self._step, seconds)
        if seconds is not None:
            self._cadence.stepped(seconds)
        if self._sampler.armed:
            self.disarm(metrics)
        if self._lockstep:
            if self._judge_at is not None and self._step >= self._judge_at:
                with self._guards["worker"]:
                    self._judge_in_lockstep()
        elif len(self._measuring):
            with self._guards["worker"]:
                self._finish(self._measuring.poll())
        if self._cadence.due(self._step):
            if self.config.capture.source == "train":
                self.arm()
            elif self._probe is not None:
                self._send_probe(self._probe, metrics)

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
            self._unseen = 0 if taken else self._unseen + 1
            if not taken and self._agreement is None and self._unseen < _UNSEEN_STEPS:
                return
            self._cadence.sampled(self._armed_at)
            if self._lockstep:
                self._cadence.hold()
                self._judge_at = self._armed_at + self.config.autopilot.lag_steps
            self._measuring.submit(self._armed_at, taken, metrics)
            self._judge.spent("capture", hook_seconds + self._clock() - started)

    def _send_probe(self, probe: TokenProbe, metrics: Metrics | None) -> None:
        if not self._guards["capture"].open:
            return
        with self._guards["capture"]:
            with self.sample(metrics):
                started = self._clock()
                known = probe.run(self._sampler.turn)
                # The whole pass is the monitor's own, not only its hooks.
                self._sampler.capture_seconds = self._clock() - started
            if not known:
                raise CaptureError("no module was called with integer tokens (batch, length) as its only tensor")

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
        if self._lockstep:
            if self._judge_at is not None:
                self._judge_in_lockstep()
        else:
            self._finish(self._measuring.drain(timeout_seconds))
        return self.readings

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the measured layers, in model order."""
        return tuple(layer.name for layer in self._layers)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Latest reading of every layer that has one, whatever its status."""
        return tuple(self._judge.readings[name] for name in self.layers if name in self._judge.readings)

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer."""
        return self._judge.conditions

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The last 1000 changes of condition, oldest first."""
        return self._judge.findings

    @property
    def actions(self) -> tuple[Action, ...]:
        """The last 1000 things the autopilot did or said, oldest first."""
        return self._judge.actions

    @property
    def overhead_ratio(self) -> float:
        """Measured cost of the monitor so far as a share of the training time."""
        return self._cadence.overhead_ratio

    @property
    def exporters(self) -> tuple[Exporter, ...]:
        """The sinks in use, from the configuration and from the argument."""
        return self._judge.hub.exporters

    def snapshot(self) -> Snapshot:
        """All counters at this moment. Safe to call from any thread."""
        return self._ledger.snapshot(self._judge.hub.errors, self._judge.hub.dropped, self._judge.hub.queue_lengths)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped: step, cadence, diagnosis, counters."""
        self._read_ahead()
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "judge_at": self._judge_at,
            "evidence": None if self._evidence is None else self._evidence.state_dict(),
            "autopilot": self._autopilot.state_dict(),
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
        checked = read_state(state)
        self._autopilot.load_state_dict(checked["autopilot"])  # these two check their parts, and may still refuse
        self._tracker.load_state_dict(checked["diagnosis"])
        self._step = checked["step"]
        self._cadence.load_state_dict(checked["cadence"])
        self._ledger.load_state_dict(checked["ledger"])
        self._sampler.turn = checked["turn"]
        self._judge_at = checked["judge_at"]
        self._evidence = None if checked["evidence"] is None else Evidence.from_state(checked["evidence"])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run_info(self) -> RunInfo:
        return RunInfo(
            run_name=self.config.run_name or f"{type(self.model).__name__}-{time.strftime('%Y%m%d-%H%M%S')}",
            model=type(self.model).__name__,
            layers=tuple(info for info in layer_infos(self.model, self.config.layers) if info.supported),
            versions=installed_versions(),
            thresholds=thresholds(self.config.diagnosis),
            start_timestamp_seconds=self._wall_clock(),
            overhead_budget_ratio=self.config.overhead_budget_ratio or 1.0,
            **self._facts,
        )

    def _finish(self, finished: list[Evidence]) -> None:
        for evidence in finished:
            self._judge.judge(evidence, self._step, self._optimizer)

    def _read_oldest(self) -> Evidence:
        """In lockstep: wait for the sample under way. One that is lost becomes evidence without readings."""
        with self._guards["worker"]:
            evidence = self._measuring.take()
            if evidence is not None:
                return evidence
        return Evidence(self._armed_at, ())

    def _read_ahead(self) -> None:
        """In lockstep: what is under way goes with the checkpoint."""
        if self._judge_at is not None and self._evidence is None:
            self._evidence = self._read_oldest()

    def _judge_in_lockstep(self) -> None:
        evidence = self._evidence or self._read_oldest()
        self._judge_at, self._evidence = None, None
        interval = self._cadence.interval_steps
        if self._agreement is not None:
            names = (self.config.autopilot.loss, self.config.diagnosis.metric)
            metrics = [name for name in dict.fromkeys(names) if name is not None]
            evidence, interval = agree(evidence, self.layers, metrics, interval, self._agreement)
        self._cadence.resume(interval)
        self._judge.judge(evidence, self._step, self._optimizer)
