"""What a call must show before its layer is measured: that T is lower triangular.

A reader states what has to hold of the call's tensors (`require`), or that the call alone cannot show it (`unproven`).
On the CPU it is looked at right away. On an accelerator looking would stall the training: the statement travels with
the operator, and is looked at with its results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from ess_monitor.errors import NotCausalError


@dataclass(frozen=True)
class Claim:
    """A statement about a call on which its reading rests."""

    holds: Tensor
    """One bool, on the device of the call."""
    reason: str
    """What is wrong where it does not hold."""


@dataclass
class Claims:
    """Collects the statements that a reader makes of one call."""

    pending: list[Claim] = field(default_factory=list)
    """Those that have not been looked at."""
    unproven: str = ""
    """What the call alone does not show; empty where it shows all."""


_RUNNING: ContextVar[Claims | None] = ContextVar("claims", default=None)


@contextmanager
def collecting() -> Iterator[Claims]:
    """Collect the statements that readers make inside the block."""
    claims = Claims()
    token = _RUNNING.set(claims)
    try:
        yield claims
    finally:
        _RUNNING.reset(token)


def require(holds: Tensor, reason: str) -> None:
    """State that a layer can be measured only if `holds`.

    Args:
        holds: one bool.
        reason: what is wrong where it does not hold.

    Raises:
        NotCausalError: it does not hold, and can be looked at without waiting for a device.
    """
    claims = _RUNNING.get()
    if holds.device.type != "cpu" and claims is not None:
        claims.pending.append(Claim(holds, reason))
    elif not bool(holds):
        raise NotCausalError(reason)


def unproven(reason: str) -> None:
    """State that the call does not show whether T is lower triangular, for this reason."""
    claims = _RUNNING.get()
    if claims is not None:
        claims.unproven = reason


def claim_name(index: int) -> str:
    """Return the name of a statement's tensor among the results of its layer."""
    return f"claim_{index}"


def refuted(claims: tuple[Claim, ...], results: Mapping[str, Tensor]) -> str:
    """Return the reason of the first statement that does not hold, from tensors on the host; empty where all hold.

    >>> import torch
    >>> refuted((Claim(torch.tensor(True), "too soon"),), {"claim_0": torch.tensor(False)})
    'too soon'
    """
    wrong = (claim.reason for k, claim in enumerate(claims) if not bool(results.get(claim_name(k), True)))
    return next(wrong, "")
