"""Collects what the operators of one layer show of smaller states, some operators at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.analysis.results import LayerResult
from ess_monitor.capture import CaptureConfig, Captured, CaptureFailure
from ess_monitor.config import MonitorConfig
from ess_monitor.errors import CaptureError, format_error
from ess_monitor.ess import (
    JacobianOperator,
    Operator,
    causal_singular_values,
    operator_positions,
    realize,
    squared_norm,
)
from ess_monitor.ess.realization.energy import squared_truncation_errors
from ess_monitor.ess.realization.realize import state_of_recurrence
from ess_monitor.inspection import Progress, captured_layers
from ess_monitor.records import LayerInfo, Status

ResultT = TypeVar("ResultT", bound=LayerResult)

DEFAULTS = MonitorConfig(capture=CaptureConfig(samples=2, heads=16, max_length=256))
"""Two samples, 16 heads or channels of each layer, and 256 tokens."""

LONGEST_BY_DEFAULT = 1024
"""Tokens where `capture.max_length` is "auto"."""

TOKENS_WITHOUT_RECURRENCE = 128
"""Tokens of an operator that comes from no recurrence: an SVD of every H_i costs the fourth power of the length."""

_GROUP_ELEMENTS = 1 << 22
"""Elements of A of all tokens of the operators that are realized together."""


@dataclass(frozen=True, eq=False)
class SmallerStates:
    """Holds what smaller states cost the operators of a layer, summed over them. On the CPU."""

    operator: Operator
    """One of the operators, for its kind."""
    operators: int
    length: int
    positions: int
    ranks: tuple[int, ...]
    """rank(H_i) of every operator and position."""
    causal_rank: int
    state_capacity: float
    tails: Tensor
    """(rank + 1,): sum over operators of the largest tail energy over positions, for sizes 0, 1, ... rank."""
    total: float
    """Sum of ||T||_F^2."""
    sizes: tuple[int, ...]
    """At which truncations were computed."""
    lost: Tensor
    """(sizes,): sum over operators of ||T - T_r||_F^2."""
    is_cropped: bool
    """Whether it is of fewer tokens, because no recurrence is known."""

    def facts(self, layer: str) -> dict[str, Any]:
        """Return the fields of `LayerStates`."""
        return {
            "layer": layer,
            "status": "ok",
            "message": f"of its first {TOKENS_WITHOUT_RECURRENCE} tokens" if self.is_cropped else "",
            "operator": type(self.operator).__name__,
            "operators": self.operators,
            "length": self.length,
            "state_capacity": self.state_capacity,
            "capacity_grows": self.operator.capacity_grows,
        }

    def floor(self, size: int) -> float:
        """Return the smallest ||T - T'||_F^2 / ||T||_F^2 that is possible with a state of `size`."""
        return self._ratio(self.tails[min(size, len(self.tails) - 1)])

    def truncated(self, size: int) -> float:
        """Return the same of the truncation to one of `sizes`."""
        return self._ratio(self.lost[self.sizes.index(size)])

    def _ratio(self, squares: Tensor) -> float:
        return float(squares) / self.total if self.total else 0.0


class NotAnalyzed(Exception):
    """A layer has no result; carries its status and the reason."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status: Status = status
        self.message = message


def layers_of(
    model: nn.Module,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
    config: MonitorConfig | None,
    analyze: Callable[[Captured, MonitorConfig], ResultT],
    kind: type[ResultT],
    progress: Progress | None,
) -> tuple[tuple[ResultT, ...], tuple[LayerInfo, ...]]:
    """Run a model once and analyze each of its layers.

    Args:
        model, inputs, named_inputs: what is called.
        config: `layers`, `capture`, `positions`, `tolerance` and `strict` are used.
        analyze: called with each captured layer.
        kind: of the results; that of a layer without one has its name, status and the reason alone.
        progress: passes the layers on.

    Returns:
        The results, and the mixers that are skipped.
    """
    config = validation.optional("config", config, MonitorConfig) or DEFAULTS
    if config.capture.max_length == "auto":  # of long sequences it takes rows, which are no operator of their own
        capture = config.capture.model_copy(update={"max_length": LONGEST_BY_DEFAULT})
        config = config.model_copy(update={"capture": capture})
    items, skipped = captured_layers(model, inputs, named_inputs, config, progress)
    results = []
    for item in items:
        try:
            if isinstance(item, CaptureFailure):
                raise NotAnalyzed(item.status, item.error)
            results.append(analyze(item, config))
        except NotAnalyzed as reason:
            results.append(kind(layer=item.layer.name, status=reason.status, message=reason.message))
        except Exception as error:
            if config.strict:
                raise CaptureError(f"could not analyze {item.layer.name}: {format_error(error)}") from error
            results.append(kind(layer=item.layer.name, status="failed", message=format_error(error)))
    return tuple(results), skipped


@torch.no_grad()
def smaller_states(captured: Captured, sizes: Callable[[int], Sequence[int]]) -> SmallerStates:
    """Return what smaller states cost a layer.

    Args:
        captured: the layer.
        sizes: from the largest rank that is possible to the sizes at which truncations are computed.

    Raises:
        NotAnalyzed: nothing can be said of the layer.
    """
    if isinstance(captured.operator, JacobianOperator):
        raise NotAnalyzed("skipped", "it is linearized, and its Jacobian is no operator of heads; see `profile`")
    parts = [part for part in captured.operator.longest_segments() if part.length > 1]
    if not parts:
        raise NotAnalyzed("too_short", "a sequence needs two tokens to have a state")
    if not all(bool(part.finite().all()) for part in parts):
        raise NotAnalyzed("nonfinite", "an input of its operator is NaN or infinite")
    is_cropped = False
    if state_of_recurrence(parts[0]) is None:
        is_cropped = max(part.length for part in parts) > TOKENS_WITHOUT_RECURRENCE
        parts = [part.select(length=min(part.length, TOKENS_WITHOUT_RECURRENCE)) for part in parts]
    rank = max(_largest_rank(part) for part in parts)
    chosen = tuple(sizes(rank))
    tails, lost = torch.zeros(rank + 1, dtype=torch.float64), torch.zeros(len(chosen), dtype=torch.float64)
    ranks: list[int] = []
    total, causal = 0.0, 0
    for part in (group for each in parts for group in _groups(each)):
        positions = operator_positions(part.length, "all")
        values = part.singular_values(positions)
        ranks += _rank(values).flatten().tolist()
        causal = max(causal, int(_rank(causal_singular_values(part, positions)).max()))
        tails += _tails(values.double(), rank)
        total += float(squared_norm(part).sum())
        if chosen:
            lost += squared_truncation_errors(realize(part), chosen)[0].sum((0, 1)).cpu()
    middle = parts[0].length // 2
    return SmallerStates(
        operator=parts[0],
        operators=sum(part.batch * part.heads for part in parts),
        length=min(part.length for part in parts),
        positions=min(part.length for part in parts) - 1,
        ranks=tuple(ranks),
        causal_rank=causal,
        state_capacity=float(parts[0].state_capacity([middle])[0]),
        tails=tails,
        total=total,
        sizes=chosen,
        lost=lost,
        is_cropped=is_cropped,
    )


def _largest_rank(operator: Operator) -> int:
    """Return the largest rank that the shape of H_i and the state allow."""
    side = operator.block_size * (operator.length // 2)
    state = state_of_recurrence(operator)
    return side if state is None else min(side, state)


def _groups(operator: Operator) -> Iterator[Operator]:
    together = max(1, _GROUP_ELEMENTS // (operator.length * max(1, _largest_rank(operator)) ** 2))
    samples, heads = max(1, together // operator.heads), min(together, operator.heads)
    for sample in range(0, operator.batch, samples):
        for head in range(0, operator.heads, heads):
            chosen = slice(head, min(operator.heads, head + heads))
            yield operator.select(samples=slice(sample, min(operator.batch, sample + samples)), heads=chosen)


def _rank(values: Tensor) -> Tensor:
    """Return how many singular values are above the rounding of their dtype."""
    return (values > torch.finfo(values.dtype).eps * values[..., :1]).sum(-1)


def _tails(values: Tensor, rank: int) -> Tensor:
    """Return the sum over operators of the largest tail energy over positions: (rank + 1,)."""
    tails = values.square().flip(-1).cumsum(-1).flip(-1).amax(2).sum((0, 1))
    return torch.nn.functional.pad(tails, (0, rank + 1 - tails.shape[0])).cpu()
