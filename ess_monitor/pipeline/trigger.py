"""From a step that is due to what was taken of its forward pass, on the training thread."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ess_monitor.capture import Layer, Sampler, TokenProbe, find_layers
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError
from ess_monitor.pipeline.health import Health
from ess_monitor.pipeline.queue import MeasurementQueue, Metrics
from ess_monitor.pipeline.schedule import Lockstep
from ess_monitor.records import Phase
from ess_monitor.runtime import Cadence
from ess_monitor.runtime.guard import logger

_UNSEEN_STEPS = 3  # without a forward pass in training: up to here taken for an evaluation, then it is said


class SampleTrigger:
    """Arms the hooks, collects what they took and sends it to be measured.

    A rank that decides together with others takes part in every sample: where it measures nothing, or its capture has
    turned itself off, an empty one is counted, so that nobody waits for it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MonitorConfig,
        layers: tuple[Layer, ...],
        health: Health,
        cadence: Cadence,
        measuring: MeasurementQueue,
        lockstep: Lockstep | None,
        *,
        spent: Callable[[Phase, float], None],
        clock: Callable[[], float],
    ) -> None:
        self.armed = False
        """True while the next forward pass is to be sampled."""
        off, share = health.layers.off, health.portion.next_share
        self._sampler = Sampler(layers, config.capture, model=model, off=off, share=share, clock=clock)
        self._source = config.capture.source
        self._probe = TokenProbe(model, config.capture.samples) if self._source == "random_tokens" else None
        self._guard, self._worker = health.guards["capture"], health.guards["worker"]
        self._cadence, self._measuring, self._lockstep = cadence, measuring, lockstep
        self._spent, self._clock = spent, clock
        self._armed_at = self._unseen = 0
        self._model, self._filter = model, config.layers
        self._known = {id(layer.module) for layer in layers}
        self._modules = _modules_of(model)

    @property
    def turn(self) -> int:
        """Which samples and heads come next; part of a checkpoint."""
        return self._sampler.turn

    @turn.setter
    def turn(self, turn: int) -> None:
        self._sampler.turn = turn

    def watch(self) -> None:
        """Learn from the next forward pass how the model is called, where that is needed."""
        if self._probe is not None:
            self._probe.watch()

    def stop(self) -> None:
        """Leave the model."""
        self.forget()
        if self._probe is not None:
            self._probe.unwatch()

    def forget(self) -> None:
        """Take the hooks away, and what they took."""
        self.armed = False
        self._sampler.remove()

    def begin(self, step: int, metrics: Metrics | None) -> None:
        """A sample is due after `step` optimizer steps. Validation batches are announced by the loop itself."""
        if self._source == "train":
            self.arm(step)
        elif self._probe is not None:
            self._send_probe(self._probe, step, metrics)

    def arm(self, step: int) -> None:
        """Sample the next forward pass; not while the one before is still to be judged at its step."""
        if self._lockstep is not None and self._lockstep.waiting:
            return
        if self._open and (self._lockstep is None or self._lockstep.measures):
            with self._guard.beginning():
                self._armed_at = step
                self._sampler.arm()
                self._name_new_layers()
        self.armed = self._sampler.armed
        if self._exchanges:
            self.armed, self._armed_at = True, step

    def disarm(self, metrics: Metrics | None) -> None:
        """Remove the hooks and send what they took to be measured."""
        if not self.armed:
            return
        self.armed = False
        if self._sampler.armed:
            with self._guard:
                self._send(metrics)
        if self._exchanges and self._lockstep is not None and not self._lockstep.waiting:
            self._taken()

    def _name_new_layers(self) -> None:
        """Say once which layers came into the model after the monitor: they are in no reading that could say so."""
        modules = _modules_of(self._model)
        if modules == self._modules:
            return
        self._modules = modules
        new = [x for x in find_layers(self._model) if id(x.module) not in self._known and self._filter.matches(x.name)]
        if new:
            self._known |= {id(layer.module) for layer in new}
            logger.warning(
                "ess_monitor: layer %s came into the model after the monitor was attached, and is not measured. "
                "Attach a new monitor to measure it.",
                ", ".join(layer.name for layer in new),
            )

    @property
    def _open(self) -> bool:
        """False where capture has turned itself off, or the worker that its samples are for."""
        return self._guard.open and self._worker.open

    @property
    def _exchanges(self) -> bool:
        return self._lockstep is not None and self._lockstep.exchanges

    def _send(self, metrics: Metrics | None) -> None:
        started = self._clock()
        taken = self._sampler.collect()
        hook_seconds = self._sampler.capture_seconds
        self._unseen = 0 if taken else self._unseen + 1
        if self._sampler.asked and not taken and not self._exchanges and self._unseen < _UNSEEN_STEPS:
            return
        self._taken()
        self._measuring.submit(self._armed_at, taken, metrics, self._sampler.asked, self._sampler.share)
        self._spent("capture", hook_seconds + self._clock() - started)

    def _taken(self) -> None:
        self._cadence.sampled(self._armed_at)
        if self._lockstep is not None:
            self._lockstep.taken(self._armed_at)

    def _send_probe(self, probe: TokenProbe, step: int, metrics: Metrics | None) -> None:
        if not self._open:
            self.arm(step)
            self.disarm(metrics)
            return
        with self._guard:
            self.arm(step)
            known = True
            try:
                started = self._clock()
                known = not self._sampler.armed or not self._sampler.asked or probe.run(self._sampler.turn)
                # The whole pass is the monitor's own, not only its hooks.
                self._sampler.capture_seconds = self._clock() - started
            finally:
                self.disarm(metrics)
            if not known:
                raise CaptureError("no module was called with integer tokens (batch, length) as its only tensor")


def _modules_of(model: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, model.modules()))
