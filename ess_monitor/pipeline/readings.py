"""From a captured operator to a `Reading`: the computation beside the training, and the averages of its results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import torch

from ess_monitor.capture import Captured, ModulationConfig
from ess_monitor.capture.causality.claims import claim_name
from ess_monitor.ess import (
    JacobianOperator,
    Operator,
    ToleranceScale,
    ess_bounds,
    measure,
    midpoint_index,
    operator_positions,
    tolerance_ess,
)
from ess_monitor.ess.gram_spectrum import DECADES, mean_spectrum
from ess_monitor.ess.linalg import index_tensor
from ess_monitor.ess.modulation import POSITIONS_OF_A_TOKEN, ModulationSums, modulation_ratios, modulation_sums
from ess_monitor.ess.operators.recurrence import Recurrence
from ess_monitor.ess.operators.reduced import ReducedRecurrence, reduced
from ess_monitor.ess.positions import Positions
from ess_monitor.records import Reading, Status

SPECTRUM_VALUES = 32
"""Singular values that a reading keeps: enough for the shape of a spectrum, and a bound on what every line of an event
log holds."""

_FAR = 8
"""Farther back than this part of the sequence is afar."""

Results = dict[str, torch.Tensor]

_REDUCED_BYTES = 2**25

_SUMS = ("far_squared", "total_squared", "products")
"""Results that are sums over all operators. The others have an entry for each sample."""


Placement = Positions | tuple[int, ...]
"""How positions are placed in a sequence, or where they are in every one."""


@dataclass(frozen=True)
class _Placed:
    """The operator of one segment of some samples, and the positions at which it is measured."""

    operator: Operator
    positions: tuple[int, ...]
    first: int = 0
    """Token from which on positions are placed."""

    @property
    def middle(self) -> int:
        """Index of the position nearest the middle of the tokens from `first` on."""
        return midpoint_index([i - self.first for i in self.positions], self.operator.length - self.first)


def compute(
    captured: Captured,
    positions: Placement,
    tolerance: float,
    scale: ToleranceScale = "absolute",
    modulation: ModulationConfig | None = None,
) -> Results:
    """Compute everything that is measured of one operator, as tensors on its device.

    Padding counts for nothing, and of packed sequences the longest is measured. Waits for the device only where it has
    to know which tokens are real.

    Raises:
        OperatorError: It is not known which tokens are real.
    """
    with torch.no_grad():
        claims = {claim_name(k): claim.holds for k, claim in enumerate(captured.claims)}
        parts = captured.operator.longest_segments()
        if isinstance(captured.operator, ReducedRecurrence):
            positions = captured.operator.positions
        placed = _placed([part for part in parts if part.length > 1], positions, captured.window)
        if not placed:
            longest = max((part.length for part in parts), default=0)
            return {**claims, "lengths": index_tensor([longest], captured.operator.device)}
        shortest = min(placed, key=lambda part: part.operator.length)
        measured = [_measured(part, tolerance, scale, captured.with_retention) for part in placed]
        spectra = [one.pop("middle_values") for one in measured]
        results: Results = {}
        for name in measured[0]:
            each = [one[name] for one in measured if name in one]
            if len(each) == len(measured):
                results[name] = torch.stack(each).sum(0) if name in _SUMS else torch.cat(each)
        # Beyond the smaller side of H_i there is only padding.
        middle = shortest.middle
        place = shortest.positions[middle]
        side = shortest.operator.block_size * min(place, shortest.operator.length - place)
        last = min(side, *(values.shape[2] for values in spectra))
        spectrum = mean_spectrum(torch.cat([values[:, :, :last] for values in spectra]), tolerance)
        ranks = _thinned(spectrum.shape[0], spectrum.device)
        if not shortest.operator.capacity_grows:
            results["spectrum_end"] = _end(spectrum, results["state_capacity"][:, middle].amax())
        if modulation is not None and captured.separators is not None:
            results |= _around_separators(captured, captured.separators, modulation, scale)
        return {**results, **claims, "spectrum": spectrum[ranks], "spectrum_ranks": ranks + 1}


def _placed(parts: Sequence[Operator], positions: Placement, window: int | None = None) -> list[_Placed]:
    """Place as many positions in each segment, at the same shares of it; leave out segments too short for so many.

    With `window` they are placed among so many tokens at the end of each.
    """
    if not parts:
        return []
    if isinstance(positions, tuple):
        return [_Placed(part, positions) for part in parts]
    seen = [(part, part.length if window is None else min(window, part.length)) for part in parts]
    longest = max(tokens for _, tokens in seen)
    if positions == "midpoint":
        return [_among(part, tokens, "midpoint") for part, tokens in seen]
    if positions == "all":
        # All of the shortest, once those are left out whose number of positions says little of the others.
        seen = [(part, tokens) for part, tokens in seen if 2 * tokens > longest]
        number = min(tokens for _, tokens in seen) - 1
    else:
        number = len(operator_positions(longest, positions))
    return [_among(part, tokens, number) for part, tokens in seen if tokens > number]


def _around_separators(
    captured: Captured, separators: torch.Tensor, modulation: ModulationConfig, scale: ToleranceScale
) -> Results:
    """Return `ModulationSums` of a layer, at as many tokens as there is time for."""
    positions = modulation.positions if captured.shape is None else captured.shape.modulation
    tokens, taus, window = positions // (2 * POSITIONS_OF_A_TOKEN), modulation.tolerances, captured.window
    found = modulation_sums(captured.operator, separators, taus, tokens=tokens, window=window, tolerance_scale=scale)
    return {"modulation_sizes": found.sizes, "modulation_tokens": found.tokens}


def _modulation(captured: Captured, results: Results, modulation: ModulationConfig | None) -> dict[str, Any]:
    """Return what a reading holds of state modulation."""
    if modulation is None or "modulation_sizes" not in results:
        return {"modulation_message": captured.no_separators}
    sums = ModulationSums(results["modulation_sizes"], results["modulation_tokens"])
    pairs = zip(modulation.tolerances, modulation_ratios(sums), strict=True)
    known = tuple((tau, ratio) for tau, ratio in pairs if ratio is not None)
    return {"modulation_ratio": known, "modulation_separators": int(sums.tokens[0])}


def reduce_long(operator: Operator, positions: Placement, scale: ToleranceScale = "absolute") -> Operator:
    """Return what is measured of a recurrence, of the longest sequence in its row, where that has two tokens.

    All positions are as many evenly spaced ones as need 32 MB.

    Args:
        operator: A recurrence of one sample, whose `segments` the host may read.
        positions, scale: As in `compute`.
    """
    part = next(iter(operator.longest_segments()), None)
    if part is None or part.length < 2 or not isinstance(part, Recurrence):
        return operator.select(length=1)
    if positions == "all" or isinstance(positions, int):
        most = max(1, _REDUCED_BYTES // (16 * part.state_size**2))
        positions = min(most, part.length - 1 if positions == "all" else positions)
    [placed] = _placed([part], positions)
    split, distance = placed.positions[placed.middle], part.length // _FAR
    rows = (split, split + distance) if 0 < distance < part.length - split else None
    return reduced(part, placed.positions, rows=rows, unit_rows=scale == "output")


def _among(part: Operator, tokens: int, positions: Literal["midpoint"] | int) -> _Placed:
    first = part.length - tokens
    return _Placed(part, tuple(first + i for i in operator_positions(tokens, positions)), first)


def _measured(part: _Placed, tolerance: float, scale: ToleranceScale, retention: bool) -> Results:
    operator, positions = part.operator, part.positions
    if isinstance(operator, JacobianOperator):
        operator = replace(operator, tolerance=tolerance)
    length, batch = operator.length, operator.batch
    middle, distance = part.middle, (length - part.first) // _FAR
    has_far_rows = 0 < distance < length - positions[middle] and not isinstance(operator, JacobianOperator)
    far = (positions[middle], distance) if has_far_rows else None
    measured = measure(
        operator, positions, tolerance=tolerance, tolerance_scale=scale, retention=retention, far_share_at=far
    )
    results = {f.name: v for f in fields(measured) if isinstance(v := getattr(measured, f.name), torch.Tensor)}
    values = results.pop("singular_values")
    results["middle_values"] = values[:, :, middle]
    results["sizes"] = torch.stack([tolerance_ess(values, each).mean(-1) for each in _tolerances(tolerance)], dim=-1)
    results["mean_between"] = measured.tolerance_ess @ _weights_of_between(positions).to(measured.tolerance_ess)
    results["state_capacity"] = measured.state_capacity.expand(batch, -1)
    results["positions"] = index_tensor(positions, operator.device).expand(batch, -1)
    results["lengths"] = index_tensor([length], operator.device).expand(batch)
    if isinstance(operator, JacobianOperator):
        results["at_most"] = torch.stack([operator.found[i].at_most(tolerance) for i in positions], dim=-1)
        results["products"] = torch.full((), operator.products[0].count, device=operator.device)
    if measured.far_share is not None:
        results["far_squared"], results["total_squared"] = (squares.sum() for squares in measured.far_share)
    if not operator.capacity_grows:
        capacity = measured.state_capacity.max()
        bounds = ess_bounds(positions, measured.tolerance_ess, length, capacity=capacity)
        # Between the first and the last measured position: near the ends of the sequence H_i is small whatever the
        # layer does, and a mean over those would not be comparable with that of the measured positions.
        between = slice(positions[0] - 1, positions[-1])
        results["mean_lower"] = bounds.lower[..., between].mean(-1)
        results["mean_upper"] = bounds.upper[..., between].mean(-1)
    return results


def _end(spectrum: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """Return the singular value number `capacity` over the largest; NaN where there are fewer, or all are 0."""
    index = capacity.long() - 1
    end = spectrum.take(index.clamp(0, len(spectrum) - 1)) / spectrum[0]
    return torch.where(index < len(spectrum), end, math.nan)


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
    return tuple(dict.fromkeys(float(f"{tolerance * 10.0**power:.6g}") for power in DECADES))


def lost_reading(step: int, layer: str, status: Status, message: str) -> Reading:
    """Build a reading without sizes."""
    return Reading(step=step, layer=layer, status=status, message=message)


def reading(
    step: int,
    captured: Captured,
    tolerance: float,
    results: Results,
    scale: ToleranceScale = "absolute",
    modulation: ModulationConfig | None = None,
    *,
    undecayed: tuple[int, float] | None = None,
) -> Reading:
    """Build a layer's reading: averages of its results, which are on the host by now.

    Args:
        undecayed: step and size of the last sample with A := I, where this one is without.
    """
    name, lengths, row = captured.layer.name, results["lengths"].tolist(), captured.operator.length
    length = min(lengths)
    if "positions" not in results:
        inside = "" if captured.operator.segments is None else f" (the longest in rows of {row}, without padding)"
        message = f"a sequence of {length} token(s){inside} has no past to remember; ESS needs at least 2"
        return Reading(step=step, layer=name, status="too_short", message=message, length=length)
    placed = results["positions"].tolist()
    positions = tuple(placed[lengths.index(length)])
    sizes, finite = results["tolerance_ess"].double(), results["finite"]
    common = {
        "basis": "jacobian" if "products" in results else "operator",
        "step": step,
        "layer": name,
        "operators": finite.numel(),
        "length": length,
        "row_length": captured.length,
        "calls": captured.calls,
        "positions": positions,
        "tolerance": tolerance,
        "tolerance_scale": scale,
        "capacity_grows": captured.operator.capacity_grows,
        "heads": captured.heads,
    }
    if not bool(finite.all()) or not bool(sizes.isfinite().all()):
        bad = int((~(finite & sizes.isfinite().all(-1))).sum())
        message = f"{bad} of {finite.numel()} operators hold NaN or Inf, or their spectrum did not converge"
        return Reading(status="nonfinite", message=message, **common)
    capacity = results["state_capacity"].double()
    reachable = [
        min(held, i, tokens - i)
        for tokens, holds, places in zip(lengths, capacity.tolist(), placed, strict=True)
        for held, i in zip(holds, places, strict=True)
    ]
    effective, mean_capacity = float(sizes.mean()), float(capacity.mean())
    first = 0 if captured.window is None else max(0, length - captured.window)
    middle = min(range(len(positions)), key=lambda p: abs(positions[p] - (first + length) / 2))
    retention_step, undecayed_now = (None, undecayed_size(results)) if undecayed is None else undecayed
    measured = Reading(
        status="ok",
        state_capacity=mean_capacity,
        attainable_size=sum(reachable) / len(reachable),
        effective_size=effective,
        entropy_size=_mean(results["entropy_ess"]),
        total_effective_size=effective * captured.channels,
        total_state_capacity=mean_capacity * captured.channels,
        minimum_effective_size=float(sizes[..., middle].min()),
        effective_size_at=tuple(
            zip(_tolerances(tolerance), results["sizes"].double().mean((0, 1)).tolist(), strict=True)
        ),
        effective_size_between=_mean(results["mean_between"]),
        effective_size_lower=_mean(results.get("mean_lower")),
        effective_size_upper=_mean(results.get("mean_upper")),
        utilization_ratio=effective / mean_capacity if mean_capacity > 0 else 0.0,
        retention_ratio=_ratio(effective, undecayed_now),
        retention_step=retention_step,
        mean_decay=_mean(results.get("mean_decay")),
        decay_product_norm=_mean(results.get("decay_product_norm")),
        spectrum_end_ratio=_finite(results.get("spectrum_end")),
        far_share_ratio=_root_share(results.get("far_squared"), results.get("total_squared")),
        per_head=tuple(sizes.mean((0, 2)).tolist()),
        per_position=tuple(sizes.mean((0, 1)).tolist()),
        spectrum=tuple(float(f"{value:.5g}") for value in results["spectrum"].tolist()),
        spectrum_ranks=tuple(results["spectrum_ranks"].tolist()),
        **_modulation(captured, results, modulation),
        **common,
    )
    measured = measured if measured.basis == "operator" else _of_jacobian(measured, sizes, results)
    if not captured.left_out:
        return measured
    told = f"{captured.left_out}: more takes longer than runtime.sample_seconds"
    return measured.model_copy(update={"message": "; ".join(filter(None, (measured.message, told)))})


def _of_jacobian(measured: Reading, sizes: torch.Tensor, results: Results) -> Reading:
    """Return the reading without what is not known of a Jacobian: TSS, and singular values below the tolerance."""
    sizes_of_state = ("state_capacity", "attainable_size", "total_state_capacity", "utilization_ratio")
    unknown = (*sizes_of_state, "entropy_size", "spectrum_end_ratio")
    certain = bool((sizes[:, 0] == results["at_most"]).all())
    changes: dict[str, object] = dict.fromkeys(unknown)
    told = "" if certain else "; a lower bound: there may be more singular values above the tolerance than were found"
    changes["message"] = f"rank of d y[i:] / d u[:i], the layer linearized at this input, all channels together{told}"
    changes["effective_size_at"] = tuple(pair for pair in measured.effective_size_at if pair[0] >= measured.tolerance)
    changes |= {"is_lower_bound": not certain, "products": int(results["products"])}
    return measured.model_copy(update=changes)


def undecayed_size(results: Results) -> float | None:
    """Return the mean tolerance-ESS with A := I; None where it was not measured, or there is no A."""
    return _mean(results.get("undecayed_ess"))


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


def _finite(number: torch.Tensor | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _root_share(part: torch.Tensor | None, whole: torch.Tensor | None) -> float | None:
    """Return the square root of part / whole; None where they are not known, not finite, or nothing at all."""
    if part is None or whole is None:
        return None
    share = float((part / whole).sqrt())
    return share if math.isfinite(share) else None
