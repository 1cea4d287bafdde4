"""Finds token ids among what modules are given, and says which of them are separators."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ess_monitor.ess.modulation import POSITIONS_OF_A_TOKEN
from ess_monitor.validation.settings import Settings

_PREFERRED = ("input_ids", "token_ids", "tokens", "ids", "idx")
_OTHERS = frozenset(
    ("labels", "label", "targets", "target", "y", "token_type_ids", "position_ids", "cache_position", "segment_ids")
)
"""Arguments of whole numbers, one for each token, that are no ids."""

_MOST = 16
"""Separators, each a comparison with all tokens, and tolerances, each a curve."""

NO_IDS = "no module around it was given token ids of its (batch, length)"
SHARED = "its operator is the same whatever the tokens are"


class ModulationConfig(Settings):
    """Sets how state modulation is measured: by how much ESS falls at separators, beyond other tokens (section 4.4).

    A reading then has `modulation_ratio` for each tolerance. It costs an ESS at ten positions of a sequence for each of
    `tokens`; where a sample has no time for that it is measured at fewer, or left out.

    Examples:
        >>> ModulationConfig(separators=[0]).positions
        20
    """

    separators: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    """Ids of the tokens that end a segment of text: an end-of-text token, a period, a closing brace."""
    tolerances: tuple[Annotated[float, Field(gt=0)], ...] = (0.01, 0.1, 0.3, 1.0)
    """tau at which ESS is counted, against what `tolerance_scale` says. In the paper softmax attention modulates from
    1e-2, GLA from 1e-1 and WLA at 1.0 (figure 38): no single one shows all layers."""
    tokens: int = Field(default=2, ge=1, le=64)
    """Separators of each sequence that are looked at, and as many other tokens. 2 with the 4 sequences of a sample are
    8 of each; a curve over a run averages many samples."""

    @field_validator("separators", "tolerances")
    @classmethod
    def _are_different(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not 1 <= len(set(given)) <= _MOST:
            raise ValueError(f"must be 1 to {_MOST} different numbers")
        return tuple(sorted(set(given)))

    @property
    def positions(self) -> int:
        """At which H_i is measured in each sequence."""
        return 2 * self.tokens * POSITIONS_OF_A_TOKEN


def ids_among(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], decoder: str) -> tuple[Tensor, ...]:
    """Return the tensors among the arguments of a call that may be token ids, the likeliest first.

    Args:
        module: that is called.
        args, kwargs: of the call; batches that are mappings or lists are looked into.
        decoder: prefix of names; where a name has it, those without it are left out.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    named = [*zip([*names, *map(str, range(len(args)))], args, strict=False), *kwargs.items()]
    for _, value in tuple(named):
        if isinstance(value, Mapping):
            named += [(name, each) for name, each in value.items() if isinstance(name, str)]
        elif isinstance(value, (list, tuple)):
            named += [("", each) for each in value[:4]]
    ids = [(name, value) for name, value in named if _may_be_ids(value) and name.removeprefix(decoder) not in _OTHERS]
    of_decoder = [pair for pair in ids if pair[0].startswith(decoder)]
    ranked = sorted(of_decoder or ids, key=lambda pair: pair[0].removeprefix(decoder) not in _PREFERRED)
    return tuple(value for _, value in ranked)


def are_separators(ids: Tensor, separators: Iterable[int]) -> Tensor:
    """Return which ids are separators, without a copy from the host.

    >>> are_separators(torch.tensor([[3, 0, 5]]), [0, 5])
    tensor([[False,  True,  True]])
    """
    ids = ids.long()  # a byte cannot be compared with 256
    return reduce(torch.logical_or, (ids == separator for separator in separators))


def of_rows(ids: Tensor, batch: int, length: int) -> Tensor | None:
    """Return ids as (batch, length); None where they are of other tokens. A packed row and (length, batch) fit, too."""
    if ids.dim() == 1 and batch == 1:
        ids = ids[None]
    if ids.shape == (batch, length):
        return ids
    return ids.T if ids.shape == (length, batch) else None


def _may_be_ids(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.dim() not in (1, 2):
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
