"""What one layer's call gave: its narrowed operator, or why there is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ess_monitor.capture.causality.claims import Claim
from ess_monitor.capture.layers import Layer
from ess_monitor.errors import NotCausalError, format_error
from ess_monitor.ess import Operator
from ess_monitor.ess.cost import SampleShape
from ess_monitor.records import Status

logger = logging.getLogger("ess_monitor")


@dataclass(frozen=True)
class Captured:
    """One layer's narrowed operator of one forward pass. Its tensors are copies that no other code holds."""

    layer: Layer
    operator: Operator
    heads: tuple[int, ...]
    """Indices of the heads in `operator`."""
    channels: int
    """Number of heads of the whole layer."""
    calls_in_pass: Mapping[int, int] = field(default_factory=dict)
    """id of each layer's module -> its calls in this forward pass of the model, complete once the pass is over."""
    length: int = 0
    """Tokens of a whole sequence."""
    window: int | None = None
    """Tokens at the end of `operator` among which positions are placed. None: all."""
    claims: tuple[Claim, ...] = ()
    """Statements about the call on which the reading rests, still to be looked at."""
    unproven: str = ""
    """Why it is not known that T is lower triangular; empty where it is."""
    ready: tuple[Any, ...] = ()
    """What `ready` of the sampler gave right behind the copies."""
    shape: SampleShape | None = None
    """What the measurement is estimated to cost."""
    left_out: str = ""
    """What there was no time for, of the samples, heads and tokens that the settings ask for."""
    separators: Tensor | None = None
    """(samples, length) bool: tokens of `operator` at which state modulation is measured. None: nowhere."""
    no_separators: str = ""
    """Why it is not known which they are; empty where that is not asked for."""
    with_retention: bool = True
    """Whether it is measured with A := I, too."""

    @property
    def calls(self) -> int:
        """How often the layer was called in this forward pass. The operator is that of the first call."""
        return max(1, self.calls_in_pass.get(id(self.layer.module), 1))


@dataclass(frozen=True)
class CaptureFailure:
    """A layer that could not be read in this forward pass."""

    layer: Layer
    error: str
    cause: Exception | None = None
    """Without its traceback, whose frames would keep the activations of the step in memory. None where nothing failed:
    the layer was not called, or not on a whole sequence."""
    status: Status = "failed"
    """Of the reading."""
    was_called: bool = True
    """Whether the layer's forward was called."""


Taken = Captured | CaptureFailure
"""What a layer's call gave."""


def proven(item: Taken) -> Taken:
    """Return what a layer's call gave; a failure in the place of an operator that is not known to be causal."""
    if isinstance(item, Captured) and item.unproven:
        return failure(item.layer, NotCausalError(item.unproven))
    return item


def is_deferred(item: Taken) -> bool:
    """Return whether there was no time for a layer."""
    return isinstance(item, CaptureFailure) and item.status == "deferred"


def failure(layer: Layer, error: Exception) -> CaptureFailure:
    """Return that a layer could not be read; "skipped" where its T is not lower triangular."""
    logger.debug("ess_monitor: layer %s could not be read", layer.name, exc_info=error)
    if isinstance(error, NotCausalError):
        return CaptureFailure(layer, str(error), status="skipped")
    return CaptureFailure(layer, format_error(error), error.with_traceback(None))
