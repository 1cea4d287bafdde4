"""Trains a model that moves to a simulated second device and back. Runs in a process of its own.

    python -m tests.faults.second_device

Prints the outcome as JSON. Tensors of the device report `second:0`, and torch treats it as an accelerator. Their
operations run on the CPU with the same kernels, so that results can be compared bit by bit. As on a real device, an
operation cannot mix tensors of both devices.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from ess_monitor.runtime import HostBackend, StreamBackend
from tests.faults.harness import Outcome, batches, watch

SECOND = "second"
AWAY, BACK = 5, 9
"""Steps at which the model moves."""
_COPIES = ("aten::copy_", "aten::_to_copy")


class Elsewhere(torch.Tensor):
    """A tensor on the second device, which wraps a tensor on the CPU."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=f"{SECOND}:0",
        )
        made.host = host
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, torch.Tensor], *_: Any) -> Elsewhere:
        return Elsewhere(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Makes the second device available to this thread inside the block."""

    def __init__(self) -> None:
        _register()
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Backend:
    """The functions that torch calls on the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: the device uses the CPU's generator."""


@cache
def _register() -> None:
    """Register the device in torch for the rest of the process."""
    _setup_privateuseone_for_python_backend("second", backend_module=_Backend())


THREADS: set[str] = set()
"""Names of the threads that have computed on the second device."""


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    name = func._schema.name
    if there:
        THREADS.add(threading.current_thread().name)
    if there and name not in _COPIES and any(not isinstance(t, Elsewhere) and t.dim() for t in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == SECOND
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name == "aten::copy_":
        there = isinstance(args[0], Elsewhere)
    host_args, host_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.host, (args, kwargs))
    result = func(*host_args, **host_kwargs)
    if func._schema.is_mutable and isinstance(args[0], Elsewhere) and result is host_args[0]:
        return args[0]
    return tree_map_only(torch.Tensor, Elsewhere, result) if there else result


class SecondStreams:
    """The streams of the second device, which has come past everything when it is asked."""

    def __init__(self) -> None:
        self.samples = 0
        self.threads: set[str] = set()

    def now(self) -> SecondStreams:
        self.threads.add(threading.current_thread().name)
        return self

    def query(self) -> bool:
        self.threads.add(threading.current_thread().name)
        return True

    def copying(self, after: Sequence[Any]) -> AbstractContextManager[None]:
        self.samples += 1
        return nullcontext()

    def host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def copy(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, Elsewhere):
            raise RuntimeError("the second device was given tensors of the first")
        host.copy_(tensor)

    def is_capturing(self) -> bool:
        return False


def moved() -> Outcome:
    """Train a model that is on the second device for some steps."""
    streams = SecondStreams()
    backends = {"cpu": HostBackend(), SECOND: StreamBackend(streams)}

    def edit(step: int, model: nn.Module) -> None:
        if step in (AWAY, BACK):
            model.to(SECOND if step == AWAY else "cpu")

    def data() -> Iterator[torch.Tensor]:
        for step, tokens in enumerate(batches()):
            yield tokens.to(SECOND if AWAY <= step < BACK else "cpu")

    # SGD has no moments: moments that stay on the old device would be a fault of the loop.
    with SecondDevice():
        run = watch(
            edit=edit,
            data=data(),
            bare_data=data(),
            make_optimizer=torch.optim.SGD,
            backends=lambda device: backends[device.type],
        )
    return Outcome(
        run.unchanged,
        {
            "goes on, status ok": set(run.statuses) == {"ok"} and run.sink.steps == [0, 2, 4, 6, 8, 10],
            "samples 6 and 8 come from the second": streams.samples == 2,
            "the worker makes no call to it": not any("worker" in name for name in streams.threads | THREADS),
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asdict(moved())))
