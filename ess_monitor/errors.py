"""Defines the exceptions of this package; each inherits from `EssMonitorError`.

Every message names the argument, the value that was given, what is allowed, and what to do next.
"""

from __future__ import annotations


class EssMonitorError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(EssMonitorError, ValueError):
    """A setting has a value it cannot have."""


class OperatorError(EssMonitorError, ValueError):
    """Tensors do not form the operator they were given to: shape, dtype or range."""


class CaptureError(EssMonitorError):
    """A module cannot be read as a sequence mixer."""


class NotCausalError(CaptureError):
    """A layer's T is not lower triangular, or is not known to be: no state carries the past, so ESS is not defined."""


class NoLayersError(CaptureError):
    """Nothing in the model can be measured."""


class ExporterError(EssMonitorError):
    """A sink that was asked for cannot start."""


class CheckpointError(EssMonitorError):
    """A saved state or a checkpoint cannot be used."""


class PartError(EssMonitorError):
    """With `strict=True`: a part of the monitor failed while the training ran. `__cause__` is the original error.

    Args:
        part: the part, as in the metric `ess_monitor_part_failures_total`.
        message: what failed.
    """

    def __init__(self, part: str, message: str) -> None:
        super().__init__(part, message)
        self.part = part

    def __str__(self) -> str:
        if len(self.args) != 2:  # somebody has set others
            return super().__str__()
        part, message = self.args
        return f"{part}: {message}; fix the cause, or set strict=False to train on without this part"


def format_error(error: BaseException) -> str:
    """Return type and text of an error, or its type alone where making the text fails.

    >>> format_error(ValueError("no"))
    'ValueError: no'
    """
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
