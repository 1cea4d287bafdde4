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

from ess_monitor import validation
from ess_monitor.capture.capture_pass import require_layers
from ess_monitor.capture.layers import check_model
from ess_monitor.config import MonitorConfig
from ess_monitor.diagnosis import Tracker
from ess_monitor.distributed.consensus import StoreConsensus
from ess_monitor.distributed.parallelism import require_data_parallel
from ess_monitor.distributed.ranks import consensus_of_the_run, measure_together, rank_info
from ess_monitor.errors import CheckpointError
from ess_monitor.exporters import Exporter, ExporterHub, build_exporter
from ess_monitor.exporters.base import check_exporters
from ess_monitor.exporters.config import configs_of_rank
from ess_monitor.interventions import Autopilot
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.pipeline.checkpoint import STATE_VERSION, read_state
from ess_monitor.pipeline.context import check_end, check_run, check_timeout
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.pipeline.health import Health
from ess_monitor.pipeline.queue import MeasurementQueue, Metrics
from ess_monitor.pipeline.results import ResultHandler, undiagnosed
from ess_monitor.pipeline.run_info import run_info
from ess_monitor.pipeline.schedule import Lockstep, Skipped
from ess_monitor.pipeline.trigger import SampleTrigger
from ess_monitor.records import Action, Condition, Finding, Reading, RunStatus, SampleResult, Snapshot
from ess_monitor.runtime import Cadence, ComputeBackend, backend_for, shutdown


class Monitor:
    """Measures how much of its memory a model uses while it trains.

    Call `step()` after every optimizer step; every `config.every_n_steps` of them the next forward pass in training is
    sampled. The training is not changed, not waited for, and not stopped by anything that goes wrong in here.

    In mode "auto" of `config.autopilot` it also acts on what it finds; otherwise it changes nothing.

    Args:
        model: the module whose sequence mixers are watched. Wrappers (DDP, FSDP, torch.compile) are fine.
        config: settings; the defaults suit a long run.
        exporters: sinks, besides those that `config.exporters` asks for.
        strategy, precision: facts of the run that the exporters show.
        world_size: processes of the run; by default those of `torch.distributed`. With several, build the monitor on
            each, after `init_process_group`: `config.distributed` says which of them measure, and sinks of
            `config.exporters` open where their `ranks` say.
        grad_scale: what the loss is multiplied with before backward (the loss scaler's scale, 1 / accumulation steps),
            so that the regularizer is scaled alike. The default is 1.
        agreement: the exchange between the ranks; by default over the process group's store, where one is needed.

    Raises:
        NoLayersError: when nothing in the model can be measured; where only a library's version is to blame, a warning
            is logged instead, and the monitor measures nothing.
        ConfigError: when a layer pattern matches nothing, or the model is split in a way that cannot be measured.
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
        world_size: int | None = None,
        precision: str = "32",
        grad_scale: Callable[[], float | torch.Tensor] = lambda: 1.0,
        agreement: StoreConsensus | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        lanes: Callable[[torch.device], ComputeBackend] | None = None,
    ) -> None:
        functions = {"grad_scale": grad_scale, "clock": clock, "wall_clock": wall_clock}
        check_run(strategy, world_size, precision, agreement, functions | ({} if lanes is None else {"lanes": lanes}))
        self.model = check_model(model)
        self.config = validation.optional("config", config, MonitorConfig) or MonitorConfig()
        self._place = rank_info()
        world_size = self._place.world_size if world_size is None else world_size
        acts = self.config.autopilot.mode == "auto"
        require_data_parallel(model, acts=acts, source=self.config.capture.source)
        self._facts: dict[str, Any] = {"strategy": strategy, "world_size": world_size, "precision": precision}
        self._exporters, self._clock, self._wall_clock = check_exporters(exporters), clock, wall_clock
        in_lockstep = acts or agreement is not None or measure_together(self.config.distributed, world_size, acts=acts)
        n, budget = self.config.every_n_steps, self.config.overhead_budget_ratio
        self._cadence = Cadence(n, budget, locked=in_lockstep)
        self._tracker = Tracker(self.config.diagnosis)
        self._health = Health(strict=self.config.strict)
        self._guards = self._health.guards
        self._layers = require_layers(model, self.config.layers, in_training=True)
        self._ledger = RunCounters((layer.name for layer in self._layers), wall_clock=wall_clock)
        self._autopilot = Autopilot(
            self.config.autopilot,
            self._layers,
            retention_below=self.config.diagnosis.retention_below,
            grad_scale=grad_scale,
            on_failure=self._guards["intervention"].count,
        )
        self._optimizer: Optimizers = None
        self._step = 0
        self._samples = True
        self._last_call: float | None = None
        self._judge = ResultHandler(
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
        lane_of = cache(lanes or (lambda device: backend_for(device, threads=self.config.runtime.threads)))
        self._measuring = MeasurementQueue(
            self.config, self.layers, lane_of, self._ledger, self._health, self._judge.spent
        )
        self._lockstep: Lockstep | None = None
        if in_lockstep:
            self._lockstep = Lockstep(
                self.config,
                self.layers,
                self._cadence,
                self._measuring,
                self._guards,
                agreement or consensus_of_the_run(self.config.distributed, world_size, acts=acts),
                spent=self._judge.spent,
                clock=clock,
            )
        self._sampling = SampleTrigger(
            model,
            self.config,
            self._layers,
            self._health,
            self._cadence,
            self._measuring,
            self._lockstep,
            spent=self._judge.spent,
            clock=clock,
        )
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
        here = self._place
        built = tuple(map(build_exporter, configs_of_rank(self.config.exporters, here.rank, here.local_rank)))
        self._judge.hub = ExporterHub((*built, *self._exporters))
        self._judge.report_autopilot()
        run = run_info(self.model, self.config, self._wall_clock(), self._facts)
        self._judge.hub.start(run, self.snapshot)
        self._running = True
        shutdown.opened(self)
        # One rank is a fair sample of a data-parallel run, unless its readings are asked for.
        asked = here.rank == 0 or self._lockstep is not None or bool(built or self._exporters)
        self._samples = asked and bool(self._layers)
        self._arm_if_due()
        if self._layers:
            self._sampling.watch()

    def close(self, status: RunStatus = "finished", *, timeout_seconds: float = 5.0) -> None:
        """Take the hooks away, bring in what is under way, close the exporters. A second call does nothing."""
        timeout_seconds = check_end(status, timeout_seconds)
        if not self._alive:
            return
        self._running = False
        shutdown.closed(self)
        self._sampling.stop()
        with self._guards["worker"]:
            if self._lockstep is not None:
                self._lockstep.read_ahead(timeout_seconds)
            else:
                self._finish(self._measuring.drain(timeout_seconds))
            self._measuring.close(timeout_seconds)
        self._autopilot.close()
        self._ledger.set_status(status)
        self._judge.hub.close(status)
        if status == "finished":
            self._health.raise_pending(self._judge.hub)

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
        if not self._alive:
            return
        now = self._clock()
        seconds = None if self._last_call is None or now < self._last_call else now - self._last_call
        self._last_call = now
        self._step = self._step + 1 if step is None else validation.whole("step", step, 0)
        self._optimizer = optimizer
        self._ledger.step(self._step, seconds)
        if seconds is not None:
            self._cadence.stepped(seconds)
        self._sampling.disarm(metrics)
        if self._lockstep is not None:
            if self._lockstep.due(self._step):
                with self._guards["worker"]:
                    self._conclude(self._lockstep)
        elif len(self._measuring) and self._guards["worker"].open:
            with self._guards["worker"]:
                self._finish(self._measuring.poll())
        if self.sample_due:
            self._sampling.begin(self._step, metrics)
        self._health.raise_pending(self._judge.hub)

    @property
    def sample_due(self) -> bool:
        """True when the cadence asks for a sample now; never on a rank whose readings nobody asks for."""
        return self._running and self._samples and self._cadence.due(self._step)

    @property
    def armed(self) -> bool:
        """True while the next forward pass is to be sampled."""
        return self._sampling.armed

    def arm(self) -> None:
        """Sample the next forward pass. `step` does this by itself when training batches are the source."""
        if self._alive and self._layers:
            self._sampling.arm(self._step)

    def disarm(self, metrics: Metrics | None = None) -> None:
        """Remove the hooks and send what they took to be measured."""
        if not self._health.forked:
            self._sampling.disarm(metrics)

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
        timeout_seconds = check_timeout(timeout_seconds)
        if self._health.forked:
            return self.readings
        with self._guards["worker"]:
            if self._lockstep is None:
                self._finish(self._measuring.drain(timeout_seconds))
            elif self._lockstep.waiting:
                self._lockstep.read_ahead(timeout_seconds)
                self._conclude(self._lockstep)
        self._health.raise_pending(self._judge.hub)
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
        hub = self._judge.hub
        return self._ledger.snapshot(hub.errors, hub.dropped, hub.queue_lengths, self._health.data(hub))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped: step, cadence, diagnosis, counters."""
        waiting = {"judge_at": None, "evidence": None} if self._lockstep is None else self._lockstep.state_dict()
        return {
            "version": STATE_VERSION,
            "step": self._step,
            **waiting,
            "autopilot": self._autopilot.state_dict(),
            "cadence": self._cadence.state_dict(),
            "diagnosis": self._tracker.state_dict(),
            "ledger": self._ledger.state_dict(),
            "turn": self._sampling.turn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of an earlier run.

        Raises:
            CheckpointError: the state was written by another version, or is not a monitor's state. The monitor is left
                as it was.
        """
        checked = read_state(state)
        before = self._tracker.state_dict()
        self._tracker.load_state_dict(checked["diagnosis"])  # these two check their parts, and may still refuse
        try:
            self._autopilot.load_state_dict(checked["autopilot"])
        except CheckpointError:
            self._tracker.load_state_dict(before)
            raise
        self._step = checked["step"]
        self._cadence.load_state_dict(checked["cadence"])
        self._ledger.load_state_dict(checked["ledger"])
        self._sampling.turn = checked["turn"]
        if self._lockstep is not None:
            self._lockstep.load_state_dict(checked)
        elif checked["cadence"]["held"]:
            # Saved by a run in lockstep, which this one is not: nothing will be judged that could release the cadence.
            self._cadence.resume(checked["cadence"]["interval_steps"])
        self._sampling.forget()  # of a monitor that runs already: that sample was due in the run before
        self._arm_if_due()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _alive(self) -> bool:
        """False before the start and after the end, and in a forked child."""
        return self._running and not self._health.forked

    def _arm_if_due(self) -> None:
        if self.config.capture.source == "train" and self.sample_due:
            self.arm()

    def _finish(self, finished: list[SampleResult]) -> None:
        for evidence in finished:
            self._judge.judge(evidence, self._step, self._optimizer)

    def _conclude(self, lockstep: Lockstep) -> None:
        concluded = lockstep.conclude()
        self._judge.may_act = lockstep.may_act
        if isinstance(concluded, Skipped):
            self._judge.skip(concluded.step, concluded.reason)
        else:
            self._judge.judge(concluded, self._step, self._optimizer)
