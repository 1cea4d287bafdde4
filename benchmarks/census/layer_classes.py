"""Every layer class of flash-linear-attention and mamba_ssm.

They are described and not run: their kernels need a device, or minutes in Triton's interpreter. Those that can be
measured are run by `benchmarks.faithfulness`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from functools import partial

from torch import nn

from benchmarks.census.item import Built, Item

WIDTH = 32


def items() -> Iterator[Item]:
    """Yield the classes of `fla.layers` and `mamba_ssm.modules`."""
    if importlib.util.find_spec("fla") is not None:
        from benchmarks.layers.triton_interpreter import interpret_triton

        interpret_triton("fla")
        layers = importlib.import_module("fla.layers")
        for name in sorted(layers.__all__):
            yield Item("flash-linear-attention", name, partial(_fla, name))
    if importlib.util.find_spec("mamba_ssm") is not None:
        for name in ("Mamba", "Mamba2"):
            yield Item("mamba_ssm", name, partial(_mamba, name))


def _fla(name: str) -> Built:
    cls = getattr(importlib.import_module("fla.layers"), name)
    parameters = inspect.signature(cls).parameters
    wanted = {
        "hidden_size": WIDTH,
        "d_model": WIDTH,
        "dim": WIDTH,
        "head_dim": 16,
        "layer_idx": 0,
        "num_hidden_layers": 2,
    }
    wanted |= {"num_heads": 4 if "expand" in parameters else 2, "num_kv_heads": 2, "num_key_value_heads": 2}
    wanted |= {"expand_ratio": 16} if name == "HGRN2Attention" else {}
    known = {key: value for key, value in wanted.items() if key in parameters}
    return Built(nn.Sequential(nn.LayerNorm(WIDTH), cls(**known)), None)


def _mamba(name: str) -> Built:
    from benchmarks.layers import mamba_ssm_stub

    cls = next(cls for cls in mamba_ssm_stub.layers() if cls.__name__ == name)
    return Built(nn.Sequential(cls(WIDTH, **({"headdim": 16} if name == "Mamba2" else {}))), None)
