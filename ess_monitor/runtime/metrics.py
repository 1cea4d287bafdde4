"""Reads what a training loop gives as metrics: numbers of every kind, on every device."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import torch

from ess_monitor import validation

logger = logging.getLogger("ess_monitor")

_MOST_REPORTED = 100
"""Metrics that are named at most: a name that changes with every step would fill the log."""
_MOST_NAMES = 1000
"""Names that are remembered at most."""


class MetricReader:
    """Reads metrics, and names each one that is no number once. What cannot be read costs nothing else.

    Numbers are those of Python (`int`, `float`, `bool`, `Fraction`, `Decimal`) and NumPy, and arrays and tensors of one
    element. None is no value yet, and left out without a word.

    Args:
        kept: name of a metric that may come at steps that are not sampled, as those of an evaluation do.

    Examples:
        >>> numbers, tensors = MetricReader().read({"loss": torch.tensor(0.5), "accuracy": 0.9, "f1": None})
        >>> numbers, tensors
        ({'accuracy': 0.9}, {device(type='cpu'): {'loss': tensor(0.5000)}})
    """

    def __init__(self, kept: str | None = None) -> None:
        self._name = validation.optional("kept", kept, str)
        self._kept: float | torch.Tensor | None = None
        """Its newest value since the last `read`."""
        self._names: set[object] = set()
        self._reported: set[str] = set()

    @property
    def names(self) -> set[str]:
        """Names of the metrics that came at steps that were not sampled."""
        return {name for name in self._names if isinstance(name, str)}

    def keep(self, metrics: object) -> None:
        """Keep the newest value of the one metric for the next `read`. Nothing is read without such a metric.

        Examples:
            >>> reader = MetricReader(kept="accuracy")
            >>> reader.keep({"accuracy": 0.9})
            >>> reader.read({"loss": 0.5})[0], reader.read({"loss": 0.5})[0]
            ({'loss': 0.5, 'accuracy': 0.9}, {'loss': 0.5})
        """
        if self._name is None or not isinstance(metrics, Mapping):
            return
        try:
            if len(self._names) < _MOST_NAMES:
                self._names.update(metrics)
            value = metrics.get(self._name)
            if value is not None:
                self._kept = _scalar(value) if isinstance(value, torch.Tensor) else _number(value)
        except Exception as error:
            self._report(f"metric {self._name:.100}", f"{error}")

    def read(self, metrics: object) -> tuple[dict[str, float], dict[torch.device, dict[str, torch.Tensor]]]:
        """Return the numbers, and by device detached copies of the tensors, which the runtime brings to the host."""
        values: dict[str, float] = {}
        tensors: dict[torch.device, dict[str, torch.Tensor]] = {}
        kept, self._kept = self._kept, None
        if kept is not None and (metrics is None or (isinstance(metrics, Mapping) and metrics.get(self._name) is None)):
            metrics = {**(metrics or {}), self._name: kept}
        if metrics is None:
            return values, tensors
        if not isinstance(metrics, Mapping):
            self._report("metrics", f"{validation.type_of(metrics)} is no mapping of names to numbers")
            return values, tensors
        for name, value in metrics.items():
            shown = f"metric {name!s:.100}"
            try:
                if not isinstance(name, str):
                    self._report(shown, f"its name is {validation.type_of(name)}; names are text")
                elif isinstance(value, torch.Tensor):
                    tensors.setdefault(value.device, {})[name] = _scalar(value)
                elif value is not None:
                    values[name] = _number(value)
            except Exception as error:
                self._report(shown, f"{error}")
        return values, tensors

    def _report(self, what: str, problem: str) -> None:
        if what not in self._reported and len(self._reported) < _MOST_REPORTED:
            self._reported.add(what)
            logger.warning(
                "ess_monitor: %s is left out: %.200s; give a number or a tensor of one element", what, problem
            )


def _scalar(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.device.type == "meta" or tensor.numel() != 1:
        kind = f"{tensor.layout}, {tensor.dtype}, shape {tuple(tensor.shape)}, {tensor.device}"
        raise TypeError(f"a tensor ({kind}) is given")
    return tensor.detach().clone().reshape(())


def _number(value: Any) -> float:
    """Return a number as a float.

    Raises:
        TypeError: it is none.
        OverflowError: no float is that large.
    """
    if not isinstance(value, numbers.Number) and getattr(value, "size", None) == 1 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"{validation.type_of(value)} is given")
    return float(value)
