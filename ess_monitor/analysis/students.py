"""Trains students of a layer: the same class with a smaller state, first on its operator, then on its outputs (C.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ess_monitor.analysis.layer_operators import NotAnalyzed
from ess_monitor.analysis.smaller_model import (
    SmallerState,
    projection_of,
    recurrences_of,
    require_own_weights,
    smaller_layer,
    state_weights,
)
from ess_monitor.capture import Captured, Layer, find_layers
from ess_monitor.capture.handles import StateWeights
from ess_monitor.capture.hooks.call_site import Call, HookHandle, ModuleHook, tensors_in
from ess_monitor.capture.layers import evaluating
from ess_monitor.capture.rotation import rotate_rows
from ess_monitor.capture.spec import CaptureSpec, LazyOperator
from ess_monitor.errors import format_error
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.realization.matrix import differentiable_matrix
from ess_monitor.validation.settings import Settings


class StudentTraining(Settings):
    """Says how long students are trained. The best weights of each of the two steps are kept.

    Examples:
        >>> StudentTraining(operator_steps=0).activation_steps
        100
    """

    operator_steps: int = Field(default=50, ge=0, le=1_000_000)
    """Steps on the operator, ||T_s - T_t||_F^2 / ||T_t||_F^2. A student that is begun from a reduction of its teacher
    gains little from more; the paper takes 800 from random weights."""
    activation_steps: int = Field(default=100, ge=0, le=1_000_000)
    """Steps on the layer's outputs, ||y_s - y_t||^2 / ||y_t||^2; 3200 in the paper."""
    learning_rate: float = Field(default=5e-3, gt=0, le=1)
    """Of Adam, falling to 0 over each of the two steps. The paper's 1e-3 is for twenty times as many."""


OnStudent = Callable[[str, int, nn.Module], object]
"""Called with the name of a layer, a state size and the trained student, a layer in eval mode that can stand in its
place."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """The first call of a layer in a forward pass. Its tensors are copies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def recorded_calls(
    model: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any], layers: Sequence[Layer]
) -> dict[str, LayerCall]:
    """Run a model once in eval mode, without gradients, and return the first call of each layer, by name."""
    calls: dict[str, LayerCall] = {}
    handle = HookHandle()

    def record(name: str) -> ModuleHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in calls:
                calls[name] = LayerCall(*(_copied(each) for each in (args, kwargs, output)))

        return ModuleHook(hook)

    try:
        for layer in layers:
            handle.add(layer.module.register_forward_hook(record(layer.name), with_kwargs=True).remove)
        with evaluating(model):
            model(*inputs, **named_inputs)
    finally:
        handle.remove()
    return calls


def train_students(
    captured: Captured,
    call: LayerCall | None,
    sizes: Sequence[int],
    trial: StudentTraining,
    on_student: OnStudent | None = None,
) -> dict[int, tuple[float, float]]:
    """Train a student of each size, and return what is left of the losses of its operator and of its outputs.

    A student begins with the weights that `reduce` cuts out of the layer. Its operator is that of the samples, heads
    and tokens in `captured`; its outputs are those of the whole call. With the layer's own state there is nothing to
    lose, and a layer without a state there is not.

    Raises:
        NotAnalyzed: the layer has no students, with the reason.
    """
    weights = state_weights(captured.layer)
    if isinstance(weights, str):
        raise NotAnalyzed("skipped", weights)
    require_own_weights(captured.layer.module, captured.layer.module, weights)
    segments = captured.operator.segments
    is_whole = segments is None or bool(((segments == segments[..., :1]) & (segments >= 0)).all())
    if call is None or not is_whole:
        raise NotAnalyzed("skipped", "it was not called once with whole sequences, without padding")
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return _trained(captured, call, weights, sizes, trial, on_student)
        except NotAnalyzed:
            raise
        except Exception as error:
            raise NotAnalyzed("failed", format_error(error)) from error


def _trained(
    captured: Captured,
    call: LayerCall,
    weights: StateWeights,
    sizes: Sequence[int],
    trial: StudentTraining,
    on_student: OnStudent | None,
) -> dict[int, tuple[float, float]]:
    teacher = deepcopy(captured.layer.module).eval()
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in teacher.parameters()):
        teacher = teacher.float()
        call = LayerCall(_floated(call.args), _floated(call.kwargs), call.output)
    call = replace(call, args=_copied(call.args), kwargs=_copied(call.kwargs))
    with torch.no_grad():
        output, whole = _applied(teacher, _spec_of(teacher), call)
        T = differentiable_matrix(_part(whole, captured))
        said = next(tensors_in(call.output)).to(output)
        if not (_near(output, said) and _near(T, captured.operator.materialize().to(T))):
            raise NotAnalyzed("failed", "called again by itself, it does something else")
        operator = whole.select(samples=slice(whole.batch), heads=range(whole.heads), length=whole.length)
        parts = recurrences_of(operator.map(Tensor.cpu), weights)
    losses = {}
    for size in (size for size in sizes if size > 0):
        student, losses[size] = teacher, (0.0, 0.0)
        if size < weights.size:
            smaller = SmallerState(teacher, weights, projection_of(parts, weights, size), size)
            student = smaller_layer(smaller, captured.layer.name).requires_grad_(True)
            operator_loss = partial(_operator_loss, captured, student, _spec_of(student), call, T)
            output_loss = partial(_output_loss, student, call, output)
            losses[size] = (
                _minimized(operator_loss, student, trial.operator_steps, trial.learning_rate),
                _minimized(output_loss, student, trial.activation_steps, trial.learning_rate),
            )
        if on_student is not None:
            on_student(captured.layer.name, size, student)
    return losses


def _operator_loss(captured: Captured, student: nn.Module, spec: CaptureSpec, call: LayerCall, T: Tensor) -> Tensor:
    _, whole = _applied(student, spec, call)
    return _relative(differentiable_matrix(_part(whole, captured)), T)


def _output_loss(student: nn.Module, call: LayerCall, output: Tensor) -> Tensor:
    return _relative(next(tensors_in(student(*call.args, **call.kwargs))), output)


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    total = wanted.square().sum()
    return (found - wanted).square().sum() / total.clamp(min=torch.finfo(total.dtype).tiny)


def _minimized(loss: Callable[[], Tensor], student: nn.Module, steps: int, learning_rate: float) -> float:
    """Train the student, leave the best weights in it, and return their loss."""
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    best, kept = math.inf, {}
    for step in range(steps + 1):
        value = loss()
        reached = float(value.detach())
        if not math.isfinite(reached):
            break
        if reached < best:
            best, kept = reached, {name: each.detach().clone() for name, each in student.named_parameters()}
        if step == steps:
            break
        if not value.requires_grad:
            raise NotAnalyzed("skipped", "its code computes without gradients")
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if not kept:
        raise NotAnalyzed("nonfinite", "the loss of a student is not finite")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(kept[name])
    return best


def _spec_of(layer: nn.Module) -> CaptureSpec:
    """Return how this copy of a layer is read: ops may be looked up in the layer itself."""
    return next(found.spec for found in find_layers(layer) if found.module is layer)


def _applied(layer: nn.Module, spec: CaptureSpec, call: LayerCall) -> tuple[Tensor, Operator | LazyOperator]:
    """Run a layer, and return its output and its operator, with their graphs."""
    found: list[Operator | LazyOperator] = []

    def read(seen: Call) -> None:
        built = spec.build(seen)
        if built is not None:
            found.append(built)

    handle = spec.site.watch(layer, after=read)
    try:
        output = next(tensors_in(layer(*call.args, **call.kwargs)))
    finally:
        handle.remove()
    if not found:
        raise NotAnalyzed("failed", "called again by itself, it shows no operator")
    return output, found[0]


def _part(whole: Operator | LazyOperator, captured: Captured) -> DiagonalRecurrence:
    """Return the part of an operator that was captured."""
    few = captured.operator
    samples = rotate_rows(whole.batch, few.batch, 0)
    part = whole.select(samples=samples, heads=captured.heads, length=few.length)
    if not isinstance(part, DiagonalRecurrence):
        raise NotAnalyzed("skipped", f"of a {type(part).__name__} no T with gradients is known")
    return part


def _near(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= 1e-2 * wanted.norm())


def _floated(value: Any) -> Any:
    """Return the same with half precision raised to float32."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else _in_each(value, _floated)


def _copied(value: Any) -> Any:
    """Return a copy; None in the place of a cache, which knows of its earlier calls."""
    if "Cache" in type(value).__name__:
        return None
    return value.detach().clone() if isinstance(value, Tensor) else _in_each(value, _copied)


def _in_each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tuple, list or dictionary with each of its entries changed; others as they are."""
    if isinstance(value, dict):
        return {name: change(each) for name, each in value.items()}
    return type(value)(change(each) for each in value) if type(value) in (tuple, list) else value
