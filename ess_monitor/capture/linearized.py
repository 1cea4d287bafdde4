"""Call a layer that no reader knows again, alone and on a copy, so that it can be linearized (`JacobianOperator`).

The copy is made in the forward pass that is sampled. It is in eval mode, runs in float64 where its code does, and
shares no tensor with the model: what is computed with it later, on another thread too, is not seen by the training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ess_monitor.capture.hooks.call_site import Call, tensors_in
from ess_monitor.capture.spec import CaptureSpec, LazyOperator
from ess_monitor.errors import CaptureError
from ess_monitor.ess import JacobianOperator, Operator


class LayerAlone:
    """Maps (batch, length, D) to (batch, length, E) as a layer did in one call, with its other arguments as they were.

    Args:
        module: the layer; a copy is made.
        args, kwargs: of its call. The first floating tensor with two or three dimensions is the sequence, unbatched or
            (batch, length, D); (length, batch, D) for torch's recurrent layers without `batch_first`. The same tensor
            may be several arguments (query, key and value).
        dtype: to run in.

    Raises:
        CaptureError: the layer cannot be copied, or is called with no such tensor.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> None:
        arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        self._count = len(args)
        sequence = _sequence(module, arguments)
        self._places = [name for name, value in arguments.items() if value is sequence]  # query, key and value
        others = {name: _detached(value, dtype) for name, value in arguments.items() if name not in self._places}
        self._others = copy.deepcopy(others)
        self._is_unbatched = sequence.dim() == 2
        self._length_first = isinstance(module, nn.RNNBase) and not module.batch_first and not self._is_unbatched
        self.inputs = self._batch_first(sequence.detach()).to(dtype)
        self._module = _copied(module, dtype)

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._is_unbatched and len(inputs) != 1:
            return torch.cat([self(each[None]) for each in inputs])
        others = copy.deepcopy(self._others)  # a layer may write into a cache that it was given
        given = inputs[0] if self._is_unbatched else self._batch_first(inputs)
        arguments = {**others, **dict.fromkeys(self._places, given)}
        args = [arguments.pop(index) for index in range(self._count)]
        output = next(tensors_in(self._module(*args, **arguments)), None)
        if output is None:
            raise CaptureError("its output holds no tensor")
        return self._batch_first(output)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that a call reads, apart from its inputs."""
        held = [self._others, *map(vars, self._module.modules())]  # parameters and buffers among the latter
        return tuple({id(tensor): tensor for tensor in tensors_in(held)}.values())

    def with_tensors(self, new: Mapping[int, Tensor]) -> LayerAlone:
        """Return a copy that reads other tensors, given by the id of those in their place."""
        copied = copy.copy(self)
        copied._others, copied._module = copy.deepcopy((self._others, self._module), dict(new))
        del copied.inputs  # on the old device
        return copied

    def _batch_first(self, tensor: Tensor) -> Tensor:
        if self._is_unbatched and tensor.dim() == 2:
            return tensor[None]
        return tensor.transpose(0, 1) if self._length_first else tensor


def linearized(call: Call) -> LazyOperator:
    """Return the Jacobian of a layer's call, of which `select` makes the copy."""
    arguments: dict[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    sequence = _sequence(call.module, arguments)
    # Other tensors are of the samples and tokens of this call.
    is_indivisible = any(tensor is not sequence for tensor in tensors_in(list(arguments.values())))
    shape = (1, *sequence.shape) if sequence.dim() == 2 else tuple(sequence.shape)
    length_first = isinstance(call.module, nn.RNNBase) and not call.module.batch_first and sequence.dim() == 3
    batch, length = (shape[1], shape[0]) if length_first else shape[:2]
    running_alone = cache(partial(_running_alone, call))  # one copy, however many parts are selected

    def form(samples: slice, heads: Sequence[int], tokens: int) -> Operator:
        alone = running_alone()
        inputs = alone.inputs if is_indivisible else alone.inputs[samples, :tokens]
        return JacobianOperator(inputs[:, None], alone, is_divisible=not is_indivisible)

    return LazyOperator(batch, 1, length, form, is_indivisible=is_indivisible, state=shape[-1])


LINEARIZED = CaptureSpec(
    operator="JacobianOperator",
    build=linearized,
    capacity_grows=True,
    channels=lambda module: 1,
    uninformative="the rank of the Jacobian is of the layer linearized at one input, and has no TSS beside it",
)
"""How a layer is read that no reader knows, where this is asked for."""


def _running_alone(call: Call) -> LayerAlone:
    """Return the layer in the best dtype that it runs in, after one forward pass with the random numbers watched."""
    problem: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        alone = LayerAlone(call.module, call.args, call.kwargs, dtype)
        device = alone.inputs.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            before = _random_states(devices)
            try:
                alone(alone.inputs)
            except Exception as error:
                problem = problem or error
                continue
            if any(not torch.equal(*states) for states in zip(before, _random_states(devices), strict=True)):
                raise CaptureError(
                    "it draws random numbers in eval mode, too, which would change those of the training"
                )
        return alone
    raise CaptureError(f"a copy of it does not run alone: {type(problem).__name__}: {problem}") from problem


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _sequence(module: nn.Module, arguments: dict[Any, Any]) -> Tensor:
    for value in arguments.values():
        if isinstance(value, PackedSequence):
            raise CaptureError("it is called with a packed sequence; pass it padded")
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.dim() == 3 or (value.dim() == 2 and isinstance(module, nn.RNNBase)):
                return value
            raise CaptureError(
                f"its first input has shape {tuple(value.shape)}; a layer is linearized by inputs (batch, length, D)"
            )
    raise CaptureError("it is called without a floating tensor to linearize it by")


def _copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        if type(parameter).__name__ == "DTensor" or parameter.is_meta:
            raise CaptureError("its parameters are sharded or not in memory, so it cannot be copied")
    # What hooks compute from parameters (a weight norm) has a graph, and torch copies leaves only.
    computed = {
        id(value): value.detach().clone()
        for each in module.modules()
        for value in vars(each).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        copied = copy.deepcopy(module, computed)
    except Exception as error:
        raise CaptureError(f"it cannot be copied: {type(error).__name__}: {error}") from error
    copied = copied.to(dtype).requires_grad_(False).eval()
    for each in copied.modules():
        if isinstance(each, nn.RNNBase):  # the only mode with a backward pass on some devices; without dropout the same
            each.dropout = 0.0
            each.train()
    return copied


def _detached(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value.detach()
    if type(value) in (list, tuple):
        return type(value)(_detached(item, dtype) for item in value)
    if type(value) is dict:
        return {name: _detached(item, dtype) for name, item in value.items()}
    return value
