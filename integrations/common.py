"""Holds what the callbacks of all training loops share: settings, the running monitor, its state and its end.

A callback describes its loop (`LoopFacts`) and calls `_open`, `_close` and `monitor.step`. Everything else is here, so
that a setting means the same in every loop.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import Signature
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from ess_monitor import validation
from ess_monitor.config import MonitorConfig, with_environment
from ess_monitor.distributed.parallelism import require_data_parallel
from ess_monitor.distributed.ranks import measure_together
from ess_monitor.errors import CheckpointError, ConfigError
from ess_monitor.exporters import Exporter, TerminalConfig, TerminalExporter
from ess_monitor.exporters.config import configs_of_rank
from ess_monitor.integrations.loop_logs import default_event_log, in_log_folder, is_event_log
from ess_monitor.integrations.monitor_settings import MonitorSettings, with_settings
from ess_monitor.monitor import Monitor
from ess_monitor.pipeline.context import Metrics
from ess_monitor.records import RunStatus

Self = TypeVar("Self", bound="ExplicitLoop")


def require(module: str, *others: str, extra: str) -> None:
    """Raise an error that names the missing extra, unless one of the modules can be imported. Imports nothing.

    Raises:
        ModuleNotFoundError: none of them is installed.
    """
    if not any(is_installed(name) for name in (module, *others)):
        raise ModuleNotFoundError(f'this integration needs {module}: pip install "ess-monitor[{extra}]"')


def is_installed(name: str) -> bool:
    """Return whether a module can be imported, by its dotted name. Imports no more than its parents."""
    parts = name.split(".")
    # find_spec raises where a parent is missing, so the parents are looked up first.
    return all(find_spec(".".join(parts[: k + 1])) is not None for k in range(len(parts)))


def loss_factor(scaler: Any, device: torch.device, accumulation_steps: float) -> float | torch.Tensor:
    """Return the loss scaler's scale over the accumulation steps: the factor of the loss before backward.

    Args:
        scaler: a `torch.amp.GradScaler`, or None. Its scale stays on its device, so nothing waits.
        device: where the loss lives.
        accumulation_steps: the divisor of the loss.

    Examples:
        >>> loss_factor(None, torch.device("cpu"), 4)
        0.25
    """
    if scaler is None:
        return 1.0 / accumulation_steps
    scale: torch.Tensor = scaler.scale(torch.ones((), device=device))
    return scale / accumulation_steps


@dataclass(frozen=True)
class LoopFacts:
    """Describes the loop that a callback is in."""

    rank: int
    """Of this process. Rank 0 reports."""
    local_rank: int
    """Rank on its machine."""
    world_size: int
    strategy: str
    precision: str
    grad_scale: Callable[[], float | torch.Tensor]
    """As for `Monitor`; called during backward."""
    step: int | None = None
    """Optimizer steps so far: a run that begins at step 0 begins anew. None where the loop does not count them."""
    scale_known: bool = True
    """False where an engine hides its loss scale (DeepSpeed, Megatron-LM). The gradient of a regularizer could then not
    be scaled like the loss, so the autopilot must not act."""
    log_folder: str | Path | None = None
    """Where the loop's own logs of this run are; None where it writes none."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """What the loop knows of them; those of the settings come first."""
    parallel: Mapping[str, int] = field(default_factory=dict)
    """Number of processes over which the loop's settings split layers ("pipeline"), tokens ("context") or heads
    ("tensor")."""


class CallbackBase:
    """Holds settings, running monitor and state of a callback.

    Args:
        config: a `MonitorConfig`, or its settings as a dictionary (from a configuration file, for example).
        exporters: further sinks: kinds ("prometheus", "event_log"), their settings, or exporter objects.
        table: print the table of layers in the terminal.
        event_log: write the event log, from which `ess-monitor report` draws a page, to the loop's own log folder. One
            among `exporters` takes its place, in the same folder if it has no path.
        settings: fields of `MonitorConfig`, instead of or on top of `config`.

    Raises:
        ConfigError: a setting is unknown or has a value it cannot have.
    """

    __signature__: ClassVar[Signature]
    """Lists every setting with its default, for `help()`, IPython and editors."""
    _not_copied: tuple[str, ...] = ()
    """Attributes that belong to the running training; copies and pickles leave them out."""

    def __init__(
        self,
        config: MonitorConfig | dict[str, Any] | None = None,
        *,
        exporters: Iterable[str | dict[str, Any] | Exporter] = (),
        table: bool = True,
        event_log: bool = True,
        **settings: Unpack[MonitorSettings],
    ) -> None:
        super().__init__()
        exporters = validation.listed("exporters", exporters, hint='kinds such as "prometheus", settings, exporters')
        self.table = validation.flag("table", table)
        self.event_log = validation.flag("event_log", event_log)
        self._live_exporters = tuple(item for item in exporters if _is_exporter(item))
        configured = tuple(item for item in exporters if not _is_exporter(item))
        if isinstance(config, MonitorConfig):
            config = config.model_dump()
        elif config is not None and not isinstance(config, dict):
            raise ConfigError(
                f"config: {validation.type_of(config)} given; pass a MonitorConfig, a dictionary or nothing. A file is "
                "read by MonitorConfig.load(path)"
            )
        given: dict[str, Any] = {**(config or {}), **settings}
        self.config = with_environment({**given, "exporters": configured} if configured else given)
        self.monitor: Monitor | None = None
        """The monitor of the training that runs now, or of the last one. None on ranks that do not measure."""
        self._state: dict[str, Any] | None = None
        self._close_if_dropped: weakref.finalize[..., Any] | None = None
        """Set while the monitor runs."""

    @property
    def _is_running(self) -> bool:
        return self._close_if_dropped is not None

    def _open(self, model: nn.Module, facts: LoopFacts, sinks: Callable[[], Iterable[Exporter]]) -> None:
        """Build the monitor, load its state, and start it.

        It runs on rank 0 and on the ranks that an exporter asks for (`ranks`), each measuring its own data. When the
        autopilot may act, or several ranks are to measure (`distributed.ranks`), it runs on every rank, and all judge
        the same numbers.

        Raises:
            ConfigError: mode auto where the loss scale is hidden, or a model whose layers or tokens are spread over
                processes.
        """
        acts = self.config.autopilot.mode == "auto"
        if acts and not facts.scale_known:
            raise ConfigError(
                f'autopilot: mode "auto" is not possible under {facts.strategy}, which hides its loss scale; '
                'use "advise"'
            )
        # Checked on all ranks, also on those that do not measure: either all of them end here, or none.
        require_data_parallel(model, facts.parallel, acts=acts, source=self.config.capture.source)
        exporters = configs_of_rank(self.config.exporters, facts.rank, facts.local_rank)
        reports = facts.rank == 0
        if facts.log_folder is not None:
            exporters = tuple(in_log_folder(config, facts.log_folder) for config in exporters)
        if not (reports or exporters or measure_together(self.config.distributed, facts.world_size, acts=acts)):
            return
        monitor = Monitor(
            model,
            self.config.model_copy(update={"exporters": exporters, "hyperparameters": self._hyperparameters(facts)}),
            exporters=(*sinks(), *self._live_exporters, *self._default_log(facts.log_folder)) if reports else (),
            strategy=facts.strategy,
            world_size=facts.world_size,
            precision=facts.precision,
            grad_scale=facts.grad_scale,
        )
        state = self._state_to_go_on_from(model, facts.step)
        if state is not None:
            monitor.load_state_dict(state)
        # The steps in between, if any, were made without the monitor.
        if facts.step and (present := monitor.state_dict())["step"] < facts.step:
            monitor.load_state_dict({**present, "step": facts.step})
        monitor.start()
        self.monitor, self._state = monitor, None
        # A loop that dies without calling its callbacks, and is dropped with them, still ends the run in the exporters.
        self._close_if_dropped = weakref.finalize(self, monitor.close, "failed")
        self._close_if_dropped.atexit = False  # the monitor does that itself

    def _hyperparameters(self, facts: LoopFacts) -> dict[str, Any]:
        """Return those of the settings, and of the loop's those that are plain values."""
        plain = {str(name): value for name, value in facts.hyperparameters.items() if _is_plain(value)}
        return {**plain, **self.config.hyperparameters}

    def _close(self, status: RunStatus) -> None:
        if self.monitor is None or self._close_if_dropped is None:
            return
        self._close_if_dropped.detach()
        self._close_if_dropped = None
        self.monitor.close(status)

    def _state_to_go_on_from(self, model: nn.Module, step: int | None) -> dict[str, Any] | None:
        """Return the state that was loaded, or that of the last run where this one trains its model further.

        None for a run that begins anew: at step 0 (another fit, a fold, a sweep), with another model, or before the
        step that the last run came to.
        """
        if step == 0:
            return None
        if self._state is not None or self.monitor is None or self.monitor.model is not model:
            return self._state
        last = self.monitor.state_dict()
        return last if step is None or last["step"] <= step else None

    def _table(self, write: Callable[[str], None]) -> list[Exporter]:
        return [TerminalExporter(TerminalConfig(), write=write)] if self.table else []

    def _default_log(self, folder: str | Path | None) -> list[Exporter]:
        given = (*self.config.exporters, *self._live_exporters)
        if not self.event_log or folder is None or any(map(is_event_log, given)):
            return []
        return default_event_log(Path(folder))

    def _validation_monitor(self) -> Monitor | None:
        """Return the monitor where validation batches are sampled, else None."""
        return self.monitor if self.config.capture.source == "validation" else None

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state: plain values and tensors. Empty before the first training."""
        return self.monitor.state_dict() if self.monitor is not None else (self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the monitor is built; an unreadable one raises `CheckpointError` then.

        With an empty one the next run begins anew.
        """
        if not isinstance(state_dict, dict):
            raise CheckpointError(
                f"state_dict: {type(state_dict).__name__} given; expected the dictionary of state_dict()"
            )
        self._state = state_dict or None
        if not (state_dict or self._is_running):
            self.monitor = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings and the state, without the running training, for copies and pickles."""
        kept = {name: value for name, value in self.__dict__.items() if name not in self._not_copied}
        return {**kept, "monitor": None, "_close_if_dropped": None, "_state": self.state_dict() or None}


def _is_plain(value: Any) -> bool:
    """Return whether a value can be written to the event log as it is."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and abs(value) < 2**63)


CallbackBase.__signature__ = with_settings(CallbackBase.__init__)
CallbackBase.__init__.__doc__ = MonitorSettings.__doc__


class ExplicitLoop(CallbackBase):
    """Serves loops that their users write themselves: they call `watch`, a with-block, `step` and `sample`."""

    _model: nn.Module | None = None
    _was_started = False
    _not_copied: tuple[str, ...] = ("_model", "_was_started")

    @abstractmethod
    def _facts(self) -> LoopFacts:
        """Describe the watched loop."""

    @abstractmethod
    def _sinks(self) -> Iterable[Exporter]:
        """Return the framework's own loggers, and the table."""

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def start(self) -> None:
        """Build and start the monitor; the with-block does this. A second call does nothing.

        Raises:
            ConfigError: `watch` was not called, a layer pattern matches nothing, or mode auto is not possible here.
            NoLayersError: nothing in the model can be measured.
            CheckpointError: the state that was loaded is not a monitor's.
            ExporterError: a sink that was asked for cannot be opened.
        """
        if self._is_running:
            return
        if self._model is None:
            raise ConfigError(f"{type(self).__name__}: nothing to watch; call .watch(...) with the model first")
        self._open(self._model, self._facts(), self._sinks)
        self._was_started = True

    def close(self, status: RunStatus = "finished") -> None:
        """End the run; the with-block does this. A second call does nothing."""
        self._close(status)

    @contextmanager
    def sample(self, metrics: Metrics | None = None) -> Iterator[None]:
        """Sample the forward pass inside the block if a sample is due; for one validation batch.

        Use it with `capture={"source": "validation"}`: training batches are not sampled then.
        """
        self._require_start("sample")
        if self.monitor is None or not self.monitor.sample_due:
            yield
            return
        with self.monitor.sample(metrics):
            yield

    def note(self, metrics: Metrics | None) -> None:
        """Take metrics that come between two steps, such as those of an evaluation at the end of an epoch.

        The task metric (`diagnosis.metric`) goes with the next sample.
        """
        self._require_start("note")
        if self.monitor is not None:
            self.monitor.note(metrics)

    def _require_start(self, call: str) -> None:
        """Raise `ConfigError` where a run was never started. Ranks that measure nothing have no monitor either."""
        if not self._was_started:
            raise ConfigError(
                f"{call}: the run was not started, so nothing would be measured; put the training into "
                f"`with callback.watch(...):`, or call start() before it and close() after it"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()` of an earlier run. During a run the monitor is restarted from it."""
        was_running = self._is_running
        self._close("finished")
        super().load_state_dict(state_dict)
        if was_running:
            self.start()


def _is_exporter(item: object) -> bool:
    # A class has the names of its instances, and a dictionary may answer to any name.
    return isinstance(item, Exporter) and not isinstance(item, (str, dict, type))
