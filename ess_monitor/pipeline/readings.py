"""From a captured operator to a `Reading`: the computation beside the training, and the averages of its results."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import torch

from ess_monitor.capture import Captured
from ess_monitor.capture.causality.claims import claim_name
from ess_monitor.ess import (
    JacobianOperator,
    ToleranceScale,
    ess_bounds,
    far_share,
    measure,
    midpoint_index,
    operator_positions,
    tolerance_ess,
)
from ess_monitor.records import Reading, Status

SPECTRUM_VALUES = 32
"""Singular values that a reading keeps: enough for the shape of a spectrum, and a bound on what every line of an event
log holds."""

_RESOLUTION = torch.finfo(torch.float32).eps
"""Share of the largest singular value below which the others mean nothing: features are single precision at best, and
an error of that size in T moves every singular value by as much (Weyl)."""

_FAR_BELOW = 1e-3
"""Share of the tolerance below which it does not matter how small a singular value is."""

_FAR = 8
"""Farther back than this part of the sequence is afar."""

Results = dict[str, torch.Tensor]


def compute(
    captured: Captured, positions: tuple[int, ...], tolerance: float, scale: ToleranceScale = "absolute"
) -> Results:
    """Compute everything that is measured of one operator, as tensors on its device, without waiting for the device."""
    operator = captured.operator
    if isinstance(operator, JacobianOperator):
        operator = replace(operator, tolerance=tolerance)
    with torch.no_grad():
        measured = measure(operator, positions, tolerance=tolerance, tolerance_scale=scale)
        results = {f.name: v for f in fields(measured) if isinstance(v := getattr(measured, f.name), torch.Tensor)}
        values = results.pop("singular_values")
        if positions:
            weights = _weights_of_between(positions).to(measured.tolerance_ess)
            results["mean_between"] = (measured.tolerance_ess * weights).sum(-1)
            sizes = [tolerance_ess(values, each).mean() for each in _tolerances(tolerance)]
            results["sizes"] = torch.stack(sizes)
            middle = midpoint_index(positions, operator.length)
            # Beyond the smaller side of H_i there is only padding.
            last = operator.block_size * min(positions[middle], operator.length - positions[middle])
            spectrum = mean_spectrum(values[:, :, middle, :last], tolerance)
            ranks = _thinned(spectrum.shape[0], spectrum.device)
            results["spectrum"], results["spectrum_ranks"] = spectrum[ranks], ranks + 1
            distance = operator.length // _FAR
            if isinstance(operator, JacobianOperator):
                results["at_most"] = torch.stack([operator.found[i].at_most(tolerance) for i in positions])
                results["products"] = torch.full((), operator.products[0].count, device=operator.device)
            elif 0 < distance < operator.length - positions[middle]:
                share = far_share(operator, positions[middle], distance)
                results["far_squared"], results["total_squared"] = share.far_squared.sum(), share.total_squared.sum()
        if positions and not operator.capacity_grows:
            capacity = measured.state_capacity.max()
            bounds = ess_bounds(positions, measured.tolerance_ess, operator.length, capacity=capacity)
            # Between the first and the last measured position: near the ends of the sequence H_i is small whatever the
            # layer does, and a mean over those would not be comparable with that of the measured positions.
            between = slice(positions[0] - 1, positions[-1])
            results["mean_lower"] = bounds.lower[..., between].mean(-1)
            results["mean_upper"] = bounds.upper[..., between].mean(-1)
    return results | {claim_name(k): claim.holds for k, claim in enumerate(captured.claims)}


def mean_spectrum(values: torch.Tensor, tolerance: float = 1e-3) -> torch.Tensor:
    """Return one spectrum for a layer: the geometric mean of each singular value over samples and heads.

    It is drawn on a logarithmic axis, where this is the mean of what is drawn: one large head does not hide the others,
    and the spectrum crosses the tolerance near the mean ESS. A value counts as no less than a floor, so that one dead
    head does not make a zero of the whole: single precision's share of the layer's largest value, and at most a
    thousandth of the tolerance. Where nothing is above the floor, the mean is 0.

    Args:
        values: (batch, heads, rank), at one position.
        tolerance: tau of the tolerance-ESS.

    Returns:
        (rank,)

    Example:
        >>> mean_spectrum(torch.tensor([[[8.0, 1.0, 0.0], [2.0, 0.25, 0.0]]]))
        tensor([4.0000, 0.5000, 0.0000])
    """
    floor = values.amax() * _RESOLUTION
    if tolerance > 0:
        floor = floor.clamp(max=_FAR_BELOW * tolerance)
    mean = values.clamp(min=floor).log().mean((0, 1)).exp()
    return torch.where((values > floor).any(0).any(0), mean, 0.0)


def _thinned(count: int, device: torch.device) -> torch.Tensor:
    """Return evenly spaced indices with the first and the last, from shapes alone: nothing waits for the device."""
    kept = min(count, SPECTRUM_VALUES)
    return torch.arange(kept, device=device) * (count - 1) // max(kept - 1, 1)


def _weights_of_between(positions: tuple[int, ...]) -> torch.Tensor:
    """Return by how much each position counts in the mean over all from the first to the last, interpolated linearly.

    >>> _weights_of_between((2, 4, 5)) * 4  # positions 2, 3, 4 and 5; 3 is half of 2 and half of 4
    tensor([1.5000, 1.5000, 1.0000])
    """
    weights = torch.zeros(len(positions))
    weights[-1] = 1.0
    for k, (before, after) in enumerate(pairwise(positions)):
        weights[k] += (after - before + 1) / 2
        weights[k + 1] += (after - before - 1) / 2
    return weights / (positions[-1] - positions[0] + 1)


def _tolerances(tolerance: float) -> tuple[float, ...]:
    """Return the tolerances at which a reading holds the ESS: from a hundredth to a hundred times the one that is set.

    >>> _tolerances(1e-3), _tolerances(0.0)
    ((1e-05, 0.0001, 0.001, 0.01, 0.1), (0.0,))
    """
    return tuple(dict.fromkeys(float(f"{tolerance * 10**power:.6g}") for power in range(-2, 3)))


def positions_of(captured: Captured, positions: str | int) -> tuple[int, ...]:
    """Return the configured positions for this operator's length."""
    return operator_positions(captured.operator.length, positions)  # type: ignore[arg-type]


def lost_reading(step: int, layer: str, status: Status, message: str) -> Reading:
    """Build a reading without sizes."""
    return Reading(step=step, layer=layer, status=status, message=message)


def reading(
    step: int,
    captured: Captured,
    positions: tuple[int, ...],
    tolerance: float,
    results: Results,
    scale: ToleranceScale = "absolute",
) -> Reading:
    """Build a layer's reading: averages of its results, which are on the host by now."""
    name, length = captured.layer.name, captured.operator.length
    if not positions:
        message = f"a sequence of {length} token(s) has no past to remember; ESS needs at least 2"
        return Reading(step=step, layer=name, status="too_short", message=message, length=length)
    sizes, finite = results["tolerance_ess"].double(), results["finite"]
    common = {
        "basis": "jacobian" if "products" in results else "operator",
        "step": step,
        "layer": name,
        "operators": finite.numel(),
        "length": length,
        "positions": positions,
        "tolerance": tolerance,
        "tolerance_scale": scale,
        "capacity_grows": captured.operator.capacity_grows,
        "heads": captured.heads,
    }
    if not bool(finite.all()) or not bool(sizes.isfinite().all()):
        bad = int((~(finite & sizes.isfinite().all(-1))).sum())
        message = f"{bad} of {finite.numel()} operators hold NaN or Inf, or their spectrum did not converge"
        return Reading(status="nonfinite", message=message, **common)  # type: ignore[arg-type]
    capacity = results["state_capacity"].double()
    reachable = [min(float(c), i, length - i) for c, i in zip(capacity.tolist(), positions, strict=True)]
    effective, mean_capacity = float(sizes.mean()), float(capacity.mean())
    middle = min(range(len(positions)), key=lambda p: abs(positions[p] - length / 2))
    undecayed = results.get("undecayed_ess")
    measured = Reading(
        status="ok",
        state_capacity=mean_capacity,
        attainable_size=sum(reachable) / len(reachable),
        effective_size=effective,
        entropy_size=_mean(results["entropy_ess"]),
        total_effective_size=effective * captured.channels,
        total_state_capacity=mean_capacity * captured.channels,
        minimum_effective_size=float(sizes[..., middle].min()),
        effective_size_at=tuple(zip(_tolerances(tolerance), results["sizes"].tolist(), strict=True)),
        effective_size_between=_mean(results["mean_between"]),
        effective_size_lower=_mean(results.get("mean_lower")),
        effective_size_upper=_mean(results.get("mean_upper")),
        utilization_ratio=effective / mean_capacity if mean_capacity > 0 else 0.0,
        retention_ratio=None if undecayed is None else _ratio(effective, _mean(undecayed)),
        mean_decay=_mean(results.get("mean_decay")),
        decay_product_norm=_mean(results.get("decay_product_norm")),
        far_share_ratio=_root_share(results.get("far_squared"), results.get("total_squared")),
        per_head=tuple(sizes.mean((0, 2)).tolist()),
        per_position=tuple(sizes.mean((0, 1)).tolist()),
        spectrum=tuple(float(f"{value:.5g}") for value in results["spectrum"].tolist()),
        spectrum_ranks=tuple(results["spectrum_ranks"].tolist()),
        **common,  # type: ignore[arg-type]
    )
    return measured if measured.basis == "operator" else _of_jacobian(measured, sizes, results)


def _of_jacobian(measured: Reading, sizes: torch.Tensor, results: Results) -> Reading:
    """Return the reading without what is not known of a Jacobian: TSS, and singular values below the tolerance."""
    unknown = ("state_capacity", "attainable_size", "total_state_capacity", "utilization_ratio", "entropy_size")
    certain = bool((sizes[:, 0] == results["at_most"].T).all())
    changes: dict[str, object] = dict.fromkeys(unknown)
    changes["message"] = "rank of d y[i:] / d u[:i], the layer linearized at this input, all channels together"
    changes["effective_size_at"] = tuple(pair for pair in measured.effective_size_at if pair[0] >= measured.tolerance)
    changes |= {"is_lower_bound": not certain, "products": int(results["products"])}
    return measured.model_copy(update=changes)


def _mean(values: torch.Tensor | None) -> float | None:
    if values is None:
        return None
    mean = float(values.double().mean())
    return mean if math.isfinite(mean) else None


def _ratio(effective: float, undecayed: float | None) -> float | None:
    """Return the ratio of the averages: in an average of ratios a head whose undecayed ESS is 0 would decide."""
    if undecayed is None:
        return None
    return effective / undecayed if undecayed > 0 else 1.0


def _root_share(part: torch.Tensor | None, whole: torch.Tensor | None) -> float | None:
    """Return the square root of part / whole; None where they are not known, not finite, or nothing at all."""
    if part is None or whole is None:
        return None
    share = float((part / whole).sqrt())
    return share if math.isfinite(share) else None
