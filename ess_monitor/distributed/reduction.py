"""Encodes one sample of each rank as a flat list of numbers, reduces the lists to one, and decodes it.

A rank's list holds a checksum of the layers' names and the interval the rank wants; then the value of each metric and
whether it is not finite; then the quantities of each layer, how many times as long as estimated it took, whether its
state is not finite, and the sums over batches that were run again. The reduced list holds the same, with the sums added
up, and three more numbers of each layer: how many ranks measured it, the smallest utilization among them, and the rank
it was seen on. NaN stands for a number that a rank does not have.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

from ess_monitor.records import CHANGE_KINDS, Changes, Reading, SampleResult

_QUANTITIES = (
    "state_capacity",
    "attainable_size",
    "effective_size",
    "effective_size_between",
    "effective_size_lower",
    "effective_size_upper",
    "total_effective_size",
    "total_state_capacity",
    "entropy_size",
    "utilization_ratio",
    "retention_ratio",
    "mean_decay",
    "spectrum_end_ratio",
    "far_share_ratio",
)
"""Fields of a reading that become means over the ranks. Diagnosis, evidence and autopilot decide on these."""
_SIZE, _UTILIZATION = _QUANTITIES.index("effective_size"), _QUANTITIES.index("utilization_ratio")
_SUMS = len(Changes._fields)
_NO_CHANGES = (math.nan,) * _SUMS


class RankReduction:
    """Turns samples into numbers that ranks can exchange, and back.

    Args:
        layers: names of the measured layers, the same on all ranks.
        metrics: names of the training loop's metrics that decisions use.
        ranks: the measuring ranks, in the order of their lists.
        tolerances: at which state modulation is measured.

    Examples:
        >>> from ess_monitor.records import Reading
        >>> reduction = RankReduction(["mixer"], [], ranks=(0, 4))
        >>> def sample(use):
        ...     reading = Reading(step=7, layer="mixer", status="ok", effective_size=8 * use, utilization_ratio=use)
        ...     return SampleResult(7, (reading,))
        >>> values = reduction.reduce([reduction.encode(sample(0.75), 100), reduction.encode(sample(0.25), 120)])
        >>> agreed, interval = reduction.decode(sample(0.75), values)
        >>> (reading,) = agreed.readings
        >>> reading.utilization_ratio, reading.utilization_min_ratio, reading.worst_rank, reading.ranks, interval
        (0.5, 0.25, 4, 2, 120)
    """

    def __init__(
        self, layers: Sequence[str], metrics: Sequence[str], ranks: Sequence[int], tolerances: Sequence[float] = ()
    ) -> None:
        self._layers = tuple(layers)
        self._metrics = tuple(dict.fromkeys(metrics))
        self._ranks = tuple(ranks)
        self._checksum = float(zlib.crc32("\n".join(self._layers).encode()))
        self._start = 2 + 2 * len(self._metrics)
        self._tolerances = tuple(tolerances)
        self._quantities = len(_QUANTITIES) + len(self._tolerances)
        self._width = self._quantities + 2 + _SUMS
        """Numbers of a layer in a rank's list: the quantities, how slow it was, 1 where its state is not finite, and
        the sums of `Changes`."""

    def encode(self, sample: SampleResult, interval_steps: int) -> list[float]:
        """Return this rank's list: its sample, and the interval it wants."""
        values = [self._checksum, float(interval_steps)]
        for name in self._metrics:
            values += [sample.metrics.get(name, math.nan), float(name in sample.nonfinite)]
        measured = {reading.layer: reading for reading in sample.readings if reading.status == "ok"}
        nonfinite = {reading.layer for reading in sample.readings if reading.status == "nonfinite"}
        for name in self._layers:
            quantities = (getattr(measured.get(name), quantity, None) for quantity in _QUANTITIES)
            values += [math.nan if value is None else float(value) for value in quantities]
            modulation = dict(measured[name].modulation_ratio) if name in measured else {}
            values += [modulation.get(tau, math.nan) for tau in self._tolerances]
            values += [sample.slowness.get(name, math.nan), float(name in nonfinite)]
            changes = sample.changes.get(name)
            values += _NO_CHANGES if changes is None else (*map(float, changes[:-1]), CHANGE_KINDS.index(changes.kind))
        return values

    def reduce(self, encoded: Sequence[Sequence[float]]) -> list[float]:
        """Return the reduced list: the longest interval, means, and the worst rank of each layer.

        Raises:
            ValueError: the lists differ in length or in their layers.
        """
        columns = list(zip(*encoded, strict=True))
        if set(columns[0]) != {self._checksum}:
            raise ValueError("their layers differ")
        values = [self._checksum, max(columns[1])]
        for k in range(2, self._start, 2):
            values += [mean_of_present(columns[k]), max(columns[k + 1])]
        for k in range(self._start, self._start + self._width * len(self._layers), self._width):
            *block, slowness, nonfinite = columns[k : k + self._quantities + 2]
            changes = zip(*columns[k + len(block) + 2 : k + self._width], strict=True)
            uses = zip(block[_UTILIZATION], self._ranks, strict=True)
            least, worst = min(((use, rank) for use, rank in uses if not math.isnan(use)), default=(math.nan, math.nan))
            count = sum(not math.isnan(size) for size in block[_SIZE])
            slowest = max((ratio for ratio in slowness if not math.isnan(ratio)), default=math.nan)
            values += [*map(mean_of_present, block), slowest, max(nonfinite), float(count), least, float(worst)]
            values += summed_changes(changes)
        return values

    def decode(self, sample: SampleResult, values: Sequence[float]) -> tuple[SampleResult, int]:
        """Return the sample that all ranks agree on, and the interval.

        A layer counts as measured where at least one rank measured it. A layer or a metric is not finite where it is
        not finite on any rank. What ranks do not exchange (heads, positions) stays as in this rank's `sample`.
        """
        metrics, nonfinite = dict(sample.metrics), set(sample.nonfinite)
        for k, name in enumerate(self._metrics):
            mean, is_nonfinite = values[2 + 2 * k : 4 + 2 * k]
            metrics.pop(name, None)
            nonfinite.discard(name)
            if not math.isnan(mean):
                metrics[name] = mean
            if is_nonfinite:
                nonfinite.add(name)
        local = {reading.layer: reading for reading in sample.readings}
        readings, changes, slowness = [], {}, {}
        for k, name in enumerate(self._layers):
            width = self._width + 3
            *block, kind = values[self._start + k * width : self._start + (k + 1) * width]
            numbers, (batches, *sums) = block[: 1 - _SUMS], block[1 - _SUMS :]
            if not math.isnan(batches):
                changes[name] = Changes._make((int(batches), *sums, CHANGE_KINDS[int(kind)]))
            slowest, *counts = numbers[self._quantities :]
            if not math.isnan(slowest):
                slowness[name] = slowest
            pairs = zip(self._tolerances, numbers[len(_QUANTITIES) :], strict=False)
            modulation = tuple((tau, ratio) for tau, ratio in pairs if not math.isnan(ratio))
            reading = _agreed_reading(sample.step, name, local.get(name), numbers, counts, modulation)
            if reading is not None:
                readings.append(reading)
        agreed = SampleResult(sample.step, tuple(readings), metrics, frozenset(nonfinite), "", changes, slowness)
        return agreed, int(values[1])


def mean_of_present(column: Sequence[float]) -> float:
    """Return the mean over the ranks that have the number; NaN when none has.

    >>> mean_of_present([1.0, float("nan"), 3.0])
    2.0
    """
    present = [value for value in column if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def summed_changes(ranks: Iterable[Sequence[float]]) -> list[float]:
    """Return the sums of `Changes` over the ranks that have them; NaN where none has.

    Where they are of several kinds, the first of `CHANGE_KINDS` counts: the loss before outputs.

    >>> summed_changes([(2, 4.0, 0.5, 1.0, 2.0, 0.25, 0.0), (2, 6.0, 0.5, 1.0, 2.0, 0.25, 0.0), _NO_CHANGES])
    [4.0, 10.0, 1.0, 2.0, 4.0, 0.5, 0.0]
    """
    present = [numbers for numbers in ranks if not math.isnan(numbers[0])]
    if not present:
        return list(_NO_CHANGES)
    kind = min((numbers[-1] for numbers in present if numbers[0]), default=present[0][-1])
    *sums, _ = zip(*(numbers for numbers in present if numbers[-1] == kind), strict=True)
    return [*map(math.fsum, sums), kind]


def _agreed_reading(
    step: int,
    name: str,
    local: Reading | None,
    quantities: Sequence[float],
    counts: Sequence[float],
    modulation: tuple[tuple[float, float], ...],
) -> Reading | None:
    """Return a layer's reading from its numbers; `local`, which may be None, where no rank measured it."""
    nonfinite, count, least, worst = counts
    if nonfinite:
        if local is not None and local.status == "nonfinite":
            return local
        return Reading(step=step, layer=name, status="nonfinite", message="NaN or Inf on another rank")
    if count == 0:
        return local
    base = local or Reading(step=step, layer=name, status="ok")
    changes: dict[str, object] = {"status": "ok", "message": "", "ranks": int(count), "modulation_ratio": modulation}
    numbers = {**dict(zip(_QUANTITIES, quantities, strict=False)), "utilization_min_ratio": least}
    changes |= {field: None if math.isnan(number) else number for field, number in numbers.items()}
    changes["worst_rank"] = None if math.isnan(worst) else int(worst)
    return base.model_copy(update=changes)
