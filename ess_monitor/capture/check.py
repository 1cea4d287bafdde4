"""Compare the operator that a function of `register_capture` returns with what its layer computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.layers import Layer, evaluating
from ess_monitor.capture.registry import find_spec
from ess_monitor.capture.spec import CaptureSpec, LazyOperator
from ess_monitor.errors import CaptureError
from ess_monitor.ess import Operator

logger = logging.getLogger("ess_monitor")

AGREES = 1e-3
"""Relative difference up to which T u is the layer's output: above the rounding of float32, below a wrong gate."""

_MOST_SAMPLES, _MOST_TOKENS, _MOST_FEATURES = 8, 256, 512
"""Sizes of a comparison."""


@dataclass(frozen=True)
class CaptureCheck:
    """How well T u agrees with a layer's output y."""

    difference: float | None
    """||T u - y|| / ||y||; None where the shapes do not allow a comparison."""
    problem: str = ""
    """What does not fit, and what to do; empty where all does."""
    compared: str = ""
    """What stood for u and y: `mixed` of `register_capture`, or input and output, perhaps up to a linear map."""

    @property
    def ok(self) -> bool:
        """True where T u is y."""
        return not self.problem

    def __str__(self) -> str:
        if self.problem:
            return f"does not fit: {self.problem}"
        return f"T u is the layer's output ({self.compared}); relative difference {self.difference:.1e}"


def check_capture(layer: nn.Module, *inputs: Any, **named_inputs: Any) -> CaptureCheck:
    """Compare the operator T of one forward call of a layer with its output: y = T u.

    Where `register_capture` was given `mixed`, that says what u and y are. Otherwise u is the layer's input and y its
    output, for each channel or each head. Where these differ, they are compared once more up to a linear map of every
    head's product, as a projection before or after the mixing would be. A norm, a gate or a nonlinearity behind the
    mixing is no linear map: such a layer needs `mixed`.

    Args:
        layer: an instance of a registered class.
        *inputs: arguments of its forward; take some sequences of random numbers, and more tokens than
            channels.
        **named_inputs: the same by name.

    Raises:
        CaptureError: no capture is known for the layer, or the function for it raised.

    Examples:
        >>> from ess_monitor import check_capture, register_capture
        >>> from ess_monitor.ess import Convolution
        >>> class Mean(nn.Module):
        ...     def forward(self, x):
        ...         return (x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]) / 2
        >>> @register_capture(Mean)
        ... def read_mean(layer, args, kwargs, output):
        ...     return Convolution(torch.tensor([[[0.5, 0.5]]]), output.shape[1])
        >>> check_capture(Mean(), torch.randn(2, 16, 4)).ok
        True
    """
    validation.instance("layer", layer, nn.Module, hint="an instance of a registered class", error=CaptureError)
    spec = find_spec(layer)
    if not isinstance(spec, CaptureSpec):
        cls = type(layer).__name__
        raise CaptureError(f"layer: {spec or f'no capture is known for {cls}'}; register {cls} with register_capture")
    checks: list[CaptureCheck] = []

    def after(call: Call) -> None:
        operator = None if checks else spec.build(call)
        if operator is not None:
            checks.append(check_call(spec, operator, call))

    handle = spec.site.watch(layer, after=after)
    try:
        with evaluating(layer):
            layer(*inputs, **named_inputs)
    finally:
        handle.remove()
    if not checks:
        return CaptureCheck(None, "no call was read: the sequence has one token, or its call was not made")
    return checks[0]


def check_call(spec: CaptureSpec, operator: Operator | LazyOperator, call: Call) -> CaptureCheck:
    """Compare the operator of one call with the input and output of that call, for a few sequences."""
    few = slice(0, min(operator.batch, _MOST_SAMPLES))
    narrowed = operator.select(samples=few, heads=range(operator.heads), length=operator.length)
    if spec.mixed is not None:
        u, y = (t if t.shape[0] == 1 else t[:_MOST_SAMPLES] for t in spec.mixed(call))
        return compare(narrowed, u, y, compared="u and y of `mixed`")
    given = (*call.args, *call.kwargs.values())
    x = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point()), None)
    y = call.output[0] if isinstance(call.output, tuple) else call.output
    return compare_layer(narrowed, x, y)


def log_misfit(layer: Layer, operator: Operator | LazyOperator, call: Call) -> None:
    """Log what does not fit between a registered layer's operator and its output.

    Not on an accelerator, which the host would wait for, and not where dropout changes the output.
    """
    output = call.output[0] if isinstance(call.output, tuple) else call.output
    drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in layer.module.modules())
    if drops or not isinstance(output, Tensor) or output.device.type != "cpu":
        return
    problem = check_call(layer.spec, operator, call).problem
    if problem:
        logger.warning(
            "ess_monitor: layer %s: the capture of %s does not fit: %s (check_capture compares it)",
            layer.name,
            type(layer.module).__name__,
            problem,
        )


def compare_layer(operator: Operator, x: Tensor | None, y: Any) -> CaptureCheck:
    """Compare T with a layer's input and output, (batch, length, channels) with the last two in any order."""
    if x is None or not isinstance(y, Tensor) or x.dim() != 3 or y.dim() != 3:
        return CaptureCheck(None, "the layer's input and output are not two tensors of three axes; give `mixed`")
    axes = [a for a in (1, 0, 2) if x.shape[a] == y.shape[a] == operator.length]
    if not axes:
        return CaptureCheck(
            None,
            f"the operator has {operator.length} tokens, and no axis of the layer's input {tuple(x.shape)} and output "
            f"{tuple(y.shape)} has as many; tensors of an operator are (batch, heads, length, state)",
        )
    checks = [_compare_on(operator, x.movedim(axis, 1), y.movedim(axis, 1)) for axis in axes]
    best = min(
        checks, key=lambda check: (bool(check.problem), math.inf if check.difference is None else check.difference)
    )
    if best.problem and axes[0] != 1:
        tokens = f"its input has {x.shape[1]} tokens on axis 1 and the operator {operator.length}"
        return CaptureCheck(best.difference, f"{tokens}: are the axes (batch, heads, length, state)? {best.problem}")
    return best


def compare(operator: Operator, u: Tensor, y: Tensor, *, compared: str) -> CaptureCheck:
    """Compare T u with y, both (batch, heads, length, channels)."""
    T = _materialized(operator)
    if u.shape[-2] != T.shape[-1] or y.shape[-2] != T.shape[-2]:
        return CaptureCheck(
            None,
            f"u is {tuple(u.shape)} and y {tuple(y.shape)}, and T {tuple(T.shape)}; u and y must be (batch, heads, "
            "length, channels)",
        )
    difference = _difference(T @ u.double(), y.double())
    return CaptureCheck(difference, _why_different(difference, "") if difference > AGREES else "", compared)


def _compare_on(operator: Operator, x: Tensor, y: Tensor) -> CaptureCheck:
    """Compare with tensors of (batch, length, channels)."""
    if operator.batch == _MOST_SAMPLES:
        x, y = x[:_MOST_SAMPLES], y[:_MOST_SAMPLES]
    if operator.batch not in (1, x.shape[0]):
        return CaptureCheck(
            None,
            f"the operator has {operator.batch} samples and the layer's input {x.shape[0]}; tensors of an operator are "
            "(batch, heads, length, state)",
        )
    length = min(operator.length, _MOST_TOKENS)
    T = _materialized(operator.select(length=length))
    x, y = x[:, :length].double(), y[:, :length].double()
    best: float | None = None
    for product in _direct(T, x, y):
        difference = _difference(product, y)
        best = difference if best is None else min(best, difference)
        if difference <= AGREES:
            return CaptureCheck(difference, compared="u is its input")
        scale = float((product * y).sum() / product.square().sum().clamp(min=torch.finfo(y.dtype).tiny))
        if _difference(scale * product, y) <= AGREES:
            problem = f"the layer's output is {scale:.3g} times T u: is a factor missing in b, c or the kernel?"
            return CaptureCheck(difference, problem)
    fitted = _fitted(T, x, y) if operator.block_size == 1 else None
    if fitted is not None and fitted <= AGREES:
        return CaptureCheck(fitted, compared="up to a linear map of each head's product")
    return CaptureCheck(best, _why_different(best, ": give register_capture `mixed`"))


def _why_different(difference: float | None, hint: str) -> str:
    size = "T u is not the layer's output, up to a linear map of each head's product"
    if difference is not None:
        size = f"T u differs from the layer's output (relative difference {difference:.2g})"
    return (
        f"{size}: is the log decay a logarithm, are gates exchanged, is the current token in T? Where the layer does "
        f"more than mixing (a gate, a norm), compare without it{hint}"
    )


def _direct(T: Tensor, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield T u for the ways in which channels can belong to heads: (batch, length, channels)."""
    width, heads, size = x.shape[2], T.shape[1], T.shape[-1] // x.shape[1]
    if y.shape != x.shape or width % heads or size not in (1, width // heads):
        return
    for head_first in (True, False):
        parts = x.reshape(*x.shape[:2], *((heads, -1) if head_first else (-1, heads)))
        u = parts.transpose(1, 2) if head_first else parts.permute(0, 3, 1, 2)  # (batch, heads, length, channels)
        product = T @ u if size == 1 else (T @ u.flatten(2)[..., None]).reshape(u.shape)
        yield (product.transpose(1, 2) if head_first else product.permute(0, 2, 3, 1)).flatten(2)


def _fitted(T: Tensor, x: Tensor, y: Tensor) -> float | None:
    """Return the smallest difference of y and a linear map of all T x and x; None where there are too few tokens."""
    x = torch.cat((x, torch.ones_like(x[..., :1])), 2)  # 1: for biases
    features = torch.cat(((T @ x[:, None]).transpose(1, 2).flatten(2), x), 2).flatten(0, 1)
    rows, columns = features.shape
    if columns > _MOST_FEATURES or rows < 1.5 * columns:
        return None
    target = y.flatten(0, 1)
    return _difference(features @ torch.linalg.lstsq(features, target, driver="gelsd").solution, target)


def _materialized(operator: Operator) -> Tensor:
    return operator.map(lambda t: t.double() if t.is_floating_point() else t).materialize()


def _difference(product: Tensor, y: Tensor) -> float:
    return float((product - y).norm() / y.norm().clamp(min=torch.finfo(y.dtype).tiny))
