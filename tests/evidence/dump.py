"""Everything that a training can see of a model, as plain values that can be compared."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = {name for name in vars(nn.Module()) if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Path -> value: every attribute of every module, parameters and gradients, optimizer, generators.

    The second mention of an object is a reference to the first, so that what is shared is compared as well.
    """
    seen: dict[int, str] = {}
    found = dict(_described("model", model, seen))
    if optimizer is not None:
        found.update(_described("optimizer", optimizer.state_dict(), {}))
    found["torch"] = torch.get_rng_state().numpy().tobytes()
    found["python"] = random.getstate()
    found["numpy"] = repr(np.random.get_state())  # noqa: NPY002
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Paths at which they differ, also in their order."""
    paths = [path for path in {**one, **other} if path not in one or path not in other or one[path] != other[path]]
    return paths or ([] if list(one) == list(other) else ["order"])


def _described(path: str, value: Any, seen: dict[int, str]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, (int, float, str, bytes, bool, type(None))):
        if id(value) in seen:
            yield path, f"is {seen[id(value)]}"
            return
        seen[id(value)] = path
    if isinstance(value, nn.Module):
        for name, held in vars(value).items():
            if name in HOOKS:
                yield f"{path}.{name}", len(held)
            elif name != "_compiled_call_impl":
                yield from _described(f"{path}.{name}", held, seen)
    elif isinstance(value, Tensor):
        yield from _described_tensor(path, value, seen)
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from _described(f"{path}[{key!r}]", held, seen)
    elif isinstance(value, (list, tuple, deque)):
        yield f"{path} length", len(value)
        for number, held in enumerate(value):
            yield from _described(f"{path}[{number}]", held, seen)
    elif isinstance(value, (int, float, str, bytes, bool, type(None), set, torch.dtype, torch.device)):
        yield path, value
    elif isinstance(value, torch.Generator):
        yield path, value.get_state().numpy().tobytes()
    elif isinstance(value, random.Random):
        yield path, value.getstate()
    elif isinstance(value, np.random.Generator):
        yield path, repr(value.bit_generator.state)
    elif isinstance(value, np.random.RandomState):
        yield path, repr(value.get_state())
    elif isinstance(value, np.ndarray):
        yield path, (value.dtype, value.shape, value.tobytes())
    else:
        yield path, type(value).__name__


def _described_tensor(path: str, tensor: Tensor, seen: dict[int, str]) -> Iterator[tuple[str, Any]]:
    plain = getattr(tensor, "_local_tensor", tensor)
    content = plain.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()
    graph = tensor.grad_fn is None
    yield path, (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, graph, content)
    if tensor.is_leaf and tensor.grad is not None:
        yield from _described(f"{path}.grad", tensor.grad, seen)
