"""From a step that is due to what was captured in its forward pass, on the training thread."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ess_monitor.capture import Captured, CaptureFailure, Sampler, TokenProbe, find_layers
from ess_monitor.capture.layers import FirstSampleProbe
from ess_monitor.errors import CaptureError
from ess_monitor.evidence.causality import is_causal
from ess_monitor.evidence.undisturbed import undisturbed_evaluation
from ess_monitor.pipeline.context import RunContext, Sample
from ess_monitor.pipeline.readings import reduce_long
from ess_monitor.runtime import ComputeBackend, Job, Task
from ess_monitor.runtime.guard import logger

_UNSEEN_STEPS = 3
"""Steps in a row without a forward pass that trains that are taken for an evaluation; a longer gap is reported."""


class SampleTrigger:
    """Attaches the hooks for one forward pass, and collects what they captured.

    Args:
        model: the watched model.
        context: of the run.
        backend_of: gives the backend for the tensors of a device.
    """

    def __init__(
        self, model: nn.Module, context: RunContext, backend_of: Callable[[torch.device], ComputeBackend]
    ) -> None:
        config, health = context.config, context.health
        off, share = health.not_measured, health.backoff.next_share
        self.armed_at: int | None = None
        """Step of the sample that is under way; None while no forward pass is to be sampled."""
        self._sampler = Sampler(
            context.layers,
            config.capture,
            model=model,
            off=off,
            share=share,
            turns=context.turns,
            causality=is_causal,
            runs_flex=False,
            ready=lambda device: backend_of(device).ready(),
            clock=context.clock,
            reduce=partial(reduce_long, positions=config.positions, scale=config.tolerance_scale),
            modulation=config.modulation,
        )
        self._probe = None
        if config.capture.source == "random_tokens":
            self._probe = TokenProbe(model, config.capture.samples, inside=undisturbed_evaluation)
        self._guards, self._clock = context.guards, context.clock
        self._unseen = 0
        self._model, self._filter = model, config.layers
        self._known = {id(layer.module) for layer in context.layers}
        self._modules = _module_ids(model)
        self._unread: set[str] = set()
        self._mixing = FirstSampleProbe(model) if config.capture.source == "train" and context.layers else None
        self._asked: tuple[FirstSampleProbe, Job] | None = None
        """The probe whose answers are on their way to the host, and what brings them."""
        self._backend_of = backend_of
        attached = (self._sampler,) if self._mixing is None else (self._sampler, self._mixing)
        weakref.finalize(self, _remove_hooks, *map(weakref.ref, attached)).atexit = False

    @property
    def turn(self) -> int:
        """Which samples and heads come next; part of a checkpoint."""
        return self._sampler.turn

    @turn.setter
    def turn(self, turn: int) -> None:
        self._sampler.turn = turn

    def pause(self, paused: bool) -> None:
        """Take no pass for one that trains, or do so again."""
        self._sampler.paused = paused

    @property
    def has_hooks(self) -> bool:
        """False on a rank that takes part in a sample without capturing anything."""
        return self._sampler.armed

    def watch(self) -> None:
        """Learn from the next forward pass how the model is called, where random tokens are the source."""
        if self._probe is not None:
            self._probe.watch()

    def stop(self) -> None:
        """Remove every hook from the model."""
        self.forget()
        self._report_unlisted()
        if self._probe is not None:
            self._probe.unwatch()

    def forget(self) -> None:
        """Remove the hooks, and drop what they captured."""
        self.armed_at = None
        self._sampler.remove()
        if self._mixing is not None:
            self._mixing.remove()

    def arm(self, step: int, *, measures: bool, exchanges: bool, any_pass: bool = False) -> None:
        """Attach the hooks for the next forward pass, unless capture or its worker has turned itself off.

        Args:
            step: optimizer steps so far.
            measures: whether this rank measures its own data.
            exchanges: whether other ranks wait for this one. It then takes part with an empty sample.
            any_pass: take a pass that does not train, too.
        """
        if measures and self._guards["capture"].open and self._guards["worker"].open:
            with self._guards["capture"].beginning():
                self.armed_at = step
                self._report_unlisted()
                self._sampler.arm(any_pass=any_pass)
                self._report_new_layers()
                if self._mixing is not None:
                    self._mixing.attach()
        self.armed_at = step if self._sampler.armed or exchanges else None

    def run_probe(self) -> None:
        """Run the model on random tokens, where hooks are attached and they are the source.

        Raises:
            CaptureError: it is not known how to call the model.
        """
        if self._probe is None or not self._sampler.armed or not self._sampler.asked:
            return
        started = self._clock()
        try:
            known = self._probe.run(self._sampler.turn)
        finally:
            whole = self._clock() - started  # the whole pass is the monitor's own
            self._sampler.capture_seconds = whole - self._sampler.test_seconds
        if not known:
            raise CaptureError("no module was called with integer tokens (batch, length) as its only tensor")

    def collect(self, *, exchanges: bool) -> Sample | None:
        """Remove the hooks and return what they captured; None where no forward pass has trained."""
        step, self.armed_at = self.armed_at, None
        if step is None or not self._sampler.armed:
            return None
        unread = self._sampler.unread()
        items = self._sampler.collect()
        was_called = bool(items) or any(item.was_called for item in unread)
        self._unseen = 0 if was_called else self._unseen + 1
        if self._sampler.asked and not was_called and not exchanges and self._unseen < _UNSEEN_STEPS:
            return None
        if self._mixing is not None and items:
            self._mixing.remove()
            self._asked, self._mixing = (self._mixing, self._brought(self._mixing.flags())), None
        return Sample(
            step,
            tuple(item for item in items if isinstance(item, Captured)),
            tuple(item for item in items if isinstance(item, CaptureFailure)),
            self._told(unread) if was_called else unread,
            self._sampler.share,
            self._sampler.capture_seconds,
            self._sampler.test_seconds,
        )

    def _told(self, unread: tuple[CaptureFailure, ...]) -> tuple[CaptureFailure, ...]:
        """Log once for each layer why it is not measured, although its class can be."""
        new = [item for item in unread if item.layer.name not in self._unread]
        self._unread.update(item.layer.name for item in new)
        by_reason: dict[str, list[str]] = {}
        for item in new:
            by_reason.setdefault(item.error, []).append(item.layer.name)
        for reason, names in by_reason.items():
            logger.warning("ess_monitor: %s is not measured: %s", ", ".join(names), reason)
        return unread

    def _report_unlisted(self) -> None:
        """Log which modules mixed tokens in the first sample and are not in the list, once that is on the host."""
        if self._asked is None or not all(task.arrived() for task in self._asked[1].tasks):
            return
        (probe, job), self._asked = self._asked, None
        if not any(task.error for task in job.tasks):
            for found in probe.unlisted(task.inputs[0] for task in job.tasks):
                logger.warning("ess_monitor: %s", found)

    def _brought(self, tensors: tuple[torch.Tensor, ...]) -> Job:
        """Start to bring tensors of any devices to the host."""
        backends = [self._backend_of(tensor.device) for tensor in tensors]
        pairs = zip(tensors, backends, strict=True)
        job = Job(tasks=[Task(backend, (tensor,), dict, (backend.ready(),)) for tensor, backend in pairs])
        job.begin()
        return job

    def _report_new_layers(self) -> None:
        """Log once which layers were added after the monitor was attached: no reading mentions them."""
        modules = _module_ids(self._model)
        if modules == self._modules:
            return
        self._modules = modules
        new = [x for x in find_layers(self._model) if id(x.module) not in self._known and self._filter.matches(x.name)]
        if new:
            self._known |= {id(layer.module) for layer in new}
            logger.warning(
                "ess_monitor: layer %s was added to the model after the monitor was attached, and is not measured. "
                "Attach a new monitor to measure it.",
                ", ".join(layer.name for layer in new),
            )


def _remove_hooks(*parts: weakref.ref[Any]) -> None:
    """Remove the hooks of a monitor that nobody has closed or holds any more; the model may live on."""
    for part in parts:
        if (attached := part()) is not None:
            attached.remove()


def _module_ids(model: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, model.modules()))
