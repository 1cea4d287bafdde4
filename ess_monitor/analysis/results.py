"""Defines the results of analyses: frozen records, as rows for a data frame. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ess_monitor.exporters.terminal.shown import Shown
from ess_monitor.records import LayerInfo, Record, Status
from ess_monitor.records.dataframe import data_frame

if TYPE_CHECKING:
    from rich.table import Table

Mixer = Literal["attention", "recurrence", "filter", "other"]
"""Kind of a layer that mixes tokens."""


class AnalysisResult(Shown, Record):
    """Base of all results. `print` shows them as the table of their command, as a notebook does."""

    def __rich__(self) -> Table:
        from ess_monitor.analysis.tables import table_of

        return table_of(self)

    def rows(self) -> list[dict[str, Any]]:
        """Return the result as flat rows, all with the same keys."""
        raise NotImplementedError

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame(self.rows())


class LayerResult(Record):
    """Base of what is known of one layer."""

    layer: str
    status: Status
    message: str = ""
    """What happened, when `status` is not ok, and what else to know of the numbers."""
    operator: str = ""
    """Kind of operator, a class name of `ess_monitor.ess`."""


class LayerStates(LayerResult):
    """Base of what smaller states cost one layer."""

    operators: int = 0
    """How many operators (samples x heads or channels) were measured."""
    length: int = 0
    """Tokens that were measured, of the shortest sequence."""
    state_capacity: float | None = None
    """TSS per channel, at the middle of the sequence."""
    capacity_grows: bool = False
    """True where TSS grows with the position (softmax attention)."""


class StateError(Record):
    """What a state of one size costs a layer, for white inputs."""

    size: int
    """State dimensions per head, r."""
    floor: float
    """Relative error of the outputs, ||T - T'||_F / ||T||_F over all measured operators, below which no recurrence T'
    with this state gets."""
    error: float | None = None
    """The error that the truncated realization reaches. None where it was not computed."""


class StateFor(Record):
    """The smallest state for a relative error of the outputs."""

    relative_error: float
    """||T - T'||_F / ||T||_F at most."""
    at_least: int
    """No smaller state can do: the floor of one dimension less is above this error."""
    size: int | None = None
    """The smallest size among those of `LayerMinimalState.errors` whose truncation does."""


class LayerMinimalState(LayerStates):
    """How small the state of one layer can be. Sizes are state dimensions per head or channel."""

    rank: int | None = None
    """Largest rank(H_i) over operators and positions: the state that a recurrence for T needs (theorem 2.2). Singular
    values below the rounding of T's dtype count as 0."""
    mean_rank: float | None = None
    """Mean of the same."""
    causal_rank: int | None = None
    """Largest rank of C_i, what the inputs leave in the state: between rank(H_i) and TSS. Where no recurrence is known,
    the inputs that the trivial realization stores."""
    errors: tuple[StateError, ...] = ()
    """For sizes from 0 up to `rank`: all to 8, then four in each doubling."""
    states: tuple[StateFor, ...] = ()
    """For each relative error that was asked for."""


class MinimalStates(AnalysisResult):
    """How small the states of a model's layers can be, on one batch."""

    model: str
    """Class of the model."""
    layers: tuple[LayerMinimalState, ...]
    """In model order. A layer that could not be analyzed has another status than ok, and a message."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer and relative error."""
        rows = []
        for layer in self.layers:
            facts = layer.model_dump(exclude={"errors", "states"})
            wanted = layer.states or (None,)
            for state in wanted:
                found = dict.fromkeys(StateFor.model_fields) if state is None else state.model_dump()
                rows.append({"model": self.model, **facts, **found})
        return rows


class StudentLoss(Record):
    """What a student with a smaller state loses. Losses are ||T_s - T_t||_F^2 / ||T_t||_F^2 over all operators."""

    state_size: int
    """State dimensions of the student per head, r."""
    floor: float
    """No student gets below: max_i sum_{m>r} sigma_m(H_i)^2 / ||T_t||_F^2."""
    truncation: float
    """Loss of the truncated realization, whose matrices are of this input."""
    operator_loss: float | None = None
    """Loss of a student after its training on the operator. None where none was trained."""
    activation_loss: float | None = None
    """||y_s - y_t||^2 / ||y_t||^2 of the layer's outputs, after its training on these."""

    @property
    def summary(self) -> str:
        """The losses in percent, for tables.

        >>> StudentLoss(state_size=4, floor=0.01, truncation=0.05, operator_loss=0.1, activation_loss=0.025).summary
        '1 % (5 %) → 10 %, 2.5 %'
        """
        floor, truncation, *trained = (
            None if value is None else f"{100 * value:.2g} %"
            for value in (self.floor, self.truncation, self.operator_loss, self.activation_loss)
        )
        return f"{floor} ({truncation})" + (f" → {trained[0]}, {trained[1]}" if None not in trained else "")


class LayerCompressibility(LayerStates):
    """What students with smaller states lose of one layer."""

    students: tuple[StudentLoss, ...] = ()
    """In the order of their sizes."""


class Compressibility(AnalysisResult):
    """What students with smaller states lose of each layer of a teacher, on one batch."""

    model: str
    """Class of the teacher."""
    student_states: tuple[int, ...]
    """State sizes that were asked for, ascending."""
    operator_steps: int | None = None
    """Steps in which students were trained on the operator. None: none was trained."""
    activation_steps: int | None = None
    """The same on the layer's outputs."""
    layers: tuple[LayerCompressibility, ...]
    """In model order. A layer that could not be analyzed has another status than ok, and a message."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer and student."""
        return [
            {"model": self.model, **layer.model_dump(exclude={"students"}), **student}
            for layer in self.layers
            for student in ([each.model_dump() for each in layer.students] or [dict.fromkeys(StudentLoss.model_fields)])
        ]


class LayerReduction(LayerStates):
    """How the state of one layer was made smaller, and what its operator lost: squared, as a share of the operator."""

    state_before: int | None = None
    """State dimensions per head."""
    state_after: int | None = None
    method: str = ""
    """Which state dimensions were kept, and how."""
    operator_loss: float | None = None
    """||T - T'||_F^2 / ||T||_F^2 over the measured operators; T' is that of the smaller layer on the same inputs."""
    floor: float | None = None
    """What `distill-check` predicts at least: no recurrence with this state gets below on these operators."""
    truncation: float | None = None
    """Loss of the truncated realization, whose matrices are of this input."""
    settings: dict[str, int | float] = {}
    """Arguments with which the model, or such a layer, is built at this state size, by name."""


class Reduction(AnalysisResult):
    """What a model loses with smaller states."""

    model: str
    """Class of the model."""
    state: int
    """State dimensions that were asked for."""
    layers: tuple[LayerReduction, ...]
    """In model order. A layer that stays as it was has another status than ok, and a message."""
    before: dict[str, float | None] = {}
    """Loss and metrics of the model. None where one is not finite."""
    after: dict[str, float | None] = {}
    """The same of the smaller one."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer."""
        numbers = {f"{name}_before": value for name, value in self.before.items()}
        numbers |= {f"{name}_after": value for name, value in self.after.items()}
        return [{"model": self.model, "state": self.state, **layer.model_dump(), **numbers} for layer in self.layers]


class LayerAdvice(LayerResult):
    """What one layer of a hybrid uses, and what to try. ESS is the tolerance-ESS per head."""

    mixer: Mixer = "other"
    """Kind of layer."""
    rank: int | None = None
    """1 for the layer that uses the smallest share of what it could, and so would miss a smaller state least."""
    effective_size: float | None = None
    """Mean over samples, heads and positions."""
    largest_head: float | None = None
    """The same of the fullest head: a lower bound of the state that all heads of one size need."""
    state_capacity: float | None = None
    """TSS per head, a mean over positions."""
    capacity_grows: bool = False
    """True where TSS grows with the position (softmax attention)."""
    used_ratio: float | None = None
    """ESS as a share of the attainable size, 0 to 1: of what TSS and the length of the sequence allow."""
    retention_ratio: float | None = None
    """ESS relative to that of the same layer without its decay. None where there is no decay."""
    far_share_ratio: float | None = None
    """Share of the outputs that comes from more than an eighth of the sequence back, 0 to 1."""
    advice: str = ""
    """What to try."""
    evidence: tuple[str, ...] = ()
    """What the advice rests on."""


class HybridAdvice(AnalysisResult):
    """Advice for the layers of a hybrid, on one batch."""

    model: str
    """Class of the model."""
    tolerance: float
    """tau of the tolerance-ESS."""
    tolerance_scale: str
    """Against what tau is measured, as in `Reading`."""
    layers: tuple[LayerAdvice, ...]
    """In model order. A layer that could not be measured has another status than ok, and a message."""
    notes: tuple[str, ...] = ()
    """What holds for the whole model."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer."""
        return [
            {"model": self.model, **layer.model_dump(), "evidence": "; ".join(layer.evidence)} for layer in self.layers
        ]


class AtLength(Record):
    """One layer on the first tokens of the input. Sizes are means over samples and heads, at the midpoint."""

    length: int
    """Tokens."""
    operators: int
    """How many operators (samples x heads or channels) were measured."""
    effective_size: float | None
    """Tolerance-ESS."""
    entropy_size: float | None
    """Entropy-ESS."""
    state_capacity: float | None
    """TSS."""
    undecayed_size: float | None
    """Tolerance-ESS of the same layer without its decay. None where there is no decay."""
    decay_product_norm: float | None
    """Frobenius norm of the product of A over these tokens. None where there is no A."""


class LayerLengths(LayerResult):
    """One layer at several lengths."""

    capacity_grows: bool = False
    """True where TSS grows with the position (softmax attention)."""
    lengths: tuple[AtLength, ...] = ()
    """In ascending order."""


class LengthProfile(AnalysisResult):
    """ESS and decay of a model's layers over the length of the sequence, on one batch."""

    model: str
    """Class of the model."""
    lengths: tuple[int, ...]
    """Lengths that were asked for, ascending."""
    tolerance: float
    """tau of the tolerance-ESS."""
    tolerance_scale: str
    """Against what tau is measured, as in `Reading`."""
    layers: tuple[LayerLengths, ...]
    """In model order. A layer that could not be analyzed has another status than ok, and a message."""
    skipped: tuple[LayerInfo, ...] = ()
    """The other sequence mixers, each with the reason."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer and length."""
        return [
            {"model": self.model, **layer.model_dump(exclude={"lengths"}), **at}
            for layer in self.layers
            for at in ([each.model_dump() for each in layer.lengths] or [dict.fromkeys(AtLength.model_fields)])
        ]
