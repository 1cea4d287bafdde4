"""What the stages of a run share, and what the first of them hands on."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.capture import Captured, CaptureFailure, Layer
from ess_monitor.capture.capture_pass import require_layers
from ess_monitor.capture.linearized import LayerAlone
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.ess import JacobianOperator
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.pipeline.health import Health
from ess_monitor.records import RUN_STATUSES, Changes, Part, Phase, RunStatus
from ess_monitor.runtime import Cadence, Guard, Job, MetricReader
from ess_monitor.runtime.retention import UndecayedSizes
from ess_monitor.runtime.turns import LayerTurns

Metrics = Mapping[str, Any]
"""What the training loop knows of a step, by name: numbers of Python or NumPy, arrays or tensors of one element."""


@dataclass(frozen=True)
class RunContext:
    """Holds what every stage of one run needs. It is made once; no stage holds another stage."""

    config: MonitorConfig
    layers: tuple[Layer, ...]
    """The measured layers, in model order."""
    cadence: Cadence
    counters: RunCounters
    health: Health
    clock: Callable[[], float]
    """Seconds that never go back."""
    wall_clock: Callable[[], float]
    """Seconds since the epoch."""
    metrics: MetricReader
    """Reads the loop's metrics, and keeps the task metric from one sample to the next."""
    turns: LayerTurns
    """Says which layers there is time for in a sample."""
    undecayed: UndecayedSizes
    """The sizes of the layers without decay, for their retention."""

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the measured layers, in model order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def guards(self) -> Mapping[Part, Guard]:
        """One guard for each part of the monitor."""
        return self.health.guards

    @classmethod
    def create(
        cls,
        model: nn.Module,
        config: MonitorConfig,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        locked: bool,
    ) -> RunContext:
        """Build the context of a new run.

        Args:
            model: the watched model.
            config: settings of its monitor.
            clock, wall_clock: see the fields.
            locked: whether the interval between samples changes by agreement only.

        Raises:
            NoLayersError: nothing in the model can be measured.
        """
        layers = require_layers(model, config.layers, in_training=True, unknown=config.capture.unknown)
        cadence = Cadence(config.every_n_steps, config.overhead_budget_ratio, locked=locked)
        counters = RunCounters((layer.name for layer in layers), wall_clock=wall_clock)
        metrics = MetricReader(config.diagnosis.metric)
        turns = LayerTurns((layer.name for layer in layers), config.runtime.sample_seconds, config.positions)
        health, undecayed = Health(strict=config.strict), UndecayedSizes(config.retention_every_n_samples)
        return cls(config, layers, cadence, counters, health, clock, wall_clock, metrics, turns, undecayed)

    def count_step(self, step: int, seconds: float) -> None:
        """Count an optimizer step that took so long; NaN for the first, whose start was not seen."""
        seen = seconds >= 0  # False for NaN, and where the clock went back
        self.counters.step(step, seconds if seen else None)
        if seen:
            self.cadence.stepped(seconds)

    def charge(self, phase: Phase, seconds: float, *, once_seconds: float = 0.0) -> None:
        """Add to the cost of the monitor itself; nothing where the clock went back, or says what is no time.

        Args:
            phase: what it went into.
            seconds: the cost.
            once_seconds: a cost of this phase that does not come with every sample.
        """
        seconds, once_seconds = (each if 0 < each < math.inf else 0.0 for each in (seconds, once_seconds))
        self.counters.spent(phase, seconds + once_seconds)
        self.cadence.spent(seconds, once=phase == "replay")
        if once_seconds:
            self.cadence.spent(once_seconds, once=True)
        self.counters.overhead(self.cadence.overhead_ratio, self.cadence.interval_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return cadence, counters, turns of the layers and their sizes without decay, for a checkpoint."""
        state = {"cadence": self.cadence.state_dict(), "ledger": self.counters.state_dict()}
        return {**state, "layer_turns": self.turns.state_dict(), "undecayed": self.undecayed.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.cadence.load_state_dict(state["cadence"])
        self.counters.load_state_dict(state["ledger"])
        self.turns.load_state_dict(state["layer_turns"])
        self.undecayed.load_state_dict(state["undecayed"])


@dataclass(eq=False)
class Sample(Job):
    """Holds what was captured in one sampled forward pass, and the tasks that measure it.

    There is a task for each captured layer, in order, and one more for each device that has metrics. Those of layers
    are given without the layer, whose tensors change on the way: `begin` puts it first among the arguments.
    """

    step: int
    """Optimizer steps before the pass."""
    captured: tuple[Captured, ...]
    failures: tuple[CaptureFailure, ...] = ()
    """Layers whose capture failed."""
    unread: tuple[CaptureFailure, ...] = ()
    """Layers that gave nothing to read: not called, or not on a whole sequence."""
    share: float = 1.0
    """Share of the configured samples and heads that was to be captured."""
    hook_seconds: float = 0.0
    """Time spent inside the forward pass."""
    test_seconds: float = 0.0
    """Time that the tests of layers took, which come once in a run."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the training loop that were numbers already."""
    changes: dict[str, Changes] = field(default_factory=dict)
    """Of batches that were run again since the sample before."""

    def begin(self) -> None:
        """Start to bring the tensors to the host, let go of those on the device, and give each task its layer."""
        super().begin()
        pairs = zip(self.captured, self.tasks, strict=False)
        self.captured = tuple(_with_tensors(captured, task.inputs) for captured, task in pairs)
        for captured, task in zip(self.captured, self.tasks, strict=False):
            task.compute = partial(task.compute, captured)


def tensors_of(captured: Captured) -> tuple[Tensor, ...]:
    """Return all tensors that a measurement of a captured layer reads: of operator, claims and separators."""
    function = getattr(captured.operator, "function", None)
    of_function = function.tensors if isinstance(function, LayerAlone) else ()
    marks = () if captured.separators is None else (captured.separators,)
    return (*captured.operator.tensors, *of_function, *(claim.holds for claim in captured.claims), *marks)


def _with_tensors(captured: Captured, given: tuple[Tensor, ...]) -> Captured:
    """Return what was captured with other tensors, in the order of `tensors_of`; without any, as it was."""
    before = tensors_of(captured)
    if not given or all(map(operator.is_, before, given)):
        return captured
    new = dict(zip(map(id, before), given, strict=True))
    changed = captured.operator.map(lambda tensor: new[id(tensor)])
    if isinstance(changed, JacobianOperator) and isinstance(changed.function, LayerAlone):
        changed = replace(changed, function=changed.function.with_tensors(new))
    claims = tuple(replace(claim, holds=new[id(claim.holds)]) for claim in captured.claims)
    separators = None if captured.separators is None else new[id(captured.separators)]
    return replace(captured, operator=changed, claims=claims, separators=separators, ready=())


def check_run(
    strategy: str,
    world_size: int | None,
    precision: str,
    agreement: object,
    functions: Mapping[str, object],
    backends: object = None,
) -> None:
    """Raise `ConfigError` unless these are facts of a run; `functions` by the names of their arguments."""
    validation.instance("strategy", strategy, str, hint='for example "ddp"')
    validation.instance("precision", precision, str, hint='for example "bf16-mixed"')
    if world_size is not None:
        validation.whole("world_size", world_size, 1)
    if agreement is not None and (isinstance(agreement, type) or not hasattr(agreement, "exchange")):
        given = validation.type_of(agreement)
        raise ConfigError(f"agreement: {given} is not a StoreConsensus; leave it out to have one built")
    for name, function in functions.items():
        validation.function(name, function)
    if backends is not None:
        validation.function("backends", backends)


def check_metrics(metrics: object, call: str) -> None:
    """Raise `ConfigError` where something else than a mapping is given, such as the loss alone."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigError(
            f"metrics: {validation.type_of(metrics)} given; it must be a mapping of names to numbers, as in "
            f'{call}({{"loss": loss}})'
        )


def check_end(status: RunStatus, timeout_seconds: float) -> float:
    """Return the time limit; raise `ConfigError` unless it is one and `status` is the status of a run."""
    if status not in RUN_STATUSES:
        raise ConfigError(f"status: {validation.shown(status)} given; it must be one of {', '.join(RUN_STATUSES)}")
    return check_timeout(timeout_seconds)


def check_timeout(timeout_seconds: float) -> float:
    """Return the time limit; raise `ConfigError` unless it is a number of seconds."""
    return validation.real("timeout_seconds", timeout_seconds, low=0, hint="seconds to wait at most")
