"""Settings of the autopilot: when it acts, how strongly, and when it stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator

from ess_monitor import validation
from ess_monitor.interventions.probation import ProbationConfig
from ess_monitor.validation.settings import Settings

Mode = Literal["off", "advise", "auto"]
"""What the autopilot may do."""
_MODES = "{!r}, {!r} or {!r}".format(*get_args(Mode))


class AutopilotConfig(Settings):
    """Sets what may be done about a collapsed layer. A bare mode ("auto") is the same as {"mode": "auto"}.

    Examples:
        >>> AutopilotConfig.model_validate("auto").mode
        'auto'
    """

    model_config = ConfigDict(allow_inf_nan=False)

    mode: Mode = "advise"
    """off: nothing. advise: say what would be done, change nothing. auto: do it. The
    default changes nothing, because nothing should act without being asked to."""
    strengths: tuple[float, ...] = Field(default=(0.5, 2.0), min_length=1)
    """lambda of the A->I regularizer, rung by rung. Any of .125, .5 and 2 rescued 5 of 5 WLA runs (Adam normalizes the
    gate's gradient, so the size hardly matters): the middle one first, then the largest."""
    alpha_factors: tuple[float, ...] = Field(default=(100.0, 10.0), min_length=1)
    """What alpha is multiplied with, rung by rung. 100 on the second layer rescued 3 of 3 GLA-S6 runs of 64 tokens; a
    second rung of 10 makes it the 1000 of the paper's table 2."""
    max_layers: int = Field(default=1, ge=1)
    """Layers that are treated at a time, the deepest collapsed one first. Treating both layers of a net is worse than
    treating the second (appendix D.3; 2 of 3 seeds against 5 of 5 in our runs): the first layer needs its locality."""
    cooldown_steps: int = Field(default=1000, ge=0)
    """Optimizer steps an action is given before the next rung. Rescued WLA runs were healthy 1000 to 1500 steps after
    the regularizer was attached."""
    release_steps: int | None = Field(default=500, ge=0)
    """Steps a recovered layer must stay healthy before its regularizer is detached; None keeps it on. Until then the
    treatment counts as one of `max_layers`, climbs on after a relapse, and is rolled back when the loss breaks; so is
    a rescaled alpha, which stays for good afterwards (with None from the recovery on)."""
    budget: int = Field(default=6, ge=0)
    """Actions per run (releases and roll-backs are free). Two layers up a ladder of two rungs, and two to spare."""
    loss_band_ratio: float | None = Field(default=3.0, gt=1)
    """Roll back when the loss passes this multiple of its value at the action. An alpha of 100 raised no loss by more
    than half in our runs, so 3 is a broken run. None: only a loss that is not finite."""
    loss: str = "loss"
    """Name of the loss in the training loop's metrics."""
    probation: ProbationConfig = ProbationConfig()
    """When a treatment is compared with the gate from before it, and taken back."""
    lag_steps: int = Field(default=10, ge=1)
    """In auto mode a sample is judged exactly this many steps after it was taken, waiting for it if need be, so that
    a resumed run and all ranks of a distributed one act at the same steps. 10 leave the worker ample time."""

    @model_validator(mode="before")
    @classmethod
    def _from_mode(cls, value: Any) -> Any:
        if isinstance(value, str) or value is False:
            return {"mode": value}
        if not isinstance(value, (Mapping, AutopilotConfig)):
            raise ValueError(f"must be {_MODES}, or a mapping of its settings (got {validation.shown(value)})")
        return value

    @field_validator("mode", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads a bare `off`

    @model_validator(mode="after")
    def _rungs_are_possible(self) -> AutopilotConfig:
        if any(not s > 0 for s in self.strengths):
            raise ValueError(f"strengths={self.strengths}: every lambda must be above 0")
        if any(not f > 0 or f == 1 for f in self.alpha_factors):
            raise ValueError(f"alpha_factors={self.alpha_factors}: every factor must be above 0 and not 1")
        return self
