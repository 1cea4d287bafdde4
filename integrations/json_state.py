"""A state of plain values and tensors as JSON, bit for bit, and back. Reading it runs nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch

from ess_monitor.errors import CheckpointError

_TENSOR = "tensor:base64"


def to_json(value: Any) -> Any:
    """`value` with every tensor replaced by its bytes, dtype and shape.

    Example:
        >>> to_json({"step": 3, "tensor": torch.tensor([1.0])})
        {'step': 3, 'tensor': {'tensor:base64': 'AACAPw==', 'dtype': 'float32', 'shape': [1]}}
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16, and bytes have no dtype
        return {
            _TENSOR: base64.b64encode(raw).decode(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """What `to_json` was given; tuples come back as lists.

    Raises:
        CheckpointError: a tensor's bytes do not fit its dtype and shape, or the value is nested too deep.
    """
    try:
        return _from_json(value)
    except RecursionError:
        raise CheckpointError(
            "state: nested too deep to be a monitor's; the checkpoint is damaged, resume without the monitor's state"
        ) from None


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if _TENSOR in value:
            return _tensor(value)
        return {name: _from_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def _tensor(value: Mapping[str, Any]) -> torch.Tensor:
    try:
        dtype = getattr(torch, value["dtype"])
        raw = base64.b64decode(value[_TENSOR])
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    except Exception as error:
        raise CheckpointError(
            f"state: a tensor in it cannot be read ({type(error).__name__}: {error!s:.200}); the checkpoint is "
            "damaged, resume without the monitor's state"
        ) from error
