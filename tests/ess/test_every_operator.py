"""What holds for every kind of operator: narrowing, mapping, and inputs that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ess_monitor.errors import OperatorError
from ess_monitor.ess import Operator, entropy_ess, linalg, measure, tolerance_ess
from tests.ess import reference
from tests.ess.kinds import HEADS, KINDS, LENGTH, SAMPLES

POSITIONS = tuple(range(1, LENGTH))


@pytest.fixture(params=KINDS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return KINDS[request.param]()


def test_singular_values_are_those_of_the_materialized_operator(operator: Operator) -> None:
    reference.assert_agrees(operator, operator.materialize())


@pytest.mark.parametrize("samples", [None, slice(1, 3), slice(None, None, 2), [2, 0], [1]])
@pytest.mark.parametrize("heads", [None, slice(2), [0, 1, 2, 3], [2, 3], [3, 0, 2], [0, 2], [1]])
@pytest.mark.parametrize("length", [None, 7, 1])
def test_a_selection_is_the_operator_of_what_was_selected(
    operator: Operator, samples: slice | Sequence[int] | None, heads: slice | Sequence[int] | None, length: int | None
) -> None:
    narrowed = operator.select(samples=samples, heads=heads, length=length)
    size = operator.block_size * (LENGTH if length is None else length)
    expected = operator.materialize()[slice(None) if samples is None else samples]
    expected = expected[:, slice(None) if heads is None else heads][..., :size, :size]
    torch.testing.assert_close(narrowed.materialize(), expected)
    assert type(narrowed) is type(operator)
    if length != 1:
        reference.assert_agrees(narrowed, expected, positions=(1, 3, 6))


def test_an_even_selection_is_a_view(operator: Operator) -> None:
    addresses = {tensor.untyped_storage().data_ptr() for tensor in operator.tensors}
    narrowed = operator.select(samples=[0, 2], heads=slice(2), length=7)
    assert {tensor.untyped_storage().data_ptr() for tensor in narrowed.tensors} <= addresses


@pytest.mark.parametrize(
    "selection",
    [
        {"samples": [SAMPLES]},
        {"samples": [-1]},
        {"samples": []},
        {"samples": slice(5, 9)},
        {"heads": [HEADS]},
        {"heads": [1, 1]},
        {"length": 0},
        {"length": LENGTH + 1},
    ],
)
def test_selections_out_of_range_are_refused(operator: Operator, selection: dict[str, object]) -> None:
    with pytest.raises(OperatorError, match=f"{next(iter(selection))}=.* must"):
        operator.select(**selection)  # type: ignore[arg-type]


def test_mapping_touches_every_tensor_and_nothing_else(operator: Operator) -> None:
    doubled = operator.map(lambda tensor: tensor.clone())
    assert type(doubled) is type(operator)
    assert len(doubled.tensors) == len(operator.tensors)
    old = {tensor.data_ptr() for tensor in operator.tensors}
    assert old.isdisjoint(tensor.data_ptr() for tensor in doubled.tensors)
    assert torch.equal(doubled.singular_values(POSITIONS), operator.singular_values(POSITIONS))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_operator_only(operator: Operator, bad: float) -> None:
    clean = operator.singular_values(POSITIONS)
    for index, field in enumerate(operator.tensors):
        spoiled = field.clone()
        # The last entry of what T is made of; for a dense T it lies in the lower triangle.
        spoiled[(-1,) * (spoiled.dim() - 1) + (0,)] = bad
        replaced = iter([*operator.tensors[:index], spoiled, *operator.tensors[index + 1 :]])
        broken = operator.map(lambda _tensor, replaced=replaced: next(replaced))
        finite = broken.finite()
        assert finite.shape == (SAMPLES, HEADS)
        assert not finite[-1, -1]
        assert finite.any() or field.shape[0] == 1 == field.shape[1]
        values = broken.singular_values(POSITIONS)
        assert values[~finite].isnan().all()
        assert torch.equal(values[finite], clean[finite])
        assert tolerance_ess(values)[~finite].isnan().all()
        assert entropy_ess(values)[~finite].isnan().all()
        measured = measure(broken, POSITIONS)
        assert torch.equal(measured.finite, finite)


def test_an_operator_that_is_finite_says_so(operator: Operator) -> None:
    assert operator.finite().shape == (SAMPLES, HEADS)
    assert operator.finite().all()


def test_measuring_reads_no_value_on_the_host(operator: Operator) -> None:
    # Tensors without data: any look at a value raises.
    measured = measure(operator.map(lambda tensor: tensor.to("meta")), POSITIONS)
    assert measured.tolerance_ess.shape == (SAMPLES, HEADS, len(POSITIONS))
    assert measured.finite.shape == (SAMPLES, HEADS)
    assert measured.state_capacity.shape == (len(POSITIONS),)


def test_capacities_are_floats_where_the_operator_is(operator: Operator) -> None:
    elsewhere = operator.map(lambda tensor: tensor.to("meta"))
    for one, device in ((operator, "cpu"), (elsewhere, "meta")):
        capacity = one.state_capacity((1, 2))
        assert (capacity.dtype, capacity.device.type, tuple(capacity.shape)) == (torch.float32, device, (2,))


@pytest.mark.parametrize("positions", [(5,), POSITIONS])
def test_inputs_are_left_as_they_were(operator: Operator, positions: Sequence[int]) -> None:
    before = [tensor.clone() for tensor in operator.tensors]
    measure(operator, positions)
    assert all(torch.equal(old, new) for old, new in zip(before, operator.tensors, strict=True))


def test_a_batch_that_does_not_converge_is_taken_one_by_one(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = operator.singular_values(POSITIONS)
    svdvals = torch.linalg.svdvals

    def fails_on_batches(matrix: torch.Tensor) -> torch.Tensor:
        if matrix.dim() > 2:
            raise linalg.LinAlgError("the algorithm failed to converge")
        return svdvals(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", fails_on_batches)
    torch.testing.assert_close(operator.singular_values(POSITIONS), expected, rtol=1e-12, atol=1e-13)


def test_a_driver_that_never_converges_is_replaced_and_then_given_up(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = operator.singular_values(POSITIONS)

    def fails(_matrix: torch.Tensor) -> torch.Tensor:
        raise linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    values = operator.singular_values(POSITIONS)
    assert ((values - expected).abs() <= 1e-7 * expected[..., :1]).all()
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert operator.singular_values(POSITIONS).isnan().all()
    assert not measure(operator, POSITIONS).finite.any()


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_numbers(operator: Operator) -> None:
    expected = operator.singular_values(POSITIONS)
    values = operator.map(lambda tensor: tensor.cuda()).singular_values(POSITIONS)
    assert values.is_cuda
    assert ((values.cpu() - expected).abs() <= 1e-12 * expected[..., :1]).all()
