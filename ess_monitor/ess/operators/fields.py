"""Small helpers on the tensor fields of operators: checks, broadcasting, narrowing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import index_tensor


def check_floating(name: str, tensor: Tensor, expected: str, dimensions: int) -> None:
    """Raise `OperatorError` unless `tensor` is a real floating tensor with that many dimensions, none of them empty."""
    if not isinstance(tensor, Tensor):
        raise OperatorError(f"{name} is {validation.shown(tensor)}; pass a floating tensor of shape {expected}.")
    if not tensor.is_floating_point():
        raise OperatorError(f"{name} has dtype {tensor.dtype}; pass a real floating tensor of shape {expected}.")
    if tensor.dim() != dimensions or 0 in tensor.shape:
        raise OperatorError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} with no empty dimension.")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise `OperatorError` unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise OperatorError(f"Tensors are on different devices ({places}); move them to one device.")


def common_size(dimension: str, **sizes: int) -> int:
    """The size that all of `sizes` broadcast to (each is that size or 1)."""
    common = max(sizes.values())
    for name, size in sizes.items():
        if size not in (1, common):
            given = ", ".join(f"{other}={value}" for other, value in sizes.items())
            raise OperatorError(
                f"{name} has {size} {dimension}, expected 1 or {common} ({given}); they must broadcast."
            )
    return common


def take(tensor: Tensor, dimension: int, indices: Sequence[int] | None) -> Tensor:
    """`tensor` at `indices` of one dimension; a broadcast dimension stays. A view for evenly spaced indices."""
    if indices is None or tensor.shape[dimension] == 1:
        return tensor
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and list(indices) == list(range(indices[0], indices[-1] + 1, step)):
        return tensor[(slice(None),) * dimension + (slice(indices[0], indices[-1] + 1, step),)]
    return tensor.index_select(dimension, index_tensor(indices, tensor.device))


def first(tensor: Tensor, dimension: int, length: int | None) -> Tensor:
    """The first `length` entries of one dimension, as a view; a shorter or broadcast dimension stays."""
    if length is None or tensor.shape[dimension] <= length:
        return tensor
    return tensor.narrow(dimension, 0, length)


def all_finite(tensor: Tensor) -> Tensor:
    """(batch, heads) bool: whether everything behind the two leading dimensions is finite."""
    return torch.isfinite(tensor).flatten(2).all(-1)


def pairs(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """(batch|1, heads|1, ...) -> (batch * heads, ...): one entry for every (sample, head)."""
    return tensor.expand(batch, heads, *tensor.shape[2:]).reshape(batch * heads, *tensor.shape[2:])


def per_head(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """(batch * heads, ...) -> (batch, heads, ...): the way back from `pairs`."""
    return tensor.reshape(batch, heads, *tensor.shape[1:])
