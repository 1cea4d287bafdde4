"""What the loss says of a layer, and the sums that it is computed from."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from ess_monitor.records.layers import Record


class Evidence(Record):
    """What the decay of one layer does to the loss: the same batches, run again with another A and without gradients.

    A change is `loss(with another A) - loss(with A)`, a mean over batches and ranks; above 0, the loss prefers A. Where
    there is no loss to replay, the change is KL(outputs with A || outputs with another A), in nats per output.
    """

    step: int
    """Of the sample that came with it: the first one after the last of the batches."""
    layer: str
    basis: Literal["loss", "kl"]
    """What was compared."""
    batches: int
    """Batches run again, on all ranks together."""
    base: float | None = None
    """Loss with A as it is; None by KL."""
    m50: float
    """Change with A^0.5: the state remembers more, its log decay is half."""
    m90: float
    """Change with A^0.1: the state remembers nearly all, its log decay is a tenth."""
    cut: float
    """Change with A = 0: the state forgets everything but the present token."""
    m50_error: float = 0.0
    """Standard error of `m50` over the batches."""
    far_share_ratio: float | None = None
    """`Reading.far_share_ratio` of the measurement that asked for the evidence."""
    outcome: Literal["loud", "silent", "by_choice", "unclear"]
    """loud: a collapse: what comes from afar matters, and remembering more costs nothing. silent: nothing of the past
    reaches the loss. by_choice: the loss prefers the forgetting, or what it needs is near. unclear: none of these."""
    reason: str
    """The outcome in plain words, with the numbers and thresholds."""


class StateEvidence(Record):
    """What the state dimensions of one layer are worth to the loss: the same batches, run again with a smaller state.

    A change is `loss(with a smaller state) - loss(with the whole one)`, a mean over batches and ranks. Where there is
    no loss to replay, the change is KL(outputs with the whole state || outputs with a smaller one), in nats per output.
    Left out are the state dimensions of each head that are least used.
    """

    step: int
    """Of the sample that came with it: the first one after the last of the batches."""
    layer: str
    basis: Literal["loss", "kl"]
    """What was compared."""
    batches: int
    """Batches run again, on all ranks together."""
    base: float | None = None
    """Loss with the whole state; None by KL."""
    quarter: float
    """Change without a quarter of the state dimensions, one at least."""
    half: float
    """Change without half of them, one at least."""
    whole: float
    """Change without any: the layer's output is 0."""
    quarter_error: float = 0.0
    """Standard error of `quarter` over the batches."""
    spectrum_end_ratio: float | None = None
    """`Reading.spectrum_end_ratio` of the measurement that asked for the evidence."""
    outcome: Literal["needed", "spare"]
    """needed: the last state dimensions are worth much, and more of them should be as well. spare: they are not."""
    reason: str
    """The outcome in plain words, with the numbers and thresholds."""


ChangeKind = Literal["loss", "outputs", "trial", "state_loss", "state_outputs"]
"""What changes are of. loss, outputs: of these, with another decay. state_loss, state_outputs: of these, with a smaller
state. trial: of the loss, with the gate from before a treatment; only `first` is used."""
CHANGE_KINDS: tuple[ChangeKind, ...] = get_args(ChangeKind)


class Changes(NamedTuple):
    """Holds sums over batches that were run again with something else in one layer."""

    batches: int = 0
    """0: none could be run again."""
    base: float = 0.0
    first: float = 0.0
    """With A^0.5 (`Evidence.m50`), or without a quarter of the state (`StateEvidence.quarter`)."""
    second: float = 0.0
    """With A^0.1 (`m90`), or without half of the state."""
    third: float = 0.0
    """With A = 0 (`cut`), or without the state."""
    first_squared: float = 0.0
    """Sum of the squares of each batch's `first`."""
    kind: ChangeKind = "loss"

    @property
    def first_error(self) -> float:
        """Standard error of the mean of `first` over the batches; 0 of fewer than two.

        >>> Changes(batches=2, first=1.0 + 3.0, first_squared=1.0 + 9.0).first_error
        1.0
        """
        if self.batches < 2:
            return 0.0
        mean = self.first / self.batches
        return math.sqrt(max(0.0, self.first_squared / self.batches - mean * mean) / (self.batches - 1))
