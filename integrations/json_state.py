"""Converts a state of plain values and tensors to JSON and back, bit for bit. Reading it runs no code."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ess_monitor.errors import CheckpointError, format_error

_LOG = logging.getLogger("ess_monitor")
_TENSOR = "tensor:base64"


def checkpoint_state(state_dict: Callable[[], dict[str, Any]]) -> Any:
    """Return a state for JSON; None, with a warning, where that fails: the checkpoint must still be written.

    Args:
        state_dict: returns the state.
    """
    try:
        exported = to_json(state_dict())
        json.dumps(exported)
    except Exception as error:
        _LOG.warning("the monitor's state is not in this checkpoint: %s", format_error(error))
        return None
    return exported


def to_json(value: Any) -> Any:
    """Return `value` with every tensor replaced by its bytes, dtype and shape.

    Examples:
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
    """Return what `to_json` was given; tuples come back as lists.

    Raises:
        CheckpointError: a tensor's bytes do not fit its dtype and shape, or the value is nested too deeply.
    """
    try:
        return _decode(value)
    except RecursionError:
        why = "it is nested too deeply"
    except Exception as error:
        why = f"{format_error(error):.200}"
    raise CheckpointError(
        f"state: cannot be read ({why}); the checkpoint is damaged, resume without the monitor's state"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if _TENSOR not in value:
        return {name: _decode(item) for name, item in value.items()}
    dtype = getattr(torch, value["dtype"])
    raw = base64.b64decode(value[_TENSOR])
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(value["shape"])
