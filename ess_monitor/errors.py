"""The exception tree.

    EssMonitorError
    ├── ConfigError            a setting has a value it cannot have
    ├── OperatorError          tensors do not form the operator they were given to (shape, dtype, range)
    ├── CaptureError           a module cannot be read as a sequence mixer
    │   └── NoLayersError      nothing in the model can be measured
    ├── ExporterError          a sink that was asked for cannot start
    └── CheckpointError        a saved state or checkpoint cannot be used

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
