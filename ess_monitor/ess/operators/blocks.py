"""Computes singular values of the blocks H_i = T[i:, :i] of operators that have no small factors.

On a CPU they come from Gram matrices of the smaller side where these tell enough, and from an SVD where not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ess_monitor.ess.gram_spectrum import values_of_gram
from ess_monitor.ess.linalg import SLAB_ELEMENTS, singular_values_

SMALLEST_BLOCK = 32
"""Rows and columns below which an SVD is as fast."""

_ROWS_OF_A_PRODUCT = 96
"""Rows of a Gram matrix that are formed at once: more of them form more above the diagonal, fewer take longer each."""


class BlockSpectra:
    """Computes singular values of blocks of the same operators, one position after another, small blocks first.

    An operator of which those of a block are not known from its Gram matrix gets the SVD from then on: they will not be
    for a larger block either.

    Args:
        operators: G, how many there are.
        tolerance: tau of the tolerance-ESS. None: always the SVD.
    """

    def __init__(self, operators: int, tolerance: float | None) -> None:
        self._tolerance = tolerance
        self._by_gram = torch.ones(operators, dtype=torch.bool)

    def values(self, group: slice, block: Tensor) -> Tensor:
        """Return singular values of a block of some operators, (G, m, n) -> (G, k), without some that are 0."""
        if not self._tries_grams(group, min(block.shape[1:])):
            return self._exact(block)
        wide = block if block.shape[1] <= block.shape[2] else block.mT
        gram = block.new_empty((1, len(wide), wide.shape[1], wide.shape[1]))
        _lower_gram(wide, gram[0])
        return self._values(group, [block], gram)[0]

    def values_at(
        self, group: slice, rows: Tensor, first: int, positions: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield every position i, and of T[i:, :i] what `values` returns, from the rows T[first:], (G, L - first, L).

        The Gram matrix of a block holds that of the next smaller one but for some rows or columns.
        """
        for alike in _held_at_once(positions, rows.shape[2], len(rows)):
            grams = _shared_grams(rows, first, {n: at for n, at in alike.items() if self._tries_grams(group, n)})
            for n, same in alike.items():
                blocks, gram = [rows[:, i - first :, :i] for i in same], grams.pop(n, None)
                found = map(self._exact, blocks) if gram is None else self._values(group, blocks, gram)
                yield from zip(same, found, strict=True)

    def _tries_grams(self, group: slice, side: int) -> bool:
        return self._tolerance is not None and side >= SMALLEST_BLOCK and bool(self._by_gram[group].any())

    def _values(self, group: slice, blocks: Sequence[Tensor], gram: Tensor) -> Sequence[Tensor]:
        """Return `values` of K blocks whose Gram matrices are (K, G, n, n)."""
        assert self._tolerance is not None
        filled = gram.diagonal(dim1=2, dim2=3) != 0
        if not bool(filled.all()):
            filled = filled.any(0).any(0)
            gram = gram[:, :, filled][..., filled]
        by_gram, rank = self._by_gram[group], gram.shape[-1]  # the one is a view
        if rank < SMALLEST_BLOCK or not bool(by_gram.any()):
            return [self._exact(block) for block in blocks]
        if bool(by_gram.all()):
            values, known = values_of_gram(gram, self._tolerance)
        else:
            values, known = gram.new_zeros(gram.shape[:-1]), by_gram.expand(gram.shape[:2]).clone()
            values[:, by_gram], known[:, by_gram] = values_of_gram(gram[:, by_gram], self._tolerance)
        if not bool(known.all()):
            by_gram &= known.all(0)
            for each, is_known, block in zip(values, known, blocks, strict=True):
                exact = self._exact(block[~is_known])[:, :rank]
                each[~is_known] = torch.nn.functional.pad(exact, (0, rank - exact.shape[1]))
        return list(values)

    def _exact(self, block: Tensor) -> Tensor:
        return singular_values_((block if self._tolerance is None else _without_zeros(block)).clone())


def _held_at_once(positions: Sequence[int], length: int, operators: int) -> Iterator[dict[int, list[int]]]:
    """Yield the positions by the smaller side of their blocks, smallest first, as many as may be held together."""
    held, elements = dict[int, list[int]](), 0
    for i in sorted(set(positions), key=lambda i: min(i, length - i)):
        n = min(i, length - i)
        if held and elements + operators * n**2 > SLAB_ELEMENTS:
            yield held
            held, elements = {}, 0
        held.setdefault(n, []).append(i)
        elements += operators * n**2
    yield held


def _shared_grams(rows: Tensor, first: int, positions: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """Return the Gram matrices of the smaller sides of T[i:, :i], the lower triangles.

    Args:
        rows, first: as in `values_at`.
        positions: by their smaller side n.

    Returns:
        By n, those of the K positions together, (K, G, n, n).
    """
    length, at, by_side = rows.shape[2], dict[int, Tensor](), dict[int, Tensor]()
    for n, same in positions.items():
        by_side[n] = rows.new_empty((len(same), len(rows), n, n))
        at.update(zip(same, by_side[n], strict=True))
    of_columns = sorted((i for i in at if 2 * i <= length), reverse=True)
    for end, i in zip([length, *of_columns], of_columns, strict=False):
        of_larger = at[end][:, :i, :i] if end in at else None
        _lower_gram(rows[:, i - first : end - first, :i].mT, at[i], of_larger)
    of_rows = sorted(i for i in at if 2 * i > length)
    for start, i in zip([0, *of_rows], of_rows, strict=False):
        of_larger = at[start][:, i - length :, i - length :] if start in at else None
        _lower_gram(rows[:, i - first :, start:i], at[i], of_larger)
    return by_side


def _without_zeros(blocks: Tensor) -> Tensor:
    """Return blocks without the rows and the columns that are 0 in all of them, as in a sliding window."""
    rows, columns = _filled(blocks)
    blocks = blocks if rows is None else blocks[:, rows]
    return blocks if columns is None else blocks[:, :, columns]


def _filled(blocks: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return which rows and which columns are not 0 in all of (G, m, n), None where that is all of them."""
    if blocks.numel() and bool(blocks.amin() > 0):
        return None, None
    filled = (blocks != 0).any(0)
    rows, columns = filled.any(1), filled.any(0)
    return None if bool(rows.all()) else rows, None if bool(columns.all()) else columns


def _lower_gram(wide: Tensor, gram: Tensor, more: Tensor | None = None) -> None:
    """Write M M^T of M (G, m, n), and `more` where given, into the lower triangle of `gram`; above is anything."""
    rows, columns = None, None
    # The nearest and the farthest pair of tokens: where both count, there are few zeros to look for.
    if not bool((wide[:, 0, -1] * wide[:, -1, 0]).all()):
        rows, columns = _filled(wide)
    wide = wide if columns is None else wide[:, :, columns]
    if more is not None:
        gram.copy_(more)
    if rows is None:
        _products(wide, gram, beta=0 if more is None else 1)
        return
    if more is None:
        gram.zero_()
    place = rows.nonzero()[:, 0]
    among = gram.new_empty((len(gram), len(place), len(place)))
    _products(wide[:, rows], among, beta=0)
    gram[:, place[:, None], place] += among


def _products(wide: Tensor, gram: Tensor, beta: int) -> None:
    """Multiply the lower triangle of `gram` with beta and add M M^T."""
    for start in range(0, wide.shape[1], _ROWS_OF_A_PRODUCT):
        stop = min(start + _ROWS_OF_A_PRODUCT, wide.shape[1])
        gram[:, start:stop, :stop].baddbmm_(wide[:, start:stop], wide[:, :stop].mT, beta=beta)
