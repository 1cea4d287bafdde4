"""Cuts operators to neighboring tokens that are known on the device only, and puts rows together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ess_monitor.ess.operators.base import Operator

Kind = TypeVar("Kind", bound=Operator)


@torch.no_grad()
def at_tokens(operator: Kind, tokens: Tensor) -> Kind:
    """Return the operator of some neighboring tokens, whose rows see none before the first.

    Args:
        operator: of any kind.
        tokens: (n,), their ascending indices on the device of the operator. The last may be repeated. They are not read
            on the host.

    Examples:
        >>> from ess_monitor.ess import DenseOperator
        >>> at_tokens(DenseOperator(torch.arange(9.0).reshape(3, 3)), torch.tensor([1, 2])).T.tolist()
        [[[[4.0, 5.0], [7.0, 8.0]]]]
    """
    return operator._narrow(None, None, tokens)


def joined(rows: Sequence[Kind]) -> Kind:
    """Return the operator of several samples, from operators that have one each and are alike otherwise."""
    fields = [row._tensor_fields for row in rows]
    return dataclasses.replace(rows[0], **{name: torch.cat([each[name] for each in fields]) for name in fields[0]})
