"""What the ranks tell each other of one sample, and what it comes to: a flat list of numbers either way.

A post holds a checksum of the layers' names and the interval a rank wants, then value and brokenness of each metric,
then seven quantities of each layer and whether it holds NaN or Inf. What the posts come to holds the same, and three
more numbers of each layer: how many ranks measured it, the smallest utilization among them, and the rank it was seen
on. NaN stands for a number that a rank does not have.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from ess_monitor.records import Reading, SampleResult

_QUANTITIES = (
    "state_capacity",
    "attainable_size",
    "effective_size",
    "entropy_size",
    "utilization_ratio",
    "retention_ratio",
    "mean_decay",
)
"""Fields of a reading that become means over the ranks. Diagnosis and autopilot decide on these."""
_SIZE, _UTILIZATION = _QUANTITIES.index("effective_size"), _QUANTITIES.index("utilization_ratio")
_WIDTH = len(_QUANTITIES) + 1
"""Of a layer in a post: the quantities, and 1 where its state is not finite."""
_MORE = 3


class RankReduction:
    """Evidence as numbers that can be exchanged, and back.

    Args:
        layers: names of the measured layers, the same on all ranks.
        metrics: names of the training loop's metrics that are decided on.
        ranks: who posts, in the order of the posts.

    Example:
        >>> from ess_monitor.records import Reading
        >>> ballot = RankReduction(["mixer"], [], ranks=(0, 4))
        >>> def seen(use):
        ...     reading = Reading(step=7, layer="mixer", status="ok", effective_size=8 * use, utilization_ratio=use)
        ...     return SampleResult(7, (reading,))
        >>> values = ballot.fold([ballot.post(seen(0.75), 100), ballot.post(seen(0.25), 120)])
        >>> both, interval = ballot.read(seen(0.75), values)
        >>> (reading,) = both.readings
        >>> reading.utilization_ratio, reading.utilization_min_ratio, reading.worst_rank, reading.ranks, interval
        (0.5, 0.25, 4, 2, 120)
    """

    def __init__(self, layers: Sequence[str], metrics: Sequence[str], ranks: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._metrics = tuple(dict.fromkeys(metrics))
        self._ranks = tuple(ranks)
        self._checksum = float(zlib.crc32("\n".join(self._layers).encode()))
        self._start = 2 + 2 * len(self._metrics)

    def post(self, evidence: SampleResult, interval_steps: int) -> list[float]:
        """What this rank tells the others."""
        values = [self._checksum, float(interval_steps)]
        for name in self._metrics:
            values += [evidence.metrics.get(name, math.nan), float(name in evidence.nonfinite)]
        mine = {reading.layer: reading for reading in evidence.readings if reading.status == "ok"}
        broken = {reading.layer for reading in evidence.readings if reading.status == "nonfinite"}
        for name in self._layers:
            values += [_number(getattr(mine.get(name), quantity, None)) for quantity in _QUANTITIES]
            values.append(float(name in broken))
        return values

    def fold(self, posts: Sequence[Sequence[float]]) -> list[float]:
        """What the posts come to: the longest interval, means, and the worst rank of each layer.

        Raises:
            ValueError: they are not of one length, or of other layers.
        """
        columns = list(zip(*posts, strict=True))
        if set(columns[0]) != {self._checksum}:
            raise ValueError("their layers differ")
        values = [self._checksum, max(columns[1])]
        for k in range(2, self._start, 2):
            values += [agreed_mean(columns[k]), max(columns[k + 1])]
        for k in range(self._start, self._start + _WIDTH * len(self._layers), _WIDTH):
            *block, broken = columns[k : k + _WIDTH]
            seen = [(use, rank) for use, rank in zip(block[_UTILIZATION], self._ranks, strict=True) if use == use]
            least, worst = min(seen, default=(math.nan, math.nan))
            count = sum(size == size for size in block[_SIZE])
            values += [*(agreed_mean(column) for column in block), max(broken), float(count), least, float(worst)]
        return values

    def read(self, evidence: SampleResult, values: Sequence[float]) -> tuple[SampleResult, int]:
        """What this rank makes of it: evidence that is the same on all of them, and the interval.

        A layer counts as measured where at least one rank measured it; a layer or a metric is non-finite where it is on
        any rank.
        """
        numbers, broken = dict(evidence.metrics), set(evidence.nonfinite)
        for k, name in enumerate(self._metrics):
            mean, is_broken = values[2 + 2 * k : 4 + 2 * k]
            numbers.pop(name, None)
            if not math.isnan(mean):
                numbers[name] = mean
            broken = broken | {name} if is_broken else broken - {name}
        mine = {reading.layer: reading for reading in evidence.readings}
        width = _WIDTH + _MORE
        readings = []
        for k, name in enumerate(self._layers):
            block = values[self._start + k * width : self._start + (k + 1) * width]
            means, (is_broken, count, least, worst) = block[: len(_QUANTITIES)], block[len(_QUANTITIES) :]
            local = mine.get(name)
            if is_broken:
                readings.append(_broken(evidence.step, name, local))
                continue
            if count == 0:
                readings += [local] if local is not None else []
                continue
            base = local or Reading(step=evidence.step, layer=name, status="ok")
            changes = {quantity: _value(mean) for quantity, mean in zip(_QUANTITIES, means, strict=True)}
            spread = {"ranks": int(count), "utilization_min_ratio": _value(least)}
            who = {"worst_rank": None if math.isnan(worst) else int(worst)}
            readings.append(base.model_copy(update={**changes, **spread, **who, "status": "ok", "message": ""}))
        agreed = SampleResult(evidence.step, tuple(readings), numbers, frozenset(broken))
        return agreed, int(values[1])


def agreed_mean(column: Sequence[float]) -> float:
    """Mean over the ranks that have the number; NaN when none has.

    >>> agreed_mean([1.0, float("nan"), 3.0])
    2.0
    """
    present = [value for value in column if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


def _broken(step: int, name: str, local: Reading | None) -> Reading:
    """Without sizes, as on a rank that saw it."""
    if local is not None and local.status == "nonfinite":
        return local
    return Reading(step=step, layer=name, status="nonfinite", message="NaN or Inf on another rank")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _value(number: float) -> float | None:
    return None if math.isnan(number) else number
