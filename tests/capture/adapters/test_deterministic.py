"""Capture uses no function whose kernel for CUDA raises under `torch.use_deterministic_algorithms(True)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ess_monitor.capture.adapters.gated_linear import linear_attention
from ess_monitor.capture.hooks.call_site import Call

REFUSED = ("cumsum", "kthvalue", "median", "put_", "histc", "bincount", "scatter_reduce")
"""Those of torch's list that could serve here. Of whole numbers cumsum has a deterministic kernel."""


class Deterministic(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in REFUSED and args[0].is_floating_point():
            raise RuntimeError(f"{name}_cuda_kernel does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ends", [None, [0, 3, 4, 9]])
def test_normalized_linear_attention_has_its_row_sums(ends: list[int] | None) -> None:
    torch.manual_seed(0)
    q, k = torch.rand(2, 1, 9, 3, 4, dtype=torch.float64).unbind()
    given = {} if ends is None else {"cu_seqlens": torch.tensor(ends)}
    call = Call(nn.Identity(), nn.Identity(), "chunk_linear_attn", kwargs=dict(q=q, k=k, v=q, normalize=True, **given))
    with Deterministic():
        read = linear_attention(call)
        assert read is not None
        operator = read.select(samples=slice(0, 1), heads=range(3), length=9)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).tril()
    number = torch.bucketize(torch.arange(9), torch.tensor(ends or [0, 9]), right=True)
    scores = scores * (number[:, None] == number[None])
    torch.testing.assert_close(operator.materialize(), scores / scores.sum(-1, keepdim=True), atol=1e-9, rtol=1e-7)
