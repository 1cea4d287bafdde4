"""What the loss says of a layer, and the sums that it is computed from."""

from __future__ import annotations

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
    """loud: a collapse: the past matters, and remembering more costs nothing. silent: nothing of the past reaches the
    loss; a collapse if the task is unsolved. by_choice: the loss prefers the forgetting. unclear: none of these."""
    reason: str
    """The outcome in plain words, with the numbers and thresholds."""


ChangeKind = Literal["loss", "outputs", "trial"]
"""What changes are of. loss, outputs: of these, with another decay. trial: of the loss, with the gate from before a
treatment; only `m50` is used."""
CHANGE_KINDS: tuple[ChangeKind, ...] = get_args(ChangeKind)


class Changes(NamedTuple):
    """Holds sums over batches that were run again with another decay of one layer; the terms of `Evidence`."""

    batches: int = 0
    """0: none could be run again."""
    base: float = 0.0
    m50: float = 0.0
    m90: float = 0.0
    cut: float = 0.0
    m50_squared: float = 0.0
    """Sum of the squares of each batch's `m50`."""
    kind: ChangeKind = "loss"
