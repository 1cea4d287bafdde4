"""Says which tokens of a row are real, and which segment each belongs to.

A row of a batch may hold padding, and several sequences one after another (packing). Segments are whole numbers, one
for each token: neighbors with the same number belong together, and `PADDING` is no token of any sequence. Libraries say
the same in several forms. The functions here turn each of them into segments, without reading a value on the host.

Shapes: R rows, L tokens. A row that all samples share may be given once, R = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

PADDING = -1
"""Segment of a token that is padding."""
UNKNOWN = -2
"""Segment of every token of a row whose padding cannot be told from its tokens."""

HIDDEN_LOGIT = -1000.0
"""An additive mask below this leaves no weight: exp(-745) is already 0 in float64."""

_MASK_ROWS = 1024
"""Rows of an attention mask that are looked at together."""

Span = tuple[int, int]
"""First token of a segment, and the one after its last."""


def kept_by(mask: Tensor) -> Tensor:
    """Return where an attention mask lets through what a softmax can see, as bool of the same shape.

    >>> kept_by(torch.tensor([0.0, -3.0, -1e4, -torch.inf])), kept_by(torch.tensor([1, 0]))
    (tensor([ True,  True, False, False]), tensor([ True, False]))
    """
    return mask > HIDDEN_LOGIT if mask.is_floating_point() else mask != 0


def of_real(real: Tensor) -> Tensor:
    """Return segments of rows of one sequence each, from (R, L) bool that is False for padding."""
    return torch.where(real, 0, PADDING)


def of_ends(ends: Tensor, length: int) -> Tensor:
    """Return segments (1, L) of a packed row, from its cumulative lengths 0, n_1, n_1 + n_2, ...; the rest is padding.

    >>> of_ends(torch.tensor([0, 2, 5]), 6)
    tensor([[ 0,  0,  1,  1,  1, -1]])
    """
    ends = ends.long().contiguous()
    number = torch.bucketize(torch.arange(length, device=ends.device), ends, right=True) - 1
    return number.masked_fill(number >= len(ends) - 1, PADDING)[None]


def of_positions(positions: Tensor) -> Tensor:
    """Return segments of packed rows, (R, L), from the position of each token in its own sequence.

    Where positions do not grow a new sequence begins.

    >>> of_positions(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[0, 0, 0, 1, 1]])
    """
    return _numbered(positions[:, 1:] <= positions[:, :-1])


def of_mask(mask: Tensor) -> Tensor:
    """Return segments (R, L) from an attention mask (R, heads|1, L|1, L): bool (True keeps) or floating (added).

    A token is real if it may attend to itself. Two neighbors belong to one segment if a token from the second on
    attends to one up to the first. Rows that hide nothing, also no later token, stand for padding where others do hide.

    >>> packed = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]]).bool()
    >>> of_mask(packed[None, None])
    tensor([[0, 1, 1]])
    """
    if mask.shape[2] == 1:
        return of_real(kept_by(mask).any(1)[:, 0])
    length = mask.shape[3]
    token = torch.arange(length, device=mask.device)
    blocks = [slice(first, first + _MASK_ROWS) for first in range(0, length, _MASK_ROWS)]  # bounds what is held at once
    kept = ((rows, kept_by(mask[:, :, rows]).any(1)) for rows in blocks)
    seen = [(keep.all(2), keep[:, :, rows].diagonal(dim1=1, dim2=2)) for rows, keep in kept]
    sees_all, itself = (torch.cat(each, 1) for each in zip(*seen, strict=True))
    # The last token of any sequence may attend to all: it is padding where the one before it is.
    is_filler = torch.cat([sees_all[:, :-1], sees_all[:, -2:].all(1, keepdim=True)], 1)
    real = itself & ~is_filler
    # Nobody attends to himself, or everybody to all: such a mask does not say what is padding.
    real = real | ~real.any(1, keepdim=True)
    last_reader = torch.full((mask.shape[0], length), -1, dtype=torch.int32, device=mask.device)
    for rows in blocks:
        readers = token[rows, None].int()
        past = kept_by(mask[:, :, rows]).any(1) & real[:, rows, None] & real[:, None, :] & (token <= readers)
        last_reader = torch.maximum(last_reader, torch.where(past, readers, -1).amax(1))
    is_passed = last_reader.cummax(1).values[:, :-1] >= token[1:]
    return torch.where(real, _numbered(~is_passed), PADDING)


def of_neighbors(keep: Tensor) -> Tensor:
    """Return segments (R, L) from what each token attends to of itself and of the one before it: (R, 2, L) bool.

    >>> of_neighbors(torch.tensor([[[True, True, True, False], [False, True, False, False]]]))
    tensor([[ 0,  0,  1, -1]])
    """
    return torch.where(keep[:, 0], _numbered(~keep[:, 1, 1:]), PADDING)


def merged(given: Sequence[Tensor]) -> Tensor:
    """Return what several segments, each (R|1, L), say together: a token is real, and two belong together, for all.

    >>> merged([torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, -1]])])
    tensor([[ 0,  0,  1, -1]])
    """
    every = torch.broadcast_tensors(*given)  # type: ignore[no-untyped-call]
    begins = torch.stack([one[:, 1:] != one[:, :-1] for one in every]).any(0)
    least = torch.stack(every).amin(0)
    return torch.where(least < 0, least.clamp(max=PADDING), _numbered(begins))


def at_start(segments: Tensor, length: int) -> Tensor:
    """Return segments (R, length) with as many real tokens in front as the longest segment has, and padding after."""
    longest = _place_in_segment(segments).amax(1, keepdim=True)
    unknown = (segments == UNKNOWN).any(1, keepdim=True)
    return of_real(torch.arange(length, device=segments.device) < longest).masked_fill(unknown, UNKNOWN)


def starts_of_longest(segments: Tensor) -> Tensor:
    """Return the first token of each row's longest segment, (R,): of the first one where several are equally long.

    0 for a row without a real token.

    >>> starts_of_longest(torch.tensor([[-1, -1, 0, 0, 1], [-1, -1, -1, -1, -1]]))
    tensor([2, 0])
    """
    longest, last = _place_in_segment(segments).max(1)
    return torch.where(longest > 0, last + 1 - longest, 0)


def _place_in_segment(segments: Tensor) -> Tensor:
    """Return of each token (R, L) which one of its segment it is, counted from 1; 0 for padding."""
    begins = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=False)
    token = torch.arange(segments.shape[1], device=segments.device)
    first = torch.where(begins, token, 0).cummax(1).values
    return torch.where(segments >= 0, token - first + 1, 0)


def _numbered(begins: Tensor) -> Tensor:
    """Return (R, L) numbers that grow by one where `begins` (R, L - 1) is True."""
    return torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))


def spans(segments: Tensor) -> list[list[Span]]:
    """Return the segments of each row, in order. Reads (R, L) on the host.

    >>> spans(torch.tensor([[-1, 0, 0, 1], [-1, -1, -1, -1]]))
    [[(1, 3), (3, 4)], []]
    """
    found = []
    for row in segments.tolist():
        tokens = groupby(range(len(row)), key=row.__getitem__)
        runs = [(number, list(run)) for number, run in tokens]
        found.append([(run[0], run[-1] + 1) for number, run in runs if number >= 0])
    return found


def longest_places(rows: Sequence[Sequence[Span]]) -> dict[Span, list[int]]:
    """Return where the longest segments of rows lie, all of several that are equally long, and in which rows.

    >>> longest_places([[(1, 3), (3, 4)], [], [(1, 3), (4, 6)]])
    {(1, 3): [0, 2], (4, 6): [2]}
    """
    places: dict[Span, list[int]] = {}
    for row, found in enumerate(rows):
        longest = max((stop - start for start, stop in found), default=0)
        for start, stop in found:
            if stop - start == longest:
                places.setdefault((start, stop), []).append(row)
    return places
