"""Values that an argument should not have, beside the one valid value that a case gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Stranger:
    """An object of a class that nothing knows."""

    def __repr__(self) -> str:
        return "Stranger()"


PLAIN: dict[str, Any] = {
    "None": None,
    "True": True,
    "text": "wrong",
    "empty text": "",
    "bytes": b"wrong",
    "zero": 0,
    "minus one": -1,
    "one and a half": 1.5,
    "huge": 10**30,
    "huge and negative": -(10**30),
    "too long to print": 10**5000,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
    "complex": 1j,
    "an empty list": [],
    "an empty mapping": {},
    "a list of all sorts": ["a", 3, None, 2.5],
    "a list of numbers": [1.5, -2],
    "a list of huge numbers": [10**30, -(10**30)],
    "a mapping": {"a": 1},
    "an object": Stranger(),
    "a class": Stranger,
}


def wrong_values(valid: Any) -> Iterator[tuple[str, Any]]:
    """Names and values: the plain ones, tensors of every kind, and what is nearly `valid` where that is a tensor."""
    yield from PLAIN.items()
    yield "a scalar tensor", torch.tensor(0.5)
    yield "a tensor of integers", torch.arange(3)
    yield "a tensor of flags", torch.ones(2, 2, dtype=torch.bool)
    yield "a complex tensor", torch.ones(2, 3, dtype=torch.complex64)
    yield "an empty tensor", torch.empty(0)
    yield "a tensor without memory", torch.empty(2, 3, device="meta")
    yield "a tensor of six dimensions", torch.ones(1, 1, 1, 1, 1, 1)
    if isinstance(valid, Tensor):
        yield from _neighbors(valid)


def _neighbors(valid: Tensor) -> Iterator[tuple[str, Any]]:
    yield "of integers", valid.detach().long()
    yield "of flags", valid.detach().bool()
    yield "complex", valid.detach().to(torch.complex64)
    yield "in double precision", valid.detach().double()
    yield "in half precision", valid.detach().half()
    yield "without memory", valid.detach().to("meta")
    yield "with a dimension more", valid.detach()[None]
    yield "with a dimension less", valid.detach()[0] if valid.dim() else valid.detach()
    yield "with its last dimension empty", valid.detach()[..., :0] if valid.dim() else valid.detach()
    if valid.dim():
        yield "with a longer last dimension", torch.cat([valid.detach()] * 3, -1)
        yield "with a longer first dimension", torch.cat([valid.detach()] * 3, 0)
    yield "as a nested list", valid.detach().tolist()
    if valid.is_floating_point():
        yield "negative", -valid.detach() - 1
        yield "full of NaN", torch.full_like(valid.detach(), torch.nan)
        yield "full of infinities", torch.full_like(valid.detach(), torch.inf)
