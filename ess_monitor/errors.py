"""The exception tree.

    EssMonitorError
    ├── ConfigError            a setting has a value it cannot have
    ├── OperatorError          tensors do not form the operator they were given to (shape, dtype, range)
    ├── CaptureError           a module cannot be read as a sequence mixer
    │   └── NoLayersError      nothing in the model can be measured
    ├── ExporterError          a sink that was asked for cannot start
    ├── CheckpointError        a saved state or checkpoint cannot be used
    └── PartError              with `strict=True`: a part of the monitor failed

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


class NoLayersError(CaptureError):
    """Nothing in the model can be measured."""


class ExporterError(EssMonitorError):
    """A sink that was asked for cannot start."""


class CheckpointError(EssMonitorError):
    """A saved state or a checkpoint cannot be used."""


class PartError(EssMonitorError):
    """With `strict=True`: a part of the monitor failed while the training ran. `__cause__` is what it failed with.

    Args:
        part: the part, as in the metric `ess_monitor_part_failures_total`.
        message: what failed.
    """

    def __init__(self, part: str, message: str) -> None:
        super().__init__(f"{part}: {message}; mend the cause, or set strict=False to train on without this part")
        self.part = part

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled with its text as it stands."""
        return _part_error, (self.part, *self.args)


def _part_error(part: str, text: str) -> PartError:
    error = PartError(part, "")
    error.args = (text,)
    return error


def format_error(error: BaseException) -> str:
    """Type and text of an error; an error whose text cannot be made must not become the next one.

    >>> format_error(ValueError("no"))
    'ValueError: no'
    """
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
