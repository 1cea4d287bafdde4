"""Spectra of all kinds, matrices that have them, and what may be said of one that is not exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ess_monitor.ess.gram_spectrum import DECADES, SINGLE_PRECISION
from tests.ess import reference

TAU = 1e-3
TOLERANCES = tuple(TAU * 10.0**power for power in DECADES)


def assert_agrees(values: Tensor, exact: Tensor, tau: float = TAU) -> None:
    """Values (..., k) are those of an SVD (..., n) to what `known_values` says of them, k <= n."""
    largest = exact[..., :1]
    floor = (SINGLE_PRECISION * largest).clamp(max=1e-2 * tau)
    of_itself = (4e-15 * (largest / exact).square()).clamp(min=1e-3)
    error = torch.where(exact > floor, of_itself * exact, floor) + 1e-13 * largest
    padded = torch.zeros_like(exact)
    padded[..., : values.shape[-1]] = values[..., : exact.shape[-1]].double()
    assert ((padded - exact).abs() <= error).all()
    for power in DECADES:
        each = tau * 10.0**power
        near = ((exact - each).abs() <= 2e-7 * each + 1e-13 * largest).any(-1)
        same = (padded.to(values.dtype) > each).sum(-1) == (exact > each).sum(-1)
        assert (same | near).all(), each
    for one, other in zip(padded.reshape(-1, padded.shape[-1]), exact.reshape(-1, exact.shape[-1]), strict=True):
        assert math.isclose(reference.entropy_size(one), reference.entropy_size(other), rel_tol=1e-5)


def with_spectrum(values: Tensor, columns: int | None = None) -> Tensor:
    """A random matrix with these singular values."""
    size = len(values)
    left = torch.linalg.qr(torch.randn(size, size).double()).Q
    right = torch.linalg.qr(torch.randn(columns or size, size).double()).Q
    return left @ torch.diag(values.double()) @ right.mT


def levels(*logs: float) -> Tensor:
    """Values between powers of ten, which are not tolerances themselves."""
    return 0.7 * torch.logspace(*logs, 48, dtype=torch.float64)


SPECTRA: dict[str, Tensor] = {
    "well conditioned": levels(0, -4),
    "ill conditioned": levels(1, -9),
    "far below rounding": levels(0, -30),
    "down to single precision": levels(0, -6.2),
    "large, down to the smallest tolerance": 20 * levels(0, -6),
    "rank deficient": levels(0, -2) * (torch.arange(48) < 20),
    "clustered at the tolerance": TAU * (1 + torch.linspace(-1, 1, 48, dtype=torch.float64) * 1e-6),
    "clustered at a hundredth of the tolerance": 1e-2 * TAU * (1 + torch.linspace(-1, 1, 48).double() * 1e-3),
    "huge, full rank": 1e9 * levels(0, -3),
    "huge, deficient": 1e12 * levels(0, -2) * (torch.arange(48) < 40),
    "tiny": 1e-12 * levels(0, -3),
    "nearly underflowing": 1e-160 * levels(0, -3),
    "zero": torch.zeros(48, dtype=torch.float64),
    "one large": torch.cat([torch.tensor([1e6], dtype=torch.float64), TAU * levels(1, -1)[1:]]),
    "just above rounding": torch.cat([levels(0, -1)[:24], 3e-8 * levels(0, -1)[24:]]),
}
