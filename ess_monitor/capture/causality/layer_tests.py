"""Test each layer once in a run: does a later token change an earlier output of it?

What a call shows of its T says nothing of what the layer does around it, such as a flip of the sequence. A layer whose
call does not show even that (`unproven`) is tested through the innermost module around it that can be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ess_monitor.capture.causality.claims import Claim
from ess_monitor.capture.hooks.call_site import HookHandle, ModuleHook
from ess_monitor.capture.training_pass import Candidate, modules_around

if TYPE_CHECKING:
    from ess_monitor.capture.layers import Layer

logger = logging.getLogger("ess_monitor")

Test = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any, int], "Tensor | None"]
"""`(module, args, kwargs, output, length) -> one bool`: whether a call is causal; None where that cannot be told."""

_NOT_CAUSAL = (
    "a later token changes earlier outputs of {}, so that the state does not carry the past alone and ESS is not "
    "defined; leave the layer out with `layers`"
)


@dataclass(eq=False)
class _Waiting:
    """A call that was read, until a module around it ends."""

    layer: Layer
    candidate: Candidate[Any]
    length: int
    unproven: bool


class LayerTests:
    """Runs the test in the hooks of a sample.

    Args:
        test: the test; None for none.
        model: the model of the layers; without it only the layers themselves can be tested.
        clock: measures how long tests take.
        ready: called with the device of a test's outcome, to mark the moment behind it.
    """

    def __init__(
        self,
        test: Test | None,
        model: nn.Module | None,
        clock: Callable[[], float],
        ready: Callable[[torch.device], Any],
    ) -> None:
        self._test, self._model, self._clock, self._ready = test, model, clock, ready
        self.seconds = 0.0
        """How long the tests of this sample took."""
        self._claims: dict[str, tuple[Claim, ...]] = {}
        self._waiting: list[_Waiting] = []
        self.running = False
        """Whether a test runs: calls that it makes are to be ignored."""

    def known(self, layer: Layer) -> tuple[Claim, ...] | None:
        """Return what the test has shown of a layer; None before it."""
        return () if self._test is None else self._claims.get(layer.name)

    def attach(self, layers: Iterable[Layer]) -> HookHandle:
        """Add hooks for the layers that have not been tested. Their own come first."""
        handle = HookHandle()
        self.seconds = 0.0
        untested = [layer for layer in layers if layer.name not in self._claims]
        if self._test is None or not untested:
            return handle
        modules = [layer.module for layer in untested]
        around = () if self._model is None else modules_around(self._model, modules)
        for module in dict.fromkeys((*modules, *around)):
            handle.add(module.register_forward_hook(ModuleHook(self._end), with_kwargs=True).remove)
        return handle

    def expect(self, layer: Layer, candidate: Candidate[Any], length: int, *, unproven: bool) -> None:
        """Test a layer at the end of the call that runs, and put the outcome into what was read."""
        if self._test is not None:
            self._waiting.append(_Waiting(layer, candidate, length, unproven))

    def forget(self) -> None:
        """Drop the layers that wait for the test."""
        self._waiting.clear()

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.running or getattr(module, "_is_replica", False):
            return
        for waiting in tuple(self._waiting):
            is_layer = module is waiting.layer.module
            if is_layer != waiting.unproven and self._is_inside(waiting, module):
                self._try(waiting, module, (args, kwargs, output))

    def _is_inside(self, waiting: _Waiting, module: nn.Module) -> bool:
        return any(part is waiting.layer.module for part in module.modules())

    def _try(self, waiting: _Waiting, module: nn.Module, call: tuple[Any, ...]) -> None:
        assert self._test is not None
        holds, started = None, self._clock()
        args, kwargs, output = call
        self.running = True
        try:
            holds = self._test(module, args, kwargs, output, waiting.length)
        except Exception:
            logger.debug("ess_monitor: %s could not be run again", type(module).__name__, exc_info=True)
        finally:
            self.running = False
            self.seconds += self._clock() - started
        if holds is None and waiting.unproven:
            return  # a module farther out may tell
        self._waiting.remove(waiting)
        name = waiting.layer.name
        what = "the layer" if module is waiting.layer.module else f"{type(module).__name__}, which it is a part of"
        if holds is None or (holds.device.type == "cpu" and bool(holds)):
            self._claims[name] = ()
        else:
            self._claims[name] = (Claim(holds, _NOT_CAUSAL.format(what)),)
        result = waiting.candidate.result
        if hasattr(result, "claims"):
            ready = (*result.ready, *(self._ready(claim.holds.device) for claim in self._claims[name]))
            claims = (*result.claims, *self._claims[name])
            waiting.candidate.result = replace(result, claims=claims, unproven="", ready=ready)
