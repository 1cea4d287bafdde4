"""Checks, broadcasts and narrows the tensor fields of operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.linalg import index_tensor

Tokens = slice | Tensor
"""Neighboring tokens: a slice, or their ascending indices on the device where the host does not know them. The last may
be repeated."""


def check_floating(name: str, tensor: Tensor, expected: str, dimensions: int) -> None:
    """Raise `OperatorError` unless `tensor` is a real floating tensor with that many dimensions, none of them empty."""
    validation.tensor(name, tensor, expected, (dimensions,), error=OperatorError)
    if 0 in tensor.shape:
        raise OperatorError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} with no empty dimension.")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise `OperatorError` unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise OperatorError(f"Tensors are on different devices ({places}); move them to one device.")


def check_broadcast(dimension: str, **sizes: int) -> None:
    """Raise `OperatorError` unless each of `sizes` is 1 or the largest of them."""
    common = max(sizes.values())
    for name, size in sizes.items():
        if size not in (1, common):
            given = ", ".join(f"{other}={value}" for other, value in sizes.items())
            raise OperatorError(
                f"{name} has {size} {dimension}, expected 1 or {common} ({given}); they must broadcast."
            )


def check_batch_and_heads(**tensors: Tensor) -> None:
    """Raise `OperatorError` unless the two leading dimensions broadcast."""
    for index, dimension in enumerate(("samples", "heads")):
        check_broadcast(dimension, **{name: tensor.shape[index] for name, tensor in tensors.items()})


def take(tensor: Tensor, dimension: int, indices: Sequence[int] | None) -> Tensor:
    """Return `tensor` at `indices` of one dimension; a broadcast dimension stays. A view for evenly spaced indices."""
    if indices is None or tensor.shape[dimension] == 1:
        return tensor
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and list(indices) == list(range(indices[0], indices[-1] + 1, step)):
        return tensor[(slice(None),) * dimension + (slice(indices[0], indices[-1] + 1, step),)]
    return tensor.index_select(dimension, index_tensor(indices, tensor.device))


def first(tensor: Tensor, dimension: int, length: int | None) -> Tensor:
    """Return the first `length` entries of one dimension, as a view; a shorter or broadcast dimension stays."""
    if length is None or tensor.shape[dimension] <= length:
        return tensor
    return tensor.narrow(dimension, 0, length)


def window(tensor: Tensor, dimension: int, tokens: Tokens | None) -> Tensor:
    """Return the entries of some neighboring tokens in one dimension, of a slice as a view; a broadcast dimension
    stays."""
    if tokens is None or tensor.shape[dimension] == 1:
        return tensor
    if isinstance(tokens, Tensor):
        return tensor.index_select(dimension, tokens)
    return tensor.narrow(dimension, tokens.start, tokens.stop - tokens.start)


def count(tokens: Tokens) -> int:
    """Return how many tokens these are."""
    return len(tokens) if isinstance(tokens, Tensor) else tokens.stop - tokens.start


def narrowed(
    tensor: Tensor, samples: Sequence[int] | None, heads: Sequence[int] | None, tokens: Tokens | None
) -> Tensor:
    """Return some samples (dimension 0) and heads (1), and some neighboring tokens (2)."""
    return window(take(take(tensor, 0, samples), 1, heads), 2, tokens)


def all_finite(tensor: Tensor, *, allows_minus_infinity: bool = False) -> Tensor:
    """Return (batch, heads) bool: whether all entries of the trailing dimensions are finite, or -inf where allowed."""
    trailing = tuple(range(2, tensor.dim()))
    below = tensor.amax(trailing) < math.inf  # False for NaN
    return below if allows_minus_infinity else below & (tensor.amin(trailing) > -math.inf)


def pairs(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """Return one entry per (sample, head): (batch|1, heads|1, ...) -> (batch * heads, ...)."""
    return tensor.expand(batch, heads, *tensor.shape[2:]).reshape(batch * heads, *tensor.shape[2:])


def per_head(tensor: Tensor, batch: int, heads: int) -> Tensor:
    """Undo `pairs`: (batch * heads, ...) -> (batch, heads, ...)."""
    return tensor.reshape(batch, heads, *tensor.shape[1:])


def check_state_size(state_size: int | None) -> None:
    """Raise `OperatorError` unless this is a number of dimensions, or None for one that is not known."""
    if state_size is not None:
        validation.whole("state_size", state_size, 1, hint="None where it is not known", error=OperatorError)


def selected(name: str, selection: slice | Sequence[int] | None, size: int) -> Sequence[int] | None:
    """Return the indices that are selected, None for all; raise `OperatorError` unless they are some, each once."""
    if selection is None:
        return None
    chosen: Sequence[int]
    if isinstance(selection, slice):
        try:
            chosen = range(size)[selection]
        except (TypeError, ValueError):  # a start that is not a number, or a step of 0
            raise OperatorError(f"{name}={validation.shown(selection)} must be a slice of whole numbers.") from None
    else:
        chosen = validation.wholes(name, selection, -validation.LARGEST, error=OperatorError)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= size:
        raise OperatorError(
            f"{name}={validation.shown(selection)} must name different indices in 0..{size - 1}, at least one."
        )
    return chosen
