"""Measures state modulation: how much of its effective state-size a layer lets go of at some tokens (section 4.4).

The ratio at a token e is 1 - ESS[e+1] / mean ESS[e-3..e]: position e + 1 is the first whose past holds the token. (A
state that A_e erases is lost at position e already, which is one of the four before.) What counts is how much larger it
is at separators than at other tokens of the same sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.ess.metrics import ToleranceScale, check_tolerance, check_tolerance_scale, tolerance_ess
from ess_monitor.ess.operators.base import Operator, check_operator
from ess_monitor.ess.segments import longest_places

BEFORE = 4
"""Positions up to a token whose mean ESS that behind it is compared with."""
POSITIONS_OF_A_TOKEN = BEFORE + 1
"""At which H_i is measured for each token that is looked at."""
_MARGIN = 8
"""Tokens within this part of an end of the sequence are left out: H_i is small there whatever a layer does."""


def comparable_tokens(is_separator: Sequence[bool], first: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the separators of a sequence at which modulation can be measured, and the other tokens.

    The three tokens before each are no separators, so that of several in a row the first counts; nor is the one behind
    another token, which may erase the state before it is read. None is in the first or the last eighth of the sequence.

    Args:
        is_separator: for each token.
        first: token from which on the sequence counts.

    Examples:
        >>> comparable_tokens([token == "." for token in "ab cd. ef gh.. ij"])
        ((5, 12), (9, 10))
    """
    length = len(is_separator)
    margin = max(BEFORE, (length - first) // _MARGIN)
    separators, others = [], []
    last = first - BEFORE
    for token in range(first, length - margin):
        is_comparable = token - last >= BEFORE and token >= first + margin
        if is_separator[token]:
            separators += [token] * is_comparable
            last = token
        elif is_comparable and not is_separator[token + 1]:
            others.append(token)
    return tuple(separators), tuple(others)


def evenly_chosen(tokens: Sequence[int], count: int) -> tuple[int, ...]:
    """Return `count` of the tokens, or all where there are fewer, evenly spaced among them.

    >>> evenly_chosen(range(12), 2), evenly_chosen([3], 2)
    ((3, 9), (3,))
    """
    taken = min(count, len(tokens))
    return tuple(tokens[(2 * k + 1) * len(tokens) // (2 * taken)] for k in range(taken))


@dataclass(frozen=True, eq=False)
class ModulationSums:
    """Holds sums over operators and tokens; those of several sequences add up. On the host."""

    sizes: Tensor
    """(2, 2, tolerances) float64: at separators and at other tokens; tolerance-ESS behind the token, and the mean of it
    at the positions before."""
    tokens: Tensor
    """(2,) int64: how many separators and other tokens there were, over all sequences."""


@torch.no_grad()
def modulation_sums(
    operator: Operator,
    is_separator: Tensor,
    tolerances: Sequence[float],
    *,
    tokens: int = 2,
    window: int | None = None,
    tolerance_scale: ToleranceScale = "absolute",
) -> ModulationSums:
    """Return the ESS right behind and before a few separators, and a few other tokens, of each sequence.

    Reads `is_separator`, and the `segments` of the operator, on the host. Of packed rows the longest sequence counts.
    Singular values within 1e-4 of a tolerance may count or not.

    Args:
        operator: on the CPU, of a kind whose singular values can be computed at any position.
        is_separator: (batch|1, length) bool.
        tolerances: each above 0.
        tokens: separators, and as many others, of each sequence at most.
        window: tokens at the end of each sequence that are looked at. None: all.
        tolerance_scale: as in `measure`.

    Raises:
        OperatorError: `is_separator` does not fit the operator.
        ConfigError: a tolerance or number is out of range.

    Examples:
        >>> from ess_monitor.ess import DiagonalRecurrence
        >>> decay, keys = torch.zeros(1, 1, 24, 1), torch.eye(4).repeat(1, 1, 6, 1)
        >>> decay[:, :, 12] = -50.0  # token 12 erases the state
        >>> found = modulation_sums(DiagonalRecurrence(decay, keys, keys), torch.arange(24)[None] == 12, [1e-3])
        >>> found.tokens.tolist(), [round(ratio, 2) for ratio in modulation_ratios(found)]
        ([1, 2], [0.48])
    """
    check_operator(operator)
    check_tolerance_scale(tolerance_scale)
    given = validation.listed("tolerances", tolerances, hint="such as 0.01 and 0.1")
    given = tuple(check_tolerance(each, "tolerances") for each in given)
    tokens = validation.whole("tokens", tokens, 1)
    if not isinstance(is_separator, Tensor) or tuple(is_separator.shape[1:]) != (operator.length,):
        raise OperatorError(
            f"is_separator is {validation.shown(is_separator)}; pass a flag for each token, ({operator.batch}|1, "
            f"{operator.length})."
        )
    flags = is_separator.tolist()
    sums = torch.zeros(2, 2, len(given), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    for row, start, part in longest_sequences(operator, len(flags)):
        marks = flags[row if len(flags) > 1 else 0][start : start + part.length]
        first = 0 if window is None else max(0, part.length - window)
        chosen = [evenly_chosen(each, tokens) for each in comparable_tokens(marks, first)]
        if all(chosen):
            sums += _sizes(part, chosen, given, tolerance_scale)
            counts += torch.tensor([len(each) for each in chosen])
    return ModulationSums(sums, counts)


def modulation_ratios(sums: ModulationSums) -> list[float | None]:
    """Return for each tolerance by how much more of its ESS a layer lets go of at separators than at other tokens.

    1 - ESS behind / ESS before, at separators less the same at other tokens: 0 where separators are tokens like others,
    up to 1 where they erase the state. Sizes are averaged before the division. None where no size before is above 0.
    """
    found: list[float | None] = []
    for (behind, before), (other_behind, other_before) in zip(*sums.sizes.mT.tolist(), strict=True):
        is_known = before > 0 and other_before > 0
        found.append(float(other_behind / other_before - behind / before) if is_known else None)
    return found


def longest_sequences(operator: Operator, rows: int) -> Iterator[tuple[int, int, Operator]]:
    """Yield the row, the first token and the operator of every sequence that is the longest in its row.

    Args:
        operator: whose `segments` the host may read.
        rows: how many there are, where all have the same operator.
    """
    places, are_shared = {(0, operator.length): list(range(max(rows, operator.batch)))}, False
    if operator.segments is not None:
        places, are_shared = longest_places(operator._spans()), operator.segments.shape[0] == 1
    for (start, stop), found in places.items():
        part = operator if operator.segments is None else operator._segment(found, start, stop)
        found = list(range(max(rows, part.batch))) if are_shared else found
        for k, row in enumerate(found):
            yield row, start, part.select(samples=[k]) if part.batch > 1 else part


def _sizes(
    operator: Operator, chosen: Sequence[Sequence[int]], tolerances: Sequence[float], scale: ToleranceScale
) -> Tensor:
    """Return the `sizes` of one sequence."""
    positions = sorted({token + 1 - back for tokens in chosen for token in tokens for back in range(BEFORE + 1)})
    whole = operator.with_unit_rows() if scale == "output" else operator
    values = whole._singular_values(positions, operator.finite(), min(tolerances))
    sizes = torch.stack([tolerance_ess(values, each).double().sum((0, 1)) for each in tolerances], dim=-1)
    at = {position: sizes[k] for k, position in enumerate(positions)}
    sums = []
    for tokens in chosen:
        behind = torch.stack([at[token + 1] for token in tokens]).sum(0)
        before = torch.stack([at[token - back] for token in tokens for back in range(BEFORE)]).sum(0) / BEFORE
        sums.append(torch.stack([behind, before]))
    return torch.stack(sums)
