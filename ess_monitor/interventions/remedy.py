"""The interface between the autopilot and what it can do to a layer.

The autopilot asks every remedy the same questions (match, obstacle, strengths), applies it rung by rung, and undoes or
detaches it. It knows none of them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from ess_monitor.capture import Layer
from ess_monitor.errors import format_error
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.records import ActionKind

GradScale = Callable[[], "float | torch.Tensor"]
"""What the loss is multiplied with before backward; asked in every pass."""
OnFailure = Callable[[str, Exception], None]
"""Receives what failed, in words, and the error."""


class RemedyState(BaseModel):
    """Validates the keys that a remedy adds to the state of its treatment. This base ignores them all."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)


class Remedy(ABC):
    """Changes one layer so that its state keeps more of the past, and can undo the change.

    The autopilot makes one instance for every layer that it treats. A new remedy is a subclass in a file of its own, a
    line in `remedies.REMEDIES`, and its name in `records.ActionKind`.

    Args:
        layer: the layer to treat; `match` is true for it.
        grad_scale: what the loss is multiplied with before backward (loss scale, 1 / accumulation steps).
        on_failure: called when the remedy fails where nothing may be raised, in the thread of the failure.
    """

    name: ClassVar[ActionKind]
    """The action in records, events, metrics and checkpoints."""
    subject: ClassVar[str]
    """What is attached or changed, in one word for messages: "regularizer"."""
    ladder: ClassVar[tuple[float, ...]] = (1.0,)
    """Strengths, rung by rung, of a remedy that has no setting of its own for them."""
    is_permanent: ClassVar[bool] = False
    """Whether the change outlasts the treatment. If not, `detach` ends it, and the layer is said to be released."""
    State: ClassVar[type[RemedyState]] = RemedyState
    """Validates what `state_dict` returned."""

    def __init__(
        self,
        layer: Layer,
        grad_scale: GradScale = lambda: 1.0,
        on_failure: OnFailure = lambda message, error: None,
    ) -> None:
        self.layer = layer
        self.grad_scale = grad_scale
        self._on_failure = on_failure

    @classmethod
    @abstractmethod
    def match(cls, layer: Layer) -> bool:
        """Return whether the layer has the handle that this remedy needs."""

    @classmethod
    def is_second_choice(cls, layer: Layer) -> bool:
        """Return whether any other remedy that matches the layer is to be preferred, wherever it is in the list."""
        return False

    @classmethod
    def obstacle(cls, layer: Layer) -> str:
        """Return why a matching layer cannot be treated as it is set up here, or an empty string."""
        return ""

    @classmethod
    def strengths(cls, config: AutopilotConfig) -> tuple[float, ...]:
        """Return the strength of every rung, the first one first."""
        return cls.ladder

    @classmethod
    @abstractmethod
    def describe(cls, strength: float) -> str:
        """Return what `apply` does at this strength, in words."""

    @abstractmethod
    def apply(self, strength: float, optimizer: Optimizers) -> None:
        """Apply a rung; a later one comes on top of, or in place of, the one before."""

    @abstractmethod
    def undo(self, optimizer: Optimizers) -> None:
        """Restore the layer as it was before the first rung; may raise where that is impossible."""

    def detach(self) -> None:  # noqa: B027 - a change of a parameter has nothing to detach
        """Leave the forward pass, if the remedy is in it. The next `apply` may enter it again."""

    @property
    def failure(self) -> Exception | None:
        """The error with which the remedy stopped working in a pass since the last rung.

        Such a failure must leave activations and gradients as they are without the remedy.
        """
        return None

    def report_failure(self, what: str, error: Exception) -> None:
        """Report an error that must not be raised."""
        self._on_failure(f"{what} on {self.layer.name}: {format_error(error)}", error)

    def state_dict(self) -> dict[str, Any]:
        """Return what `resume` needs, as plain values and tensors.

        The keys stand beside those of `Treatment.state_dict`. These two are in every treatment of state version 1.
        """
        return {"copy": None, "factor": 1.0}

    @abstractmethod
    def resume(self, strength: float, state: Any) -> None:
        """Go on after a restart, with the model's weights loaded.

        Args:
            strength: that of the present rung.
            state: an instance of `State`.
        """
