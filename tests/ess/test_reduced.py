"""A recurrence that is reduced to a few positions is measured as T says, and refuses the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ess_monitor.errors import OperatorError
from ess_monitor.ess import DiagonalRecurrence, Operator, far_share, measure
from ess_monitor.ess.operators.recurrence import Recurrence
from ess_monitor.ess.operators.reduced import ReducedRecurrence, reduced
from tests.ess import reference
from tests.ess.kinds import KINDS

POSITIONS = (2, 6, 9)
RECURRENCES = {name: make for name, make in KINDS.items() if isinstance(make(), Recurrence)}


def both(make: Callable[[], Operator], *, unit_rows: bool = False) -> tuple[Recurrence, ReducedRecurrence]:
    operator = make()
    assert isinstance(operator, Recurrence)
    return operator, reduced(operator, POSITIONS, rows=(6, 7), unit_rows=unit_rows)


def with_unit_rows(T: Tensor) -> Tensor:
    norms = T.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, T / norms, 0.0)


@pytest.mark.parametrize("make", RECURRENCES.values(), ids=RECURRENCES)
def test_sizes_and_decays_are_those_of_all_tokens(make: Callable[[], Operator]) -> None:
    operator, few = both(make)
    T, undecayed = operator.materialize(), operator.without_decay().materialize()
    measured, whole = measure(few, POSITIONS, tolerance=0.1), measure(operator, POSITIONS, tolerance=0.1)
    for p, i in enumerate(POSITIONS):
        expected = reference.singular_values(T, i)[..., : operator.state_size]
        found = measured.singular_values[:, :, p, : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.max()))
        assert torch.equal(measured.tolerance_ess[:, :, p], (reference.singular_values(T, i) > 0.1).sum(-1).double())
        kept = (reference.singular_values(undecayed, i) > 0.1).sum(-1).double()
        assert measured.undecayed_ess is not None
        assert torch.equal(measured.undecayed_ess[:, :, p], kept)
    for name in ("mean_decay", "decay_product_norm", "finite", "state_capacity"):
        torch.testing.assert_close(getattr(measured, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
    rows = T[:, :, 7:].square()
    share = far_share(few, 6, 1)
    torch.testing.assert_close(share.far_squared, rows[..., :6].sum((2, 3)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(share.total_squared, rows.sum((2, 3)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", RECURRENCES.values(), ids=RECURRENCES)
def test_with_unit_rows_the_sizes_are_of_the_rows_divided_by_their_norms(make: Callable[[], Operator]) -> None:
    operator, few = both(make, unit_rows=True)
    measured = measure(few, POSITIONS, tolerance_scale="output")
    for T, sizes in (
        (operator.materialize(), measured.tolerance_ess),
        (operator.without_decay().materialize(), measured.undecayed_ess),
    ):
        for p, i in enumerate(POSITIONS):
            expected = reference.singular_values(with_unit_rows(T), i)
            assert sizes is not None
            assert torch.equal(sizes[:, :, p], (expected > 1e-3).sum(-1).double())
    far, rows = far_share(few, 6, 1).far_squared, operator.materialize()[:, :, 7:].square()
    torch.testing.assert_close(far, rows[..., :6].sum((2, 3)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("length", "state", "decay"), [(40_000, 3, 1.0), (40_000, 4, 0.999), (17_000, 150, 0.99)])
def test_of_a_long_sequence_the_values_are_sums_of_powers(length: int, state: int, decay: float) -> None:
    """Token t writes to and reads dimension t mod n alone, so that H_i has n orthogonal parts of rank 1."""
    features = torch.eye(state, dtype=torch.float64)[torch.arange(length) % state][None, None]
    log_decay = torch.full((1, 1, 1, 1), math.log(decay), dtype=torch.float64)
    positions = (length // 4, length // 2, length - 5)
    few = reduced(DiagonalRecurrence(log_decay, features, features), positions)
    values = few.singular_values(positions)[0, 0]
    token = torch.arange(length)
    for p, i in enumerate(positions):
        powers = decay ** (2.0 * torch.where(token < i, i - 1 - token, token - i + 1).double())
        sides = torch.zeros(2, state, dtype=torch.float64)
        for side, tokens in enumerate((slice(0, i), slice(i, length))):
            sides[side].index_add_(0, token[tokens] % state, powers[tokens])
        expected = (sides[0] * sides[1]).sqrt().sort(descending=True).values
        torch.testing.assert_close(values[p], expected, rtol=1e-10, atol=1e-10)


def test_it_holds_as_much_for_any_length() -> None:
    def held(length: int) -> int:
        features = torch.randn(1, 1, length, 4)
        few = reduced(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), features, features), (5,))
        return sum(tensor.untyped_storage().nbytes() for tensor in few.tensors)

    assert held(12) == held(3000) == 2 * 8 * 16 + 8 * 4 + 1


def test_what_is_not_finite_is_said_of_the_same_operator_alone() -> None:
    b = torch.randn(2, 3, 12, 4)
    b[1, 2, 5, 0] = torch.nan
    measured = measure(reduced(DiagonalRecurrence(torch.zeros(1, 1, 1, 1), b, b), POSITIONS), POSITIONS)
    assert measured.finite.tolist() == [[True] * 3, [True, True, False]]
    assert measured.tolerance_ess.isnan().flatten(2).all(-1).tolist() == [[False] * 3, [False, False, True]]


def test_samples_and_heads_can_be_selected() -> None:
    operator, few = both(KINDS["recurrence"])
    part = few.select(samples=[2], heads=[1, 3], length=12)
    expected = operator.select(samples=[2], heads=[1, 3]).singular_values(POSITIONS)
    torch.testing.assert_close(part.singular_values(POSITIONS), expected)
    torch.testing.assert_close(part.singular_values([9, 2]), expected[:, :, [2, 0]])


def test_what_needs_the_tokens_is_refused() -> None:
    few = both(KINDS["recurrence"])[1]
    for call in (
        few.materialize,
        few.with_unit_rows,
        lambda: few.singular_values([3]),
        lambda: few.select(length=5),
        lambda: far_share(few, 6, 2),
    ):
        with pytest.raises(OperatorError, match=r"reduced to positions \[2, 6, 9\]; capture it whole"):
            call()
