"""Choose the alpha to start with: the smallest whose initial ESS grows with the state (section 4.1, Finding 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture import capture_operators
from ess_monitor.errors import ConfigError
from ess_monitor.ess import operator_positions, tolerance_ess
from ess_monitor.interventions.alpha import rescale_alpha, restore_alpha

LARGEST_SIZE = 2**20
"""Largest state, width, length and batch, in elements: far above what can be measured before a training."""


@dataclass(frozen=True)
class AlphaAdvice:
    """Holds the initial tolerance-ESS over state sizes and alpha factors, and the factor that follows from it."""

    state_sizes: tuple[int, ...]
    factors: tuple[float, ...]
    table: tuple[tuple[float, ...], ...]
    """One row per factor: mean tolerance-ESS per channel at each of `state_sizes`."""
    margin: float
    factor: float | None
    """Smallest factor whose row rises: every added state dimension adds at least `margin` to the ESS. None: no row
    does; try larger factors, or longer sequences."""


def advise_alpha(
    build: Callable[[int], nn.Module],
    state_sizes: Sequence[int],
    factors: Sequence[float] = (1.0, 10.0, 100.0, 1000.0),
    *,
    width: int,
    length: int | None = None,
    batch: int = 2,
    seed: int = 0,
    tolerance: float = 1e-3,
    margin: float = 0.5,
) -> AlphaAdvice:
    """Measure a layer's ESS before training, on Gaussian input, for every state size and alpha.

    With A = exp(-arange softplus(.)) every further state forgets faster than the one before, and a larger state adds no
    memory (Finding 4); dividing log A by a large enough factor fixes it.

    Args:
        build: state size -> layer with an alpha handle (GLA-S6, S6), before training.
        state_sizes: at least two, ascending.
        factors: what alpha is multiplied with; equal to alpha itself for a layer that was built with alpha = 1.
        width: channels of the layer's input (batch, length, width).
        length: tokens; four times the largest state by default, because H_i = T[i:, :i] has at most min(i, length - i)
            singular values, and a decay needs tokens to show.
        batch: sequences.
        seed: of the layers and of the input. The caller's random state is not changed.
        tolerance: tau of the tolerance-ESS, measured at the midpoint.
        margin: ESS that every added state dimension must bring, 0..1. 1 is a memory that is used to the full; half of
            that is far from a flat row (0) and from rounding.

    Raises:
        ConfigError: too few sizes, an unusable factor, or a length too short for the largest state.
        CaptureError: the layer has nothing that scales its decay.

    Examples:
        >>> from ess_monitor.featurizers import GLAS6
        >>> advice = advise_alpha(lambda n: GLAS6(16, 1, expand_k=n / 16, alpha=1.0), (4, 8, 16), width=16)
        >>> advice.factor
        100.0
    """
    validation.function("build", build, hint="state size -> layer")
    sizes = validation.wholes("state_sizes", state_sizes, 1, LARGEST_SIZE)
    ascending = _ascending(factors)
    width = validation.whole("width", width, 1, LARGEST_SIZE)
    batch = validation.whole("batch", batch, 1, LARGEST_SIZE)
    seed = validation.whole("seed", seed, 0)
    tolerance = validation.real("tolerance", tolerance, low=0)
    if length is not None:
        length = validation.whole("length", length, 1, LARGEST_SIZE)
    length = 4 * max(sizes, default=0) if length is None else length
    _check(sizes, ascending, length, margin)
    columns = [_initial_ess(build, n, ascending, (batch, length, width), seed, tolerance) for n in sizes]
    table = tuple(zip(*columns, strict=True))
    rising = (factor for factor, row in zip(ascending, table, strict=True) if _rises(sizes, row, margin))
    return AlphaAdvice(sizes, ascending, table, margin, next(rising, None))


def _ascending(factors: Sequence[float]) -> tuple[float, ...]:
    given = validation.listed("factors", factors, hint="numbers above 0")
    return tuple(sorted(validation.real("factors", factor, above=0) for factor in given))


def _initial_ess(
    build: Callable[[int], nn.Module],
    state_size: int,
    factors: tuple[float, ...],
    shape: tuple[int, int, int],
    seed: int,
    tolerance: float,
) -> list[float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = build(state_size)
        inputs = torch.randn(shape)
    sizes = []
    for factor in factors:
        copy = rescale_alpha(layer, factor)
        [operator] = capture_operators(layer, inputs).values()
        values = operator.singular_values(operator_positions(operator.length, "midpoint"))
        sizes.append(tolerance_ess(values, tolerance).mean().item())
        restore_alpha(layer, copy)
    return sizes


def _rises(sizes: tuple[int, ...], row: tuple[float, ...], margin: float) -> bool:
    return all(
        ess - before >= margin * (n - m) for (m, n), (before, ess) in zip(pairwise(sizes), pairwise(row), strict=True)
    )


def _check(sizes: tuple[int, ...], factors: tuple[float, ...], length: int, margin: float) -> None:
    if len(sizes) < 2 or any(not m < n for m, n in pairwise(sizes)):
        raise ConfigError(f"state_sizes: {sizes} given; at least two in ascending order, for example (8, 16, 32)")
    if not factors:
        raise ConfigError("factors: none given; at least one, for example (1, 10, 100, 1000)")
    if length < 2 * max(sizes):
        raise ConfigError(
            f"length: {length} given; at least {2 * max(sizes)}, twice the largest state, or the length caps the ESS"
        )
    validation.real("margin", margin, above=0, high=1, hint="for example 0.5")
