"""What a checkpoint holds of the autopilot, and the settings under which its answers stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ess_monitor import validation
from ess_monitor.errors import CheckpointError
from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.interventions.remedy import Remedy, RemedyState
from ess_monitor.interventions.treatment import TreatmentState

STATE_VERSION = 1


class AnswerSettings(BaseModel):
    """Holds the settings that decide how the autopilot answers a collapse.

    Cool-down, release and loss band are left out: they time a treatment, and none of them makes an answer wrong.

    Examples:
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
        return self.budget == other.budget and self.same_ladders(other)

    def same_ladders(self, other: AnswerSettings) -> bool:
        """Return whether both have the same rungs."""
        return (self.strengths, self.alpha_factors) == (other.strengths, other.alpha_factors)


class AutopilotState(BaseModel):
    """Validates `Autopilot.state_dict`."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    spent: int = Field(ge=0, le=2**63 - 1)
    given_up: list[str]
    advised_layers: dict[str, bool] = Field(alias="told")
    treatments: list[TreatmentState]
    loss: str | None = None
    """Name of the loss in that run. None: it was saved before the name was."""
    settings: AnswerSettings | None = None
    """Settings of the run that was saved. None: it was saved by 0.1, which did not name them."""

    def advised_under(self, settings: AnswerSettings) -> dict[str, bool]:
        """Return the layers whose advice holds under `settings`. Unknown settings are taken for the same."""
        return self.advised_layers if self.settings in (None, settings) else {}

    def given_up_under(self, settings: AnswerSettings) -> set[str]:
        """Return the layers that stay given up under `settings`. Unknown settings are taken for the same."""
        kept = self.settings is None or self.settings.same_treatment(settings)
        return set(self.given_up) if kept else set()

    def treatment_under(
        self, config: AutopilotConfig, remedy: type[Remedy], treatment: TreatmentState
    ) -> TreatmentState:
        """Return a treatment as it goes on under the present settings.

        It takes the strength of the same rung of the present ladder, of a shorter one the last; a change that is
        permanent has been made. The loss at its start counts only against the same loss, and a comparison that is none
        of the probation's checks any more is given up.
        """
        changes: dict[str, Any] = {}
        settings, trial = self.settings, treatment.trial
        if settings is not None and not remedy.is_permanent and not settings.same_ladders(AnswerSettings.of(config)):
            ladder = remedy.strengths(config)
            changes["strength"] = ladder[min(treatment.rung, len(ladder) - 1)]
        if self.loss not in (None, config.loss):
            changes["loss_at_start"] = None
        if trial is not None and trial.check not in config.probation.checks:
            changes["trial"] = trial.model_copy(update={"compared": True})
        return treatment.model_copy(update=changes)

    def with_names(self, names: Mapping[str, str]) -> AutopilotState:
        """Return the state under the present names of the layers, without those that `names` does not have."""
        treatments = [each for each in self.treatments if each.layer in names]
        return self.model_copy(
            update={
                "given_up": [names[name] for name in self.given_up if name in names],
                "advised_layers": {names[name]: told for name, told in self.advised_layers.items() if name in names},
                "treatments": [each.model_copy(update={"layer": names[each.layer]}) for each in treatments],
            }
        )


Treated = tuple[type[Remedy], TreatmentState, RemedyState]
"""A treatment in a state: its remedy, its own state, and the remedy's."""


def read_state(
    state: Mapping[str, Any], remedies: Mapping[str, type[Remedy]], names: Mapping[str, str] | None = None
) -> tuple[AutopilotState, list[Treated]]:
    """Return the state of an autopilot, and its treatments.

    Args:
        state: what `Autopilot.state_dict` returned.
        remedies: those that the autopilot has, by name.
        names: by a layer's name in the state, the present one; layers that are not in it are left out. None: all layers
            are called as they were.

    Raises:
        CheckpointError: another version, a value that it cannot have, or a remedy that is not there.
    """
    version = state.get("version")
    if not (isinstance(version, int) and version == STATE_VERSION):
        raise CheckpointError(
            f"autopilot: state version {validation.shown_version(version)}, only {STATE_VERSION} can be read"
        )
    treated: list[Treated] = []
    inside: list[str | int] = []
    try:
        parsed = AutopilotState.model_validate(dict(state))
        parsed = parsed if names is None else parsed.with_names(names)
        for index, treatment in enumerate(parsed.treatments):
            inside = ["treatments", index]
            if treatment.action not in remedies:
                raise CheckpointError(
                    f"autopilot: the state has a treatment with {treatment.action:.200}; the remedies here are "
                    f"{', '.join(remedies)}; resume with the version that wrote it, or without the monitor's state"
                )
            remedy = remedies[treatment.action]
            treated.append((remedy, treatment, remedy.State.model_validate(treatment.model_extra)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, (*inside, *first["loc"])))
        raise CheckpointError(
            f"autopilot: the state cannot be read ({where:.200}: {first['msg']:.200}); resume without the "
            "monitor's state"
        ) from None
    return parsed, treated
