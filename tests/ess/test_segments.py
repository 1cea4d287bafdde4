"""Padding and packed segments: what an operator does with them, and how the forms of libraries are read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess import Convolution, DenseOperator, Operator, SoftmaxAttention, far_share, measure, segments
from ess_monitor.ess.operators.windows import at_tokens, joined
from tests.ess import reference
from tests.ess.kinds import KINDS, LENGTH, SAMPLES

P = segments.PADDING
ROWS = torch.tensor([[P] * 3 + [0] * 9, [4] * 5 + [7] * 7, [0] * 10 + [P] * 2])
"""Padding on the left; two sequences; padding on the right."""
LONGEST = {0: (3, 12), 1: (5, 12), 2: (0, 10)}


@pytest.fixture(params=KINDS)
def whole(request: pytest.FixtureRequest) -> Operator:
    return KINDS[request.param]()


def expected(operator: Operator) -> Tensor:
    """T with the rows and columns of padding, and all between two segments, set to 0."""
    T, d = operator.materialize().clone(), operator.block_size
    for sample, row in enumerate(ROWS.tolist()):
        for i in range(d * LENGTH):
            for j in range(d * LENGTH):
                if row[i // d] != row[j // d] or row[i // d] == P:
                    T[sample, :, i, j] = 0
    return T


def with_rows(operator: Operator) -> Operator:
    return dataclasses.replace(operator, segments=ROWS[:, None])


def test_rows_and_columns_of_padding_are_in_no_operator_and_segments_do_not_meet(whole: Operator) -> None:
    operator, T = with_rows(whole), expected(whole)
    torch.testing.assert_close(operator.materialize(), T, rtol=0, atol=0)
    reference.assert_agrees(operator, T, positions=(1, 4, 5, 6, 11))
    far, total = far_share(operator, 6, 2)
    rows = T[..., whole.block_size * 8 :, :].square()
    torch.testing.assert_close(far, rows[..., : whole.block_size * 6].sum((2, 3)))
    torch.testing.assert_close(total, rows.sum((2, 3)))


def test_the_longest_segments_are_operators_of_their_own_tokens(whole: Operator) -> None:
    d, T = whole.block_size, whole.materialize()
    parts = with_rows(whole).longest_segments()
    assert len(parts) == SAMPLES
    for sample, part in enumerate(parts):
        start, stop = LONGEST[sample]
        tokens = slice(d * start, d * stop)
        assert (part.batch, part.length, part.segments) == (1, stop - start, None)
        reference.assert_agrees(part, T[[sample], :, tokens, tokens], positions=(1, 4, stop - start - 1))
    both = with_rows(whole).select(samples=[1, 2], length=9)
    assert [part.length for part in both.longest_segments()] == [5, 9]


def test_tokens_whose_place_the_device_alone_knows_give_the_same_operator(whole: Operator) -> None:
    d, T = whole.block_size, whole.materialize()
    starts = segments.starts_of_longest(ROWS)
    assert starts.tolist() == [3, 5, 0]
    assert segments.starts_of_longest(torch.tensor([[P, P], [0, 1]])).tolist() == [0, 0]
    each = [at_tokens(whole.select(samples=[row]), start + torch.arange(7)) for row, start in enumerate(starts)]
    one = joined(each)
    assert (one.batch, one.length, one.heads) == (SAMPLES, 7, whole.heads)
    for row, start in enumerate(starts.tolist()):
        tokens = slice(d * start, d * (start + 7))
        reference.assert_agrees(one.select(samples=[row]), T[[row], :, tokens, tokens], positions=(1, 3, 6))


def test_without_decay_and_with_other_dtypes_the_segments_stay(whole: Operator) -> None:
    operator = with_rows(whole)
    assert torch.equal(operator.map(torch.Tensor.double).materialize(), operator.materialize())
    assert torch.equal(operator.map(torch.Tensor.float).segments, ROWS[:, None])  # type: ignore[arg-type]
    undecayed = operator.without_decay()
    if undecayed is not None:
        assert (undecayed.materialize()[1, :, 5:, :5] == 0).all()
        assert (undecayed.materialize()[0, :, :, :3] == 0).all()
    measured = measure(operator, (2, 6))
    assert (measured.tolerance_ess[0, :, 0] == 0).all(), "position 2 of the first row is in its padding"


def test_segments_that_are_equally_long_are_all_taken_and_those_of_equal_place_together() -> None:
    T = DenseOperator(
        torch.randn(3, 1, 6, 6).tril(), segments=torch.tensor([[0, 0, 0, 1, 1, 1]] * 2 + [[P] * 6])[:, None]
    )
    first, second = T.longest_segments()
    assert torch.equal(first.materialize(), T.materialize()[:2, :, :3, :3])
    assert torch.equal(second.materialize(), T.materialize()[:2, :, 3:, 3:])


def test_one_row_of_segments_serves_all_samples_and_one_operator_all_rows() -> None:
    row = torch.tensor([[[0, 0, 0, P]]])
    [part] = DenseOperator(torch.randn(3, 1, 4, 4).tril(), segments=row).longest_segments()
    assert (part.batch, part.length) == (3, 3)
    kernel = torch.randn(1, 2, 3)
    shared = Convolution(kernel, 12, segments=ROWS[:, None])
    assert [part.length for part in shared.longest_segments()] == [9, 7, 10]
    T = reference.convolution(kernel, 12).float().expand(3, -1, -1, -1)
    reference.assert_agrees(shared, expected(DenseOperator(T)), positions=(2, 4, 6))


def test_the_size_of_attention_is_what_the_mask_lets_through() -> None:
    q = torch.randn(1, 2, 16, 4)
    lag = torch.arange(16)[:, None] - torch.arange(16)
    window = SoftmaxAttention(q, q, mask=lag < 4)
    assert window.state_capacity([1, 2, 3, 8, 15]).tolist() == [1, 2, 3, 3, 3]
    additive = torch.zeros(16, 16).masked_fill(lag >= 4, torch.finfo(torch.float32).min)
    assert SoftmaxAttention(q, q, mask=additive).state_capacity([8, 15]).tolist() == [3, 3]
    documents = torch.arange(16) // 8
    packed = SoftmaxAttention(q, q, mask=documents[:, None] == documents)
    assert packed.state_capacity([4, 8, 12]).tolist() == [4, 0, 4]
    padded = SoftmaxAttention(q, q, mask=(torch.arange(16) >= 5)[None, None, None])
    assert padded.state_capacity([5, 8]).tolist() == [0, 3]
    assert SoftmaxAttention(q, q, mask=-lag.float().abs()).state_capacity([8]).tolist() == [8], "a bias hides nothing"
    in_place = SoftmaxAttention(q, q, segments=torch.tensor([[[P] * 4 + [0] * 12]]))
    assert in_place.state_capacity([4, 10]).tolist() == [0, 6]


def test_keys_before_a_segment_keep_what_the_rows_give_them() -> None:
    """A layer without a mask attends to the padding on its left: the rows of T over real tokens sum to less than 1."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 12, 5, dtype=torch.float64)
    for sinks in (None, torch.randn(1, 3, 1, dtype=torch.float64)):
        attention = SoftmaxAttention(q, k, sinks=sinks, segments=torch.tensor([[[P] * 5 + [0] * 7]]))
        [part] = attention.longest_segments()
        whole = dataclasses.replace(attention, segments=None).materialize()[..., 5:, 5:]
        assert whole.sum(-1).max() < 0.9
        torch.testing.assert_close(part.materialize(), whole)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 12), torch.zeros(3, 1, 11), torch.zeros(2, 1, 12), torch.zeros(3, 1, 12).bool(), "012"]
)
def test_segments_of_another_shape_are_refused(whole: Operator, wrong: object) -> None:
    given = wrong.long() if isinstance(wrong, Tensor) and wrong.dtype != torch.bool else wrong
    with pytest.raises(OperatorError, match="segments"):
        dataclasses.replace(whole, segments=given)  # type: ignore[arg-type]


def test_padding_that_cannot_be_placed_gives_a_reason_and_no_number(whole: Operator) -> None:
    operator = dataclasses.replace(whole, segments=torch.full((1, 1, LENGTH), segments.UNKNOWN))
    with pytest.raises(OperatorError, match="cannot be assigned"):
        operator.longest_segments()


def causal(keep: Tensor) -> Tensor:
    return keep & torch.ones_like(keep).tril()


def test_masks_say_which_tokens_are_real() -> None:
    real = torch.tensor([[0] * 3 + [1] * 5, [1] * 6 + [0] * 2, [1] * 8]).bool()
    keys = causal(real[:, None, None, :].expand(-1, -1, 8, -1))
    rows_too = keys & real[:, None, :, None]
    unmasked_rows = torch.where(rows_too.any(-1, keepdim=True), rows_too, True)  # as some kernels need it
    expected = torch.where(real, 0, P)
    for mask in (keys, rows_too, unmasked_rows, real[:, None, None, :], keys.long()):
        same = segments.of_mask(mask)
        assert torch.equal((same < 0), ~real)
        assert segments.spans(same) == [[(3, 8)], [(0, 6)], [(0, 8)]]
        additive = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(mask == 0, torch.finfo(torch.bfloat16).min)
        assert segments.spans(segments.of_mask(additive)) == segments.spans(same)
    assert torch.equal(segments.of_real(real), expected)
    several = torch.zeros(3, 2, 8, 8, dtype=torch.bool)
    several[:, 1:] = keys
    assert segments.spans(segments.of_mask(several)) == [[(3, 8)], [(0, 6)], [(0, 8)]]


def test_masks_say_where_packed_sequences_begin() -> None:
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    block = causal(documents[:, None] == documents)[None, None]
    assert segments.spans(segments.of_mask(block)) == [[(0, 3), (3, 7), (7, 8)]]
    lag = torch.arange(8)[:, None] - torch.arange(8)
    assert segments.spans(segments.of_mask(block & (lag < 2))) == [[(0, 3), (3, 7), (7, 8)]]
    assert segments.spans(segments.of_mask(causal(lag < 3)[None, None])) == [[(0, 8)]]
    assert segments.spans(segments.of_mask((lag > 0)[None, None])) == [[(0, 8)]], "of the earlier tokens only"
    assert segments.spans(segments.of_mask(torch.ones(1, 1, 8, 8).bool())) == [[(0, 8)]]


def test_positions_and_lengths_say_where_packed_sequences_begin() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [1, 1, 1, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 12, 13, 14]])
    found = segments.spans(segments.of_positions(positions))
    assert found[0] == [(0, 3), (3, 7), (7, 8)]
    assert found[1][-1] == (3, 8)
    assert found[2] == [(0, 8)]
    assert segments.spans(segments.of_ends(torch.tensor([0, 3, 7, 7, 8]), 10)) == [[(0, 3), (3, 7), (7, 8)]]
    assert segments.spans(segments.of_ends(torch.tensor([0, 3, 12], dtype=torch.int32), 10)) == [[(0, 3), (3, 10)]]


def test_what_is_said_in_several_ways_holds_together() -> None:
    mask, positions = segments.of_real(torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()), torch.tensor([[0, 1, 2, 0, 1, 2]])
    both = segments.merged([mask, segments.of_positions(positions).expand(2, -1)])
    assert segments.spans(both) == [[(0, 3), (3, 5)]] * 2
    unknown = torch.full((1, 6), segments.UNKNOWN)
    assert (segments.merged([mask, unknown]) == segments.UNKNOWN).all()
    rows = torch.tensor([[P, P, 0, 0, 0, 1], [0, 0, 1, P, P, P]])
    assert segments.at_start(rows, 4).tolist() == [[0, 0, 0, P], [0, 0, P, P]]
    assert (segments.at_start(unknown, 4) == segments.UNKNOWN).all()


def test_a_mask_says_the_same_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [torch.rand(3, 2, 11, 11) < share for share in (0.2, 0.5, 0.9)]
    masks += [mask.tril() for mask in masks]
    masks[-1][:, :, :3] = True
    whole = [segments.of_mask(mask) for mask in masks]
    monkeypatch.setattr(segments, "_MASK_ROWS", 4)
    for mask, expected in zip(masks, whole, strict=True):
        assert torch.equal(segments.of_mask(mask), expected)
