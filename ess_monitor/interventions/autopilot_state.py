"""What a checkpoint holds of the autopilot, and the settings under which its answers stand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.interventions.treatment import TreatmentState


class AnswerSettings(BaseModel):
    """Holds the settings that decide how the autopilot answers a collapse.

    Cool-down, release and loss band are left out: they time a treatment, and none of them makes an answer wrong.

    Example:
        >>> one, two = (AnswerSettings.of(AutopilotConfig(max_layers=layers)) for layers in (1, 2))
        >>> one == two, one.same_treatment(two)
        (False, True)
    """

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    mode: Literal["off", "advise", "auto"]
    budget: int = Field(ge=0)
    strengths: tuple[FiniteFloat, ...]
    alpha_factors: tuple[FiniteFloat, ...]
    max_layers: int = Field(ge=1)

    @classmethod
    def of(cls, config: AutopilotConfig) -> AnswerSettings:
        """Return those of a configuration."""
        return cls.model_validate({name: getattr(config, name) for name in cls.model_fields})

    def same_treatment(self, other: AnswerSettings) -> bool:
        """Return whether a treatment would take the same course under both: the same rungs, as many actions."""
        return all(getattr(self, name) == getattr(other, name) for name in ("budget", "strengths", "alpha_factors"))


class AutopilotState(BaseModel):
    """Validates `Autopilot.state_dict`."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    spent: int = Field(ge=0, le=2**63 - 1)
    given_up: list[str]
    advised_layers: dict[str, bool] = Field(alias="told")
    treatments: list[TreatmentState]
    settings: AnswerSettings | None = None
    """Settings of the run that was saved. None: it was saved by 0.1, which did not name them."""

    def advised_under(self, settings: AnswerSettings) -> dict[str, bool]:
        """Return the layers whose advice holds under `settings`. Unknown settings are taken for the same."""
        return self.advised_layers if self.settings in (None, settings) else {}

    def given_up_under(self, settings: AnswerSettings) -> set[str]:
        """Return the layers that stay given up under `settings`. Unknown settings are taken for the same."""
        kept = self.settings is None or self.settings.same_treatment(settings)
        return set(self.given_up) if kept else set()
