"""Imports mamba_ssm without its compiled extensions, so that its own layers call its own reference ops.

`import mamba_ssm` fails without `selective_scan_cuda`, and its layers call CUDA and Triton kernels. This module imports
the package's modules with an empty extension, and replaces the kernels in them by the reference functions of the
package (`selective_scan_ref`, `mamba_inner_ref`, `ssd_selective_scan`, `mamba_split_conv1d_scan_ref`, `rms_norm_ref`).
For other packages mamba_ssm must remain impossible to import. Therefore its modules are in `sys.modules` only during
the import and while its ops run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.layers.triton_interpreter import VARIABLE

_ROOTS = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda")
_INDIFFERENT = ("chunk_size", "checkpoint_lvl")
"""Arguments of kernels that affect only their speed."""
_LOCK = threading.RLock()
_private: dict[str, ModuleType] = {}

for _name in ("mamba_ssm", "triton"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(f"No module named {_name!r}", name=_name)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Compute causal_conv1d in plain torch: x (batch, channels, length), weight (channels, width)."""
    if seq_idx is not None:
        raise NotImplementedError("seq_idx: run the sequences of a pack one by one")
    width = weight.shape[1]
    y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]]
    return y if activation is None else F.silu(y)


@contextmanager
def visible() -> Iterator[None]:
    """Make `import mamba_ssm` find the modules of this file inside the block; restore `sys.modules` after it."""
    with _LOCK:
        before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _ROOTS}
        _swap(before, _private)
        try:
            yield
        finally:
            inside = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _ROOTS}
            _private.update(inside)
            _swap(inside, before)


def _swap(out: dict[str, ModuleType], into: dict[str, ModuleType]) -> None:
    for name in out:
        sys.modules.pop(name, None)
    sys.modules.update(into)


def _empty_modules() -> dict[str, ModuleType]:
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    package = ModuleType("mamba_ssm")  # without its __init__, which imports every layer and language model
    package.__path__ = list(spec.submodule_search_locations or ())
    conv, functions = ModuleType("causal_conv1d"), ModuleType("causal_conv1d.cpp_functions")
    conv.__path__ = []
    conv.causal_conv1d_fn, conv.causal_conv1d_update = causal_conv1d_fn, None  # type: ignore[attr-defined]
    for name in ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"):
        setattr(functions, name, None)
    return {
        "mamba_ssm": package,
        "causal_conv1d": conv,
        "causal_conv1d.cpp_functions": functions,
        "selective_scan_cuda": ModuleType("selective_scan_cuda"),
    }


def _under_the_signature_of(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return `reference` with the signature of `kernel`. Arguments that only the kernel supports are refused."""
    signature, known = inspect.signature(kernel), inspect.signature(reference).parameters

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name not in known and name not in _INDIFFERENT and value is not None and value is not False:
                raise NotImplementedError(f"{name}: {reference.__name__} has no such argument")
        with visible():  # some references import their helpers when they are called
            return reference(**{name: value for name, value in given.items() if name in known})

    return run


@functools.cache
def layers() -> tuple[type, type]:
    """Return mamba_ssm's `Mamba` and `Mamba2` with reference ops."""
    if "triton" not in sys.modules:  # imported below; no kernel runs here, but other cases need the interpreter
        os.environ.setdefault(VARIABLE, "1")
    _private.update(_empty_modules())
    with visible():
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        norm = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
        one = importlib.import_module("mamba_ssm.modules.mamba_simple")
        two = importlib.import_module("mamba_ssm.modules.mamba2")
    references = {
        "selective_scan_fn": (scan, "selective_scan_ref"),
        "mamba_inner_fn": (scan, "mamba_inner_ref"),
        "mamba_chunk_scan_combined": (ssd, "ssd_selective_scan"),
        "mamba_split_conv1d_scan_combined": (ssd, "mamba_split_conv1d_scan_ref"),
        "rmsnorm_fn": (norm, "rms_norm_ref"),
    }
    for name, (home, reference) in references.items():
        run = _under_the_signature_of(getattr(home, name), getattr(home, reference))
        for module in (scan, ssd, norm, one, two):
            if hasattr(module, name):
                setattr(module, name, run)
    return one.Mamba, two.Mamba2
