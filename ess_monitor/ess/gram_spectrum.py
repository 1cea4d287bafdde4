"""Computes singular values from eigenvalues of Gram matrices, and says of which matrices they are known well enough.

The eigenvalues of H^T H are the squares of the singular values of H, at half the time of an SVD. Rounding moves every
eigenvalue by up to an error e, a few units in the last place of the largest one. So sigma is known to e / (2 sigma),
and a singular value below sqrt(e) is not known at all. What is counted, averaged or drawn here decides whether that is
enough (`known_values`); a matrix of which it is not is left to the caller, who takes the SVD.

Everything here is for a CPU: which matrices are known is read on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ess_monitor.ess.gramian import Diagonal, recurrence_singular_values
from ess_monitor.ess.linalg import SLAB_ELEMENTS, LinAlgError, slabs, working_dtype
from ess_monitor.ess.metrics import tolerance_ess

SINGLE_PRECISION = torch.finfo(torch.float32).eps
"""Share of the largest singular value below which the others mean nothing: features are single precision at best, and
an error of that size in T moves every singular value by as much (Weyl)."""

DECADES = (-2, -1, 0, 1, 2)
"""Powers of ten times the tolerance at which the values are counted."""

FAR_BELOW = 10.0 ** DECADES[0]
"""Share of the tolerance below which nothing is counted."""

LARGEST_LOSS = -10.0
"""Least mean log decay of the N tokens before a position and the N after it, together, for Gramians to be tried."""

GRAMIAN_TOKENS = 256
"""Tokens of a window of which a Gramian is formed at once."""

_ROUNDING = 16 * torch.finfo(torch.float64).eps
"""Error of the eigenvalues of a Gram matrix, as a share of the largest. Measured: below 2 units for small ones."""
_ROUNDING_OF_PRODUCT = _ROUNDING / 2
"""The same for a product of Gramians, as a share of the product of their Frobenius norms. Measured: below 1.1 units."""
_RELATIVE = 1e-3
"""Error of a singular value that is always allowed, as a share of itself."""
_ENTROPY = 5e-6
"""Error of the entropy that is allowed, in nats: the relative error of the entropy-ESS."""
_SMALLEST = 1e-270
"""Largest square below which products may underflow."""


def known_values(squares: Tensor, error: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return singular values, descending, and of which matrices all of them are known well enough.

    Then the counts above the tolerance, ten and a hundred times more and less, are those of the exact values, and the
    entropy-ESS is right to 5e-6 of itself. A value is right to 1e-3 of itself, or to what rounding of a Gram matrix
    makes of it: one that is a share x of the largest to 4e-15 / x^2 of itself, which is 0.4 % of a millionth. Values
    that may be 0 are 0; they are below `smallest_known`.

    Args:
        squares: (..., n), ascending, with an error of up to `error` (...) and 16 units in the last place.
        tolerance: tau of the tolerance-ESS.

    Returns:
        (..., n) and (...), bool.
    """
    squares = squares.flip(-1)
    positive = squares.clamp(min=0.0)
    error = torch.add(error[..., None], positive, alpha=_ROUNDING)
    lost = squares <= 3 * error
    values = positive.masked_fill(lost, 0.0).sqrt_()
    off = (values - torch.where(lost, positive + error, positive - error).sqrt_()).abs_()
    counted_at = values.new_tensor([[tolerance * 10.0**power] for power in DECADES])
    known = ((values[..., None, :] - counted_at).abs_() > off[..., None, :]).all(-2)
    small = values + off <= smallest_known(values[..., :1], tolerance)
    right = off * values <= torch.maximum(_ROUNDING * squares[..., :1], _RELATIVE * squares)
    known &= small | (right > lost)
    total = values.sum(-1, keepdim=True)
    logs = (torch.maximum(values, off) / total).log_()
    entropy = (values * logs).sum(-1) / total[..., 0]  # less than 0
    error_of_entropy = ((off * logs).sum(-1) + entropy * off.sum(-1)) / -total[..., 0]
    # Each of these is False where a square is not finite.
    return values, known.all(-1) & (error_of_entropy <= _ENTROPY) & (squares[..., 0] > _SMALLEST)


def smallest_known(largest: Tensor, tolerance: float) -> Tensor:
    """Return below what it does not matter how small a singular value is, given the largest.

    That is single precision's share of the largest, or where it is less the smallest tolerance at which is counted.
    """
    floor = SINGLE_PRECISION * largest
    return floor.clamp(max=FAR_BELOW * tolerance) if tolerance > 0 else floor


def mean_spectrum(values: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Return one spectrum for a layer: the geometric mean of each singular value over samples and heads.

    It is drawn on a logarithmic axis, where this is the mean of what is drawn: one large head does not hide the others,
    and the spectrum crosses the tolerance near the mean ESS. A value counts as no less than a floor, so that one dead
    head does not make a zero of the whole: single precision's share of the layer's largest value, and at most a
    hundredth of the tolerance. Where nothing is above the floor, the mean is 0.

    Args:
        values: (batch, heads, rank), at one position.
        tolerance: tau of the tolerance-ESS.

    Returns:
        (rank,)

    Examples:
        >>> mean_spectrum(torch.tensor([[[8.0, 1.0, 0.0], [2.0, 0.25, 0.0]]]))
        tensor([4.0000, 0.5000, 0.0000])
    """
    floor = smallest_known(values.amax(), tolerance)
    mean = values.clamp(min=floor).log().mean((0, 1)).exp()
    return torch.where((values > floor).any(0).any(0), mean, 0.0)


def values_of_gram(gram: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return `known_values` of matrices with these Gram matrices, (..., n, n) -> (..., n) and (...)."""
    # No other entry is larger than the largest on the diagonal, and one that is NaN has made it NaN.
    finite = gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    squares = _eigenvalues(gram if bool(finite.all()) else torch.where(finite[..., None, None], gram, 0.0))
    values, known = known_values(squares, _ROUNDING * squares[..., -1], tolerance)
    return values, known & finite


def values_of_product(controllability: Tensor, observability: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return `known_values` of O C from the Gramians C C^T and O^T O of its factors: (..., n, n) -> (..., n), (...)."""
    product, error, finite = _product(controllability, observability)
    values, known = known_values(_eigenvalues(product), error, tolerance)
    return values, known & finite


def count_of_product(controllability: Tensor, observability: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return how many singular values of O C are above the tolerance, and where this is known: (...) each."""
    known = _all_above(controllability, observability, tolerance)
    count = controllability.new_full(known.shape, controllability.shape[-1])
    if not bool(known.all()):
        rest, each = ~known, (*known.shape, -1, -1)
        controllability, observability = controllability.expand(each)[rest], observability.expand(each)[rest]
        count[rest], known[rest] = _count_of_product(controllability, observability, tolerance)
    return count, known


def _all_above(controllability: Tensor, observability: Tensor, tolerance: float) -> Tensor:
    """Return (...) bool: where the smallest singular values of O and of C show that those of O C are above tau."""
    means = [gramian.diagonal(dim1=-2, dim2=-1).mean(-1) for gramian in (controllability, observability)]
    ratio = (means[0] / means[1]).sqrt()
    above = ratio.isfinite()
    for gramian, mean, least in (
        (controllability, means[0], tolerance * ratio),
        (observability, means[1], tolerance / ratio),
    ):
        # Over all that share the Gramian, so that it is factorized once.
        shared = [d for d, size in enumerate(gramian.shape[:-2]) if size == 1]
        least = least.amax(shared, keepdim=True) if shared else least
        shift = (1 + _ROUNDING) * least + _ROUNDING * gramian.shape[-1] * mean
        above = above & _is_above(gramian.clone(), shift)
    return above


def _is_above(gram: Tensor, least: Tensor) -> Tensor:
    """Return (...) bool: where all eigenvalues are above `least` (...). Overwrites `gram` (..., n, n)."""
    gram.diagonal(dim1=-2, dim2=-1).sub_(least[..., None])
    above: Tensor = torch.linalg.cholesky_ex(gram).info == 0
    return above


def _count_of_product(controllability: Tensor, observability: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    product, error, known = _product(controllability, observability)
    square = tolerance * tolerance
    error = error + _ROUNDING * square
    all_above = _is_above(product.clone(), square + error)
    count = torch.full_like(error, product.shape[-1])
    rest = ~all_above & known
    if bool(rest.any()):
        squares, error = _eigenvalues(product[rest]), error[rest]
        count[rest] = (squares > square).sum(-1).to(count.dtype)
        known[rest] = ((squares - square).abs() > error[:, None]).all(-1)
    return count, known


def known_or_exact_values(recurrence: Diagonal, positions: Sequence[int], tolerance: float) -> Tensor:
    """Return the singular values of every H_i, (B, H, P, rank), from Gramians of the heads of which they are known."""
    length, state = recurrence.b.shape[2:]
    rank = min(state, max(min(i, length - i) for i in positions))
    of_gramians = partial(values_of_product, tolerance=tolerance)
    exact = partial(recurrence_singular_values, positions=positions)
    return _known_or_exact(recurrence, positions, (rank,), of_gramians, exact)


def recurrence_counts(recurrence: Diagonal, positions: Sequence[int], tolerance: float) -> Tensor:
    """Return how many singular values of every H_i are above the tolerance: (B, H, P)."""

    def exact(part: Diagonal) -> Tensor:
        return tolerance_ess(recurrence_singular_values(part, positions), tolerance)

    return _known_or_exact(recurrence, positions, (), partial(count_of_product, tolerance=tolerance), exact)


def _known_or_exact(
    recurrence: Diagonal,
    positions: Sequence[int],
    tail: tuple[int, ...],
    of_gramians: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    exact: Callable[[Diagonal], Tensor],
) -> Tensor:
    """Return (B, H, P, *tail) from the Gramians of the heads of which it is known, and exactly of the others."""
    out = recurrence.b.new_zeros((*recurrence.shape, len(positions), *tail), dtype=torch.float64)
    by_gram = _is_worth_a_gramian(recurrence, positions)
    if bool(by_gram.any()):
        values, known = of_gramians(*recurrence_gramians(recurrence.of(by_gram), positions))
        out[by_gram] = values.reshape(-1, *out.shape[2:])
        by_gram[by_gram.clone()] = known.all(-1).flatten()
    if not bool(by_gram.all()):
        out[~by_gram] = exact(recurrence.of(~by_gram)).reshape(-1, *out.shape[2:])
    return out


def _is_worth_a_gramian(recurrence: Diagonal, positions: Sequence[int]) -> Tensor:
    """Return (B, H) bool: where all singular values will probably be known from Gramians.

    Not where H_i has fewer rows or columns than the state, nor where N tokens lose much of it: then the smallest
    singular values are far below what a Gramian resolves. Nor at many positions, whose Gramians would take much memory.
    """
    length, state = recurrence.b.shape[2:]
    elements = math.prod(recurrence.shape) * len(positions) * state**2
    if min(min(i, length - i) for i in positions) < state or elements > 4 * SLAB_ELEMENTS:
        return torch.zeros(recurrence.shape, dtype=torch.bool)
    log_decay = recurrence.log_decay.expand(-1, -1, length, -1).mean(-1, dtype=torch.float64)
    lost = torch.stack([log_decay[:, :, i - state : i + state].sum(2) for i in positions]).amin(0)
    return (lost > LARGEST_LOSS).expand(recurrence.shape).clone()


def recurrence_gramians(recurrence: Diagonal, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return C_i C_i^T and O_i^T O_i at every position, (B|1, H|1, P, N, N) each.

    They cost a product of matrices where R costs a factorization, and square the condition number.
    """
    length, state = recurrence.b.shape[2:]
    log_decay = recurrence.log_decay.expand(-1, -1, length, -1)
    order = sorted(set(positions))
    both = []
    for rows, ends, newest_last in (
        (recurrence.b, [0, *order], True),
        (recurrence.c, [length, *reversed(order)], False),
    ):
        shape = tuple(map(max, rows.shape[:2], log_decay.shape[:2]))
        gramian = rows.new_zeros((*shape, state, state), dtype=working_dtype(rows.device))
        at = gramian.new_empty((*shape, len(positions), state, state))
        for end, next_end in pairwise(ends):
            for part in slabs(abs(next_end - end), SLAB_ELEMENTS // GRAMIAN_TOKENS):
                window = slice(end + part.start, end + part.stop)
                if not newest_last:
                    window = slice(end - part.stop, end - part.start)
                decays = log_decay[:, :, window]
                decay = decays.sum(2, dtype=gramian.dtype).exp_()
                gramian *= decay[..., :, None] * decay[..., None, :]
                entering = _entering(rows[:, :, window], decays, newest_last)
                gramian += entering.mT @ entering
            at[:, :, [p for p, i in enumerate(positions) if i == next_end]] = gramian[:, :, None]
        both.append(at)
    return both[0], both[1]


def _entering(rows: Tensor, decays: Tensor, newest_last: bool) -> Tensor:
    """Return the rows of a window as seen from its end, or from its start: (B|1, H|1, K, N)."""
    seen = decays.new_zeros(decays.shape, dtype=working_dtype(rows.device))
    if newest_last:
        torch.cumsum(decays.flip(2)[:, :, :-1], 2, dtype=seen.dtype, out=seen[:, :, 1:])
        seen = seen.flip(2)
    else:
        torch.cumsum(decays, 2, dtype=seen.dtype, out=seen)
    return seen.exp_() * rows


def _product(controllability: Tensor, observability: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a symmetric matrix with the eigenvalues of both Gramians' product, their error, and where it is finite."""
    # Of any scaling of the state dimensions: the one in which both diagonals are equal makes the bound small.
    diagonals = (observability.diagonal(dim1=-2, dim2=-1), controllability.diagonal(dim1=-2, dim2=-1))
    scale = (diagonals[0] / diagonals[1]).sqrt().sqrt().nan_to_num(1.0, 1.0, 1.0).masked_fill_(diagonals[0] == 0, 1.0)
    scales = scale[..., None] * scale[..., None, :]
    controllability, observability = controllability * scales, observability / scales
    factor, info = torch.linalg.cholesky_ex(controllability)
    product, finite = _finite(factor.mT @ (observability @ factor))
    error = _ROUNDING_OF_PRODUCT * torch.linalg.matrix_norm(controllability) * torch.linalg.matrix_norm(observability)
    return product, error, finite & (info == 0)


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices, zeros instead of those that are not finite, and which are."""
    finite = matrix.sum((-2, -1)).isfinite()
    return torch.where(finite[..., None, None], matrix, 0.0), finite


def _eigenvalues(gram: Tensor) -> Tensor:
    """Return eigenvalues, ascending, from the lower triangle; NaN where they do not converge."""
    try:
        # LAPACK takes columns for rows: the transposed matrix need not be turned.
        squares: Tensor = torch.linalg.eigvalsh(gram.mT, UPLO="U")
    except LinAlgError:  # one matrix fails the whole batch, and none of it is known
        return gram.new_full(gram.shape[:-1], torch.nan)
    return squares
