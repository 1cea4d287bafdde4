"""Choose the heads and rows of a sample, and how many of them, so that all have their turn.

The choice depends on the number of the sample alone: a resumed run and all ranks make the same one.
"""

from __future__ import annotations


def rotate_heads(total: int, take: int | None, turn: int) -> tuple[int, ...]:
    """Return `take` evenly spaced heads of `total`, shifted by one with every `turn`, so that each has its turn.

    >>> rotate_heads(8, 4, 0), rotate_heads(8, 4, 1), rotate_heads(2, 4, 5)
    ((0, 2, 4, 6), (1, 3, 5, 7), (0, 1))
    """
    if take is None or take >= total:
        return tuple(range(total))
    return tuple(sorted({(turn + k * total // take) % total for k in range(take)}))


def rotate_rows(total: int, take: int, turn: int) -> slice:
    """Return `take` evenly spaced rows of `total`, shifted by one with every `turn`, so that each has its turn.

    A slice, because it makes a view: nothing but the rows is ever copied.

    >>> rotate_rows(8, 4, 0), rotate_rows(8, 4, 1), rotate_rows(2, 4, 5)
    (slice(0, 7, 2), slice(1, 8, 2), slice(0, 2, 1))
    """
    take = min(take, total)
    apart = total // take
    reach = (take - 1) * apart + 1
    start = turn % (total - reach + 1)
    return slice(start, start + reach, apart)


def share_of(count: int, share: float) -> int:
    """Return `share` of `count`, and at least one.

    >>> share_of(4, 1.0), share_of(5, 0.5), share_of(4, 0.0)
    (4, 2, 1)
    """
    return max(1, int(count * share))
