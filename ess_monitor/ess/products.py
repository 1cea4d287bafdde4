"""Computes products with the Jacobian of a causal function of sequences, and checks them before they are used.

J v by forward-mode differentiation, by differentiating the backward pass, or by central differences; J^T v by the
backward pass. Not every layer has all of these, and some derivatives are wrong (the forward mode of `logcumsumexp` in
torch 2.13), so that each is held against a central difference first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError, format_error

Function = Callable[[Tensor], Tensor]
"""(batch, length, D) -> (batch, length, E)."""

_ELEMENTS = 1 << 18
"""Elements of the inputs of one call."""
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""By how much outputs may differ that should be the same, as a share of their norm."""
_RIGHT = {torch.float64: 1e-3, torch.float32: 5e-2}
"""By how much a product may differ from a difference."""


class JacobianProducts:
    """Multiplies with J = d y / d u at one input, several vectors at a time where the function takes larger batches.

    Args:
        function: y = f(u), differentiable, causal, and without a connection between samples.
        inputs: (batch, length, D), float32 or float64.

    Raises:
        OperatorError: The outputs have another shape, depend on later inputs or other samples, or differ from call to
            call; or no way to multiply agrees with a difference. The message says which.

    Examples:
        >>> products = JacobianProducts(lambda u: u.cumsum(1), torch.ones(1, 3, 1, dtype=torch.float64))
        >>> products.forward(torch.ones(1, 1, 3, 1, dtype=torch.float64)).flatten().tolist(), products.method
        ([1.0, 2.0, 3.0], 'forward mode')
    """

    def __init__(self, function: Function, inputs: Tensor) -> None:
        self.count = 0
        """Products so far."""
        self._function, self._inputs = function, inputs.detach()
        self._precision = inputs.dtype if inputs.dtype in _SAME else torch.float32
        try:
            self.outputs = self._call(self._inputs)
        except Exception as error:
            raise OperatorError(f"it does not run on its inputs again: {format_error(error)}") from error
        """(batch, length, E)."""
        self._check_function()
        self._together = self._largest_batch()
        self.method, self._multiply = self._checked_method()
        """How J v is computed."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return J v: (k, batch, length, D) -> (k, batch, length, E)."""
        return torch.cat([self._multiply(part) for part in self._parts(vectors)])

    def backward(self, vectors: Tensor) -> Tensor:
        """Return J^T v: (k, batch, length, E) -> (k, batch, length, D)."""
        return torch.cat([self._transposed(part) for part in self._parts(vectors)])

    def _parts(self, vectors: Tensor) -> tuple[Tensor, ...]:
        self.count += vectors.shape[0]
        return torch.split(vectors, self._together)

    def _call(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self._function(inputs)

    def _repeated(self, count: int) -> Tensor:
        return self._inputs.repeat(count, 1, 1)

    def _forward_mode(self, vectors: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(self._repeated(len(vectors)), vectors.flatten(0, 1))  # type: ignore[no-untyped-call]
            tangent = forward_ad.unpack_dual(self._function(dual)).tangent  # type: ignore[no-untyped-call]
        return vectors.new_zeros((len(vectors), *self.outputs.shape)) if tangent is None else _split(tangent, vectors)

    def _double_backward(self, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = self._repeated(len(vectors)).requires_grad_()
            outputs = self._function(inputs)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            (gradient,) = torch.autograd.grad(outputs, inputs, dummy, create_graph=True)
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                gradient, dummy, vectors.flatten(0, 1), allow_unused=True
            )
        if found[0] is None:
            raise OperatorError("its backward pass has no derivative, as that of a once-differentiable function")
        return _split(found[0], vectors)

    def _differences(self, vectors: Tensor) -> Tensor:
        inputs, along = self._repeated(len(vectors)), vectors.flatten(0, 1)
        # The step that balances rounding with the third derivative, relative to the size of inputs and vectors.
        step = torch.finfo(inputs.dtype).eps ** (1 / 3) * _rms(inputs) / _rms(along)
        product = (self._call(inputs + step * along) - self._call(inputs - step * along)) / (2 * step)
        return _split(product, vectors)

    def _transposed(self, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = self._repeated(len(vectors)).requires_grad_()
            (product,) = torch.autograd.grad(self._function(inputs), inputs, vectors.flatten(0, 1))
        return _split(product.detach(), vectors)

    def _check_function(self) -> None:
        inputs, outputs = self._inputs, self.outputs
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            raise OperatorError(f"its output is {validation.shown(outputs)}, expected a floating tensor")
        if outputs.dim() != 3 or outputs.shape[:2] != inputs.shape[:2]:
            raise OperatorError(
                f"its input has shape {tuple(inputs.shape)} and its output {tuple(outputs.shape)}; "
                "expected (batch, length, channels) of the same batch and length."
            )
        if not bool(outputs.isfinite().all()):
            raise OperatorError("its outputs are not finite at these inputs")
        if not self._same(self._call(inputs), outputs):
            raise OperatorError("its outputs differ from call to call for the same inputs")
        middle = inputs.shape[1] // 2
        later = inputs.clone()
        later[:, middle:] += _rms(inputs)
        if not self._same(self._call(later)[:, :middle], outputs[:, :middle]):
            raise OperatorError(f"it is not causal: the outputs before token {middle} depend on inputs from there on")
        if len(inputs) > 1:
            other = inputs.clone()
            other[0] += _rms(inputs)
            if not self._same(self._call(other)[1:], outputs[1:]):
                raise OperatorError("the outputs of a sequence depend on the other sequences of the batch")

    def _same(self, one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and bool((one - other).norm() <= _SAME[self._precision] * self.outputs.norm())

    def _largest_batch(self) -> int:
        """Return how many copies of the batch the function takes at once."""
        count = max(1, min(16, _ELEMENTS // self._inputs.numel()))
        try:
            repeated = self._call(self._repeated(count))
        except Exception:  # other arguments of the function are for its own batch
            return 1
        return count if self._same(repeated[-len(self._inputs) :], self.outputs) else 1

    def _checked_method(self) -> tuple[str, Callable[[Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(1)

        def vector(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)[None]

        along, across = vector(self._inputs), vector(self.outputs)
        difference, right = self._differences(along), _RIGHT[self._precision]
        self.count += 2
        try:
            transposed = self._transposed(across)
        except Exception as error:
            raise OperatorError(f"its backward pass cannot be used: {format_error(error)}") from error
        gap = ((across * difference).sum() - (transposed * along).sum()).abs()
        if not bool(gap <= right * across.norm() * difference.norm()):
            raise OperatorError("its backward pass does not agree with a difference of its outputs")
        problems = []
        ways = {"forward mode": self._forward_mode, "double backward": self._double_backward}
        for name, way in ways.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of slow paths
                    product = way(along)
            except Exception as error:
                problems.append(f"{name}: {format_error(error)}")
                continue
            if bool((product - difference).norm() <= right * difference.norm()):
                return name, way
            ratio = float(product.norm() / difference.norm())
            problems.append(f"{name}: {ratio:.3g} times what a difference gives")
        if self._precision != torch.float64:
            raise OperatorError(
                "it does not run in float64, and in float32 no derivative of its outputs can be computed: "
                + "; ".join(problems)
            )
        return "differences", self._differences


def _split(product: Tensor, vectors: Tensor) -> Tensor:
    return product.reshape(*vectors.shape[:2], *product.shape[1:])


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt().clamp(min=torch.finfo(tensor.dtype).tiny ** 0.25)
