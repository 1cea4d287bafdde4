"""Defines the results of analyses of state modulation and of shots in a prompt. Loads no torch."""

from __future__ import annotations

from typing import Any

from ess_monitor.analysis.results import AnalysisResult, LayerResult
from ess_monitor.records import LayerInfo, Record

OFFSETS = tuple(range(-6, 8))
"""Positions around a separator e that are shown, counted from e: at 1 the past holds the separator."""


class ModulationAt(Record):
    """By how much the ESS of one layer falls at separators, at one tolerance."""

    tolerance: float | None
    """tau of the tolerance-ESS. None: of the entropy-ESS."""
    ratio: float | None
    """State modulation: `at_separators - elsewhere`. None where no size before the tokens is above 0."""
    standard_error: float | None
    """Bootstrap error of the ratio, over separators and other tokens. None with fewer than two of either."""
    at_separators: float | None
    """1 - ESS[e+1] / mean ESS[e-3..e] at separators e, sizes summed over all of them and over heads."""
    elsewhere: float | None
    """The same at other tokens."""
    around: tuple[float | None, ...] = ()
    """Mean ESS at the positions e + `OFFSETS`, over all separators that have such a position, per head."""
    along: tuple[float, ...] = ()
    """Mean ESS over heads at the positions 1, 2, ... of the first sequence."""


class LayerModulation(LayerResult):
    """State modulation of one layer."""

    operators: int = 0
    """How many operators (samples x heads or channels) were measured."""
    separators: int = 0
    """At how many separators."""
    others: int = 0
    """At how many other tokens."""
    modulation: tuple[ModulationAt, ...] = ()
    """One for each tolerance, and at last that of the entropy-ESS."""


class Substitution(Record):
    """The same text with another token in the place of every separator."""

    token: int
    """Id of the token."""
    label: str
    """The token as text, or its id."""
    layers: tuple[LayerModulation, ...]
    """In model order, at the places where the separators were."""


class StateModulation(AnalysisResult):
    """State modulation of a model's layers, on one batch."""

    model: str
    """Class of the model."""
    separators: tuple[int, ...]
    """Token ids."""
    tolerance_scale: str
    """Against what tau is measured, as in `Reading`."""
    layers: tuple[LayerModulation, ...]
    """In model order. A layer that could not be analyzed has another status than ok, and a message."""
    substitutions: tuple[Substitution, ...] = ()
    """In the order in which they were asked for."""
    places: tuple[int, ...] = ()
    """Where separators stand in the first sequence."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer and tolerance, and for each substitution."""
        rows = []
        for label, layers in (("", self.layers), *((each.label, each.layers) for each in self.substitutions)):
            for layer in layers:
                facts = layer.model_dump(exclude={"modulation"})
                found = [each.model_dump(exclude={"around", "along"}) for each in layer.modulation]
                empty = dict.fromkeys(name for name in ModulationAt.model_fields if name not in ("around", "along"))
                rows += [{"model": self.model, "substitute": label, **facts, **each} for each in found or [empty]]
        return rows


class AtShots(Record):
    """ESS of one layer at the question, behind so many shots."""

    shots: int
    """Solved examples before the question."""
    tokens: int
    """Of the whole prompt."""
    effective_size: float
    """Tolerance-ESS, a mean over positions of the question and over heads."""
    entropy_size: float
    """Entropy-ESS, likewise."""
    offsets: tuple[int, ...]
    """Tokens of the question that the past holds, at each position."""
    along: tuple[float, ...]
    """Tolerance-ESS at each of `offsets`, a mean over heads."""


class LayerShots(LayerResult):
    """One layer behind several numbers of shots."""

    at: tuple[AtShots, ...] = ()
    """By the number of shots, ascending."""


class ShotsProfile(AnalysisResult):
    """ESS of a model's layers at a question, over the number of shots before it."""

    model: str
    """Class of the model."""
    question: int
    """Tokens of the question."""
    tolerance: float
    """tau of the tolerance-ESS."""
    tolerance_scale: str
    """Against what tau is measured, as in `Reading`."""
    layers: tuple[LayerShots, ...]
    """In model order. A layer that could not be analyzed has another status than ok, and a message."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer and number of shots."""
        shown = ("shots", "tokens", "effective_size", "entropy_size")
        return [
            {"model": self.model, **layer.model_dump(exclude={"at"}), **at}
            for layer in self.layers
            for at in ([each.model_dump(include=set(shown)) for each in layer.at] or [dict.fromkeys(shown)])
        ]
