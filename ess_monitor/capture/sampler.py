"""Copy the operators of a few sequences out of one forward pass.

Hooks are attached when a sample is armed and removed when it is collected: a step that is not sampled runs the model
exactly as it would without the monitor. A hook does not change or wait for what the layer does. It copies a small slice
of the tensors that define the operator, on the stream the layer runs on. Of training batches the copies of the pass
that gets a backward pass are kept (`training_pass`). A sampled step of a compiled model runs eagerly, because compiled
code ignores hooks that were attached after its first call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture.captured import Captured, CaptureFailure, Taken, failure, is_deferred, proven
from ess_monitor.capture.causality.claims import collecting
from ess_monitor.capture.causality.layer_tests import LayerTests, Test
from ess_monitor.capture.check import log_misfit
from ess_monitor.capture.hooks.call_site import Call, HookHandle, ModuleHook
from ess_monitor.capture.hooks.compiler import EagerStance, runs_flex_attention
from ess_monitor.capture.hooks.forward_errors import when_raised
from ess_monitor.capture.hooks.given_tokens import TokenWatch
from ess_monitor.capture.hooks.ignored_calls import (
    DEFERRED,
    FLEX,
    RECORDED,
    SEVERAL_CALLS,
    SPREAD,
    TRANSFORMED,
    UNTRAINED,
    Ignored,
    is_recorded,
    is_transformed,
    why_ignored,
    why_not_seen,
)
from ess_monitor.capture.hooks.token_ids import ModulationConfig
from ess_monitor.capture.layers import Layer
from ess_monitor.capture.rotation import CaptureConfig, EveryLayer, Part, Size, Turns, kind_of, part_of
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.capture.training_pass import Candidate, TrainingPass
from ess_monitor.distributed.context_parallel import tokens_are_spread
from ess_monitor.errors import CaptureError
from ess_monitor.ess import JacobianOperator, Operator
from ess_monitor.ess.cost import SampleShape
from ess_monitor.ess.operators.reduced import ReducedRecurrence

logger = logging.getLogger("ess_monitor")


class Sampler:
    """Attaches the hooks of one sample, collects its operators, and removes the hooks.

    Args:
        layers: the layers to read, in model order.
        config: how much of each layer to copy.
        model: the model of these layers. A forward pass of it that raises ends the sample at once, so that nothing
            stays attached when `collect` is never called. That sample is lost, and the next one can be armed. None
            leaves the hooks attached until `collect` or `remove`.
        off: names of layers to skip; read whenever a sample is armed.
        share: returns the share of the samples and heads of `config` to copy, 0 for one of each, None to skip all
            layers for one sample. Called whenever a sample is armed.
        turns: says which layers there is time for, and for how much of each.
        on_operator: called with each operator.
        ready: called with their device right behind the copies of a layer; marks the moment on its current stream.
        causality: test of whether a layer's call is causal, made once for each layer. Without it the call that is read
            has to show it.
        runs_flex: whether a model with flex attention may run as it is written, not compiled. Otherwise its layers are
            skipped.
        clock: measures the seconds that the hooks add to the training step (`capture_seconds`).
        reduce: returns what is measured of a recurrence on the host that is too long to be held. Without it, and on an
            accelerator, only a part is taken.
        modulation: which tokens are separators, where that is to be known.
    """

    def __init__(
        self,
        layers: tuple[Layer, ...],
        config: CaptureConfig,
        *,
        model: nn.Module | None = None,
        off: Container[str] = (),
        share: Callable[[], float | None] = lambda: 1.0,
        turns: Turns | None = None,
        on_operator: Callable[[Captured], Any] | None = None,
        ready: Callable[[torch.device], Any] | None = None,
        causality: Test | None = None,
        runs_flex: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        reduce: Callable[[Operator], Operator] | None = None,
        modulation: ModulationConfig | None = None,
    ) -> None:
        self.layers = validation.several("layers", layers, Layer, hint="find_layers(model)")
        self.config = validation.instance("config", config, CaptureConfig)
        self._model = validation.optional("model", model, nn.Module)
        for name, function in (("share", share), ("clock", clock)):
            validation.function(name, function)
        self.capture_seconds = 0.0
        self.asked: tuple[str, ...] = ()
        """Names of the layers that the current sample, or the last one, was armed for."""
        self.share = 1.0
        """The share of this sample."""
        self.turn = 0
        """Number of samples so far. It decides which heads come next."""
        self.paused = False
        """While the loop evaluates: no pass is taken for one that trains, whatever gradients it computes."""
        self._armed = False
        self._takes_any = False
        self._forget: Callable[[], None] | None = None
        self._off, self._next_share = off, share
        self._turns: Turns = EveryLayer() if turns is None else turns
        self._deferred: tuple[Layer, ...] = ()
        self._on_operator, self._reduce = on_operator, reduce
        self._ready = (lambda device: None) if ready is None else ready
        self._tests = LayerTests(causality, model, clock, self._ready)
        self._clock, self._runs_flex = clock, validation.flag("runs_flex", runs_flex)
        self._hooks: list[HookHandle] = []
        self._modulation = validation.optional("modulation", modulation, ModulationConfig)
        self._tokens = TokenWatch(() if modulation is None else modulation.separators)
        self._eager = EagerStance()
        self._training = TrainingPass[Taken]((), None)
        self._first: dict[str, Candidate[Taken]] = {}
        """Layer name -> its first call, where any forward pass is taken."""
        self._failures: dict[str, CaptureFailure] = {}
        """Layers that could not be watched or followed at all."""
        self._checked: set[str] = set()
        """Names of the taught layers that were compared with their output."""
        self._called: set[str] = set()
        """Names of the layers whose forward was called."""
        self._untrained: set[str] = set()
        """Names of the layers that were read, or could have been, in a pass of which it is not known that it trains."""
        self._ignored: dict[str, Ignored] = {}
        """Layer name -> why its last call that was not read was not."""

    @property
    def armed(self) -> bool:
        """True between `arm` and `collect`."""
        return self._armed

    @property
    def test_seconds(self) -> float:
        """Seconds that the tests of layers took in this sample, or in the last one."""
        return self._tests.seconds

    def arm(self, *, any_pass: bool = False) -> None:
        """Attach the hooks for the next forward pass.

        Args:
            any_pass: take the first forward pass, whether it trains or not. A second call, while the sampler is armed,
                can only set this.
        """
        takes_any = self.config.source != "train" or validation.flag("any_pass", any_pass)
        self._takes_any = takes_any or (self._armed and self._takes_any)
        if self._armed:
            return
        self._clear()
        self.capture_seconds = 0.0
        share = self._next_share()
        able = () if share is None else tuple(layer for layer in self.layers if layer.name not in self._off)
        chosen = self._turns.choose([layer.name for layer in able])
        layers = tuple(layer for layer in able if layer.name in chosen)
        self._deferred = tuple(layer for layer in able if layer.name not in chosen)
        self.asked, self.share = tuple(layer.name for layer in layers), share or 0.0
        if layers and not self._runs_flex and self._model is not None and runs_flex_attention(self._model):
            self._ignored = {layer.name: Ignored("skipped", FLEX) for layer in layers}
            layers = ()
        if layers:
            self._eager.begin()
        self._armed = True
        if layers and self._model is not None:
            self._forget = when_raised(self._model, self._abort)
        if layers:
            self._hooks.append(self._tokens.watch(self._model, [layer.module for layer in layers]))
        if layers and self.config.source == "train":
            self._training = TrainingPass((layer.module for layer in layers), self._model)
            self._training.attach()
        for layer in layers:
            try:
                note = ModuleHook(partial(self._note_call, layer))
                handle = HookHandle()
                handle.add(layer.module.register_forward_pre_hook(note).remove)
                self._hooks.append(handle)
                self._hooks.append(layer.spec.site.watch(layer.module, after=partial(self._on_call, layer)))
            except Exception as error:
                self._failures[layer.name] = failure(layer, error)
        self._hooks.append(self._tests.attach(layers))

    def collect(self) -> tuple[Captured | CaptureFailure, ...]:
        """Remove the hooks and return the results of the forward pass, in model order."""
        found = self._found()
        self.remove()
        if found:
            found |= {layer.name: CaptureFailure(layer, DEFERRED, status="deferred") for layer in self._deferred}
            self._turns.defer([name for name, item in found.items() if is_deferred(item)])
            self.turn += 1
        results = tuple(found[layer.name] for layer in self.layers if layer.name in found)
        self._clear()
        return results

    def unread(self) -> tuple[CaptureFailure, ...]:
        """Return why layers that the last sample asked for gave nothing, in model order; call it before `collect`."""
        names = set(self.asked) - self._found().keys()
        return tuple(self._unread(layer) for layer in self.layers if layer.name in names)

    def _found(self) -> dict[str, Taken]:
        first = {name: candidate.result for name, candidate in self._first.items()}
        found = {**self._failures, **self._training.found, **first}
        return {name: proven(item) for name, item in found.items()}

    def _unread(self, layer: Layer) -> CaptureFailure:
        if layer.name in self._untrained:
            return CaptureFailure(layer, UNTRAINED, was_called=False)
        ignored = self._ignored.get(layer.name)
        if ignored is not None:
            return CaptureFailure(layer, ignored.reason, status=ignored.status)
        was_called = layer.name in self._called
        return CaptureFailure(layer, why_not_seen(layer.spec.site, was_called=was_called), was_called=was_called)

    def remove(self) -> None:
        """Remove the hooks."""
        self._armed = False
        self._eager.end()
        self._training.close()
        self._tests.forget()
        while self._hooks:
            self._hooks.pop().remove()
        if self._forget is not None:
            self._forget()
            self._forget = None

    def _clear(self) -> None:
        for held in (self._first, self._failures, self._called, self._untrained, self._ignored):
            held.clear()

    def _abort(self) -> None:
        logger.debug("ess_monitor: the forward pass raised, and its sample is lost")
        self.remove()
        self._clear()

    @property
    def _cannot_train(self) -> bool:
        """Whether a pass that runs now is none that is looked for."""
        return not self._takes_any and (self.paused or not torch.is_grad_enabled())

    def _note_call(self, layer: Layer, *call: object) -> None:
        if not self._cannot_train:
            self._called.add(layer.name)

    def _on_call(self, layer: Layer, call: Call) -> None:
        if self._tests.running:
            return
        if self._cannot_train:
            self._untrained.add(layer.name)
            return
        started = self._clock()
        try:
            if is_recorded(_device_type(call)):
                self._ignored[layer.name] = Ignored("skipped", RECORDED)
                return
            earlier = self._first.get(layer.name) or self._training.latest(layer.name)
            if earlier is not None and self._is_second_call(layer, call, earlier):
                earlier.result = failure(layer, CaptureError(SEVERAL_CALLS))
            elif self._takes_any:
                if layer.name not in self._first and (candidate := self._candidate(layer, call)) is not None:
                    self._first[layer.name] = candidate
            elif self._training.wants(layer.name) and (candidate := self._candidate(layer, call)) is not None:
                if is_transformed():  # its tensors take no hooks
                    raise CaptureError(TRANSFORMED)
                self._untrained.add(layer.name)
                self._training.add(candidate, layer.module, call.output)
        except Exception as error:
            self._failures[layer.name] = failure(layer, error)
        self.capture_seconds += self._clock() - started

    def _is_second_call(self, layer: Layer, call: Call, earlier: Candidate[Taken]) -> bool:
        """Return whether a layer calls its op again after the captured call, so that its y is not that call's T u.

        Not a second call: one in another forward call of the layer (it is shared, or a checkpoint recomputes it), the
        end of an op that made the captured call, and a call that is not the one meant.
        """
        if not isinstance(earlier.result, Captured) or not call.forward_number:
            return False
        if call.forward_number != earlier.forward_number or call.start_number < earlier.end_number:
            return False
        with torch.no_grad(), torch.autocast(_device_type(call), enabled=False):
            return layer.spec.build(call) is not None

    def _candidate(self, layer: Layer, call: Call) -> Candidate[Taken] | None:
        """Read a call; None for one that is not the one meant."""
        try:
            result = self._take(layer, call)
        except Exception as error:
            result = failure(layer, error)
        if result is None:
            return None
        candidate = Candidate(layer.name, result, call.forward_number, call.end_number)
        if isinstance(result, Captured) and self._tests.known(layer) is None:
            self._tests.expect(layer, candidate, result.length, unproven=bool(result.unproven))
        return candidate

    def _take(self, layer: Layer, call: Call) -> Taken | None:
        if tokens_are_spread():
            raise CaptureError(SPREAD)
        if is_transformed():
            raise CaptureError(TRANSFORMED)
        with collecting() as claims, torch.no_grad(), torch.autocast(_device_type(call), enabled=False):
            whole = layer.spec.build(call)
            if whole is None:
                if call.output is not None:  # None: a placeholder of a fused op
                    self._ignored[layer.name] = why_ignored(call)
                return None
            turn, fit = self._turns.turn_of(layer.name, self.turn), partial(self._fit, layer, whole)
            part = part_of(whole, self.config, self.share, turn, can_reduce=self._reduce is not None, fit=fit)
            if part is None:
                return CaptureFailure(layer, DEFERRED, status="deferred")
            operator = self._copied(call, whole, part)
            separators, unknown = self._separators(call, whole, operator, part)
            if layer.spec.is_taught and layer.name not in self._checked:
                self._checked.add(layer.name)
                log_misfit(layer, whole, call)
        known = self._tests.known(layer)
        captured = Captured(
            layer,
            operator,
            part.heads,
            whole.heads,
            self._tokens.calls,
            whole.length,
            part.window,
            (*claims.pending, *(claim for claim in known or () if claim.holds.device == operator.device)),
            claims.unproven if known is None else "",
            (self._ready(operator.device),),
            part.shape,
            part.left_out,
            separators,
            unknown,
        )
        if self._on_operator is not None:
            self._on_operator(captured)
        return captured

    def _fit(self, layer: Layer, whole: Operator | LazyOperator, size: Size, window: int | None) -> SampleShape | None:
        kind, state = kind_of(whole, layer.spec, layer.module)
        more = 0 if self._modulation is None else self._modulation.positions
        return self._turns.fit(layer.name, SampleShape(kind, state, *size, self._turns.positions, window, more))

    def _separators(
        self, call: Call, whole: Operator | LazyOperator, operator: Operator, part: Part
    ) -> tuple[torch.Tensor | None, str]:
        """Return which tokens of an operator are separators; None where that is not asked for, or why not."""
        if self._modulation is None:
            return None, ""
        if isinstance(operator, ReducedRecurrence):
            return None, "the sequence is too long to be held; set capture.max_length"
        if isinstance(operator, JacobianOperator):
            return None, "a layer that is linearized takes too long at so many positions"
        if part.shape is not None and not part.shape.modulation:
            return None, "it takes longer than runtime.sample_seconds"
        return self._tokens.separators(call, whole, part.samples, operator.length)

    def _copied(self, call: Call, whole: Operator | LazyOperator, part: Part) -> Operator:
        """Return a copy of a part of an operator, or of what is measured of it, where the part is too large."""
        select = partial(self._tokens.select, call, whole, part.samples, part.heads, most=self.config.samples)
        few = select(part.length)
        if part.fits is not None and self._reduce is not None:
            few = self._reduce(few) if few.device.type == "cpu" else select(part.fits)
        return few.map(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format))


def _device_type(call: Call) -> str:
    values = (*call.args, *call.kwargs.values(), call.output)
    return next((value.device.type for value in values if isinstance(value, torch.Tensor)), "cpu")
