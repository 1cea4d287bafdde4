"""The framework-agnostic monitor: it conducts trigger, queue, schedule and results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture.layers import check_model
from ess_monitor.config import MonitorConfig
from ess_monitor.distributed import StoreConsensus
from ess_monitor.distributed.parallelism import require_data_parallel
from ess_monitor.distributed.ranks import measure_together, rank_info
from ess_monitor.evidence.counterfactual import Replay
from ess_monitor.exporters import Exporter, ExporterHub, build_exporter, configs_of_rank
from ess_monitor.exporters.base import check_exporters
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.pipeline.checkpoint import STATE_VERSION, match_layers, read_state, rename_layers
from ess_monitor.pipeline.context import Metrics, RunContext, check_end, check_metrics, check_run, check_timeout
from ess_monitor.pipeline.run_info import run_info
from ess_monitor.pipeline.sampling import RunSampling
from ess_monitor.pipeline.stages import build_stages
from ess_monitor.records import Reading, RunStatus, SampleResult
from ess_monitor.runtime import ComputeBackend, shutdown, termination


class Monitor(RunSampling):
    """Measures how much of its memory a model uses while it trains.

    Call `step()` after every optimizer step; every `config.every_n_steps` of them the next forward pass in training is
    sampled. The training is not changed, not waited for, and not stopped by anything that goes wrong in here. Only in
    mode "auto" of `config.autopilot` does the monitor act on what it finds.

    Args:
        model: the module whose sequence mixers are watched. Wrappers (DDP, FSDP, torch.compile) are fine.
        config: settings; the defaults suit a long run.
        exporters: sinks, besides those that `config.exporters` asks for.
        strategy: facts of the run that the exporters show.
        precision: facts of the run that the exporters show.
        world_size: processes of the run; by default those of `torch.distributed`. With several, build the monitor on
            each, after `init_process_group`; `config.distributed` says which of them measure.
        grad_scale: what the loss is multiplied with before backward (the loss scaler's scale, 1 / accumulation steps),
            so that the regularizer is scaled alike. The default is 1.
        agreement: the exchange between the ranks; by default over the process group's store, where one is needed.

    Raises:
        NoLayersError: when nothing in the model can be measured; where only a library's version is to blame, a warning
            is logged instead, and the monitor measures nothing.
        ConfigError: when a layer pattern matches nothing, or the model is split in a way that cannot be measured.
        ExporterError: at `start`, when a sink that was asked for cannot be opened.

    Examples:
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
        backends: Callable[[torch.device], ComputeBackend] | None = None,
    ) -> None:
        functions = {"grad_scale": grad_scale, "clock": clock, "wall_clock": wall_clock}
        check_run(strategy, world_size, precision, agreement, functions, backends)
        self.model = check_model(model)
        self.config = config = validation.optional("config", config, MonitorConfig) or MonitorConfig()
        self._rank, acts = rank_info(), config.autopilot.mode == "auto"
        world_size = self._rank.world_size if world_size is None else world_size
        require_data_parallel(model, acts=acts, source=config.capture.source)
        self._facts: dict[str, Any] = {"strategy": strategy, "world_size": world_size, "precision": precision}
        self._exporters, self._hub = check_exporters(exporters), ExporterHub()
        locked = acts or agreement is not None or measure_together(config.distributed, world_size, acts=acts)
        context = self._context = RunContext.create(model, config, clock=clock, wall_clock=wall_clock, locked=locked)
        self._trigger, self._queue, self._schedule, self._replays, self._results = build_stages(
            model,
            context,
            locked=locked,
            world_size=world_size,
            agreement=agreement,
            grad_scale=grad_scale,
            backends=backends,
            export=lambda measurement: self._hub.export(measurement),
        )
        self._step, self._last_call, self._optimizer = 0, float("nan"), cast(Optimizers, None)
        self._running, self._samples = None, False

    def start(self) -> None:
        """Open the exporters and arm the first sample. A second call does nothing."""
        if self._running:
            return
        self._close_abandoned()
        self._running = False  # and not None: a training goes on although the start has raised
        here, context = self._rank, self._context
        configs = configs_of_rank(self.config.exporters, here.rank, here.local_rank)
        self._hub = ExporterHub((*map(build_exporter, configs), *self._exporters))
        self._results.report_autopilot(may_act=self._schedule.may_act)
        context.counters.set_status("starting")
        self._terminated = False
        termination.watch(self._terminate, self.config.handle_sigterm)
        try:
            facts = {**self._facts, "first_step": self._schedule.first_step(self._step)}
            self._hub.start(run_info(self.model, self.config, context.wall_clock(), facts), self.snapshot)
        except BaseException:
            termination.forget(self._terminate)
            raise
        self._running = True
        shutdown.close_at_exit(self)
        # One rank is a fair sample of a data-parallel run, unless its readings are asked for.
        asked = here.rank == 0 or self._schedule.needs_every_rank or self._hub.exporters
        self._samples = bool(asked and context.layers)
        self._arm_if_due()
        if context.layers:
            self._trigger.watch()

    def close(self, status: RunStatus = "finished", *, timeout_seconds: float = 5.0) -> None:
        """Remove the hooks, bring in what is under way, close the exporters. A second call does nothing.

        A signal handler may call it at any time. A run that was told to end by SIGTERM is recorded as terminated.
        """
        timeout_seconds = check_end(status, timeout_seconds)
        if not (self._alive or self._is_closing):
            if not self._context.health.forked:
                self._results.autopilot.close()  # a treatment that came with a state, of a monitor that did not start
            return
        self._running, self._is_closing = False, True
        shutdown.forget(self)
        self._trigger.stop()
        with self._context.guards["worker"]:
            self._handle(self._schedule.finish(timeout_seconds))
            self._queue.close(timeout_seconds)
        self._replays.stop()
        self._results.autopilot.close()
        status = "terminated" if self._terminated else status
        self._context.counters.set_status(status)
        self._hub.close(status)
        termination.forget(self._terminate)
        self._is_closing = False
        if status == "finished":
            self._context.health.raise_pending(self._hub.take_errors)

    def step(
        self,
        metrics: Metrics | None = None,
        *,
        optimizer: Optimizers = None,
        step: int | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Tell the monitor that an optimizer step is done.

        Args:
            metrics: what the training loop knows (loss, accuracy): numbers of Python or NumPy, arrays or tensors of one
                element. They are looked at on sampled steps only (`diagnosis.metric` on all), and tensors are copied
                without waiting for the device. What is no number is named once in the log, and left out.
            optimizer: the optimizer (or all of them), whose moments are reset with a parameter that the autopilot
                rescales. Needed in mode auto for layers with an alpha that is trained.
            step: optimizer steps so far, where the caller's own count differs from the number of calls.
            replay: returns the loss of this step's batch, of another forward pass. Called where `replay_due` alone.
                Without it outputs are compared, on which mode auto does not act.

        Raises:
            ConfigError: the monitor was not started, or `metrics` is no mapping. After `close` a call does nothing.
        """
        if not self._takes("step"):
            return
        check_metrics(metrics, "step")
        before, self._last_call = self._last_call, self._context.clock()
        self._step = self._step + 1 if step is None else validation.whole("step", step, 0)
        self._optimizer = optimizer
        self._context.count_step(self._step, self._last_call - before)
        self._collect(metrics)
        if self._replays.due(self._step):
            self._replays.collect(replay)
        if self._schedule.due(self._step):
            with self._context.guards["worker"]:
                self._handle(self._schedule.conclude())
        self._arm_if_due()
        if self.config.capture.source == "random_tokens" and self.sample_due:
            with self._context.guards["capture"], self.sample(metrics):
                self._trigger.run_probe()
        self._context.health.raise_pending(self._hub.take_errors)

    def flush(self, timeout_seconds: float = 60.0) -> tuple[Reading, ...]:
        """Wait for the samples under way and return the latest reading of every layer."""
        self._require_start("flush")
        timeout_seconds = check_timeout(timeout_seconds)
        if not self._context.health.forked:
            with self._context.guards["worker"]:
                self._handle(self._schedule.flush(timeout_seconds))
            self._context.health.raise_pending(self._hub.take_errors)
        return self.readings

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped: step, cadence, diagnosis, counters."""
        parts = {**self._schedule.state_dict(), **self._results.state_dict(), **self._context.state_dict()}
        parts |= self._replays.state_dict()
        return {"version": STATE_VERSION, "step": self._step, "turn": self._trigger.turn, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of an earlier run, under the present settings and whatever the model is wrapped in.

        What is known of layers that are not measured any more is dropped, and the log names them.

        Raises:
            CheckpointError: the state was written by another version, or is not a monitor's state. The monitor is left
                as it was.
        """
        checked = read_state(state)
        names = match_layers(checked["ledger"]["nonfinite"], self.layers)
        self._results.load_state_dict(checked, names)  # checks its parts, and may still refuse
        self._context.load_state_dict(checked := rename_layers(checked, names))
        self._schedule.load_state_dict(checked)
        self._step, self._trigger.turn = checked["step"], checked["turn"]
        self._results.report_resumed(self._step, may_act=self._schedule.may_act)
        self._replays.load_state_dict(checked, *self._results.examinations(self._step, resumed=True))
        self._trigger.forget()  # of a monitor that runs already: that sample was due in the run before
        self._arm_if_due()

    def _handle(self, results: list[SampleResult]) -> None:
        for result in results:
            self._results.handle(result, self._step, self._optimizer, may_act=self._schedule.may_act)
            self._replays.ask(*self._results.examinations(self._step))
