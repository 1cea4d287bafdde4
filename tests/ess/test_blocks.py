"""Singular values of the blocks of T: those of a float64 SVD, whether they come from Gram matrices or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ess_monitor.ess.operators import blocks
from ess_monitor.ess.operators.blocks import BlockSpectra
from tests.ess.spectra import SPECTRA, TAU, TOLERANCES, assert_agrees, levels, with_spectrum


def _by_gram(matrices: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Singular values, and which are from Gram matrices."""
    spectra = BlockSpectra(len(matrices), tau)
    values = spectra.values(slice(0, len(matrices)), matrices)
    return values, spectra._by_gram


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("tau", [TAU, 0.0])
def test_the_spectrum_of_a_matrix_is_that_of_its_svd(name: str, tau: float) -> None:
    torch.manual_seed(0)
    matrices = torch.stack([with_spectrum(SPECTRA[name], 70), with_spectrum(levels(0, -2), 70)])
    for given in (matrices, matrices.mT.contiguous()):
        values, known = _by_gram(given, tau)
        exact = torch.linalg.svdvals(given)
        if tau:
            assert_agrees(values, exact)
        else:
            torch.testing.assert_close(values, exact, rtol=1e-7, atol=1e-7 * float(exact[0, 0]))
        assert bool(known[1])


def test_gram_matrices_are_used_where_they_suffice_and_only_there() -> None:
    torch.manual_seed(0)
    known = {name: bool(_by_gram(with_spectrum(each)[None], TAU)[1]) for name, each in SPECTRA.items()}
    assert known["well conditioned"]
    assert known["clustered at the tolerance"]
    assert known["down to single precision"]
    assert known["large, down to the smallest tolerance"]
    assert not any(known[name] for name in ("far below rounding", "huge, deficient", "one large"))


def test_a_value_at_the_tolerance_is_counted_by_the_svd() -> None:
    torch.manual_seed(0)
    for each in TOLERANCES:
        matrix = torch.diag(torch.cat([levels(0, -2), torch.tensor([each], dtype=torch.float64)]))[None]
        values, known = _by_gram(matrix, TAU)
        assert not bool(known)
        assert int((values > each).sum()) == int((torch.linalg.svdvals(matrix) > each).sum())


def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others() -> None:
    torch.manual_seed(0)
    for bad in (torch.nan, torch.inf, 1e200):
        matrices = torch.stack([with_spectrum(levels(0, -2)) for _ in range(3)])
        exact = torch.linalg.svdvals(matrices)
        matrices[1, 3, 4] = bad
        found = _by_gram(matrices, TAU)[0]
        assert_agrees(found[::2], exact[::2])
        if bad == 1e200:
            torch.testing.assert_close(found[1], torch.linalg.svdvals(matrices[1]), rtol=1e-6, atol=1e186)
        else:
            assert found[1].isnan().all()


def test_rows_and_columns_of_zeros_are_left_out_and_an_unknown_block_is_the_last_that_is_tried() -> None:
    torch.manual_seed(0)
    blocks = torch.zeros(2, 60, 80, dtype=torch.float64)
    blocks[0, 3:51, 8:56], blocks[1, 3:51, 8:56] = with_spectrum(levels(0, -3)), with_spectrum(levels(0, -20))
    spectra = BlockSpectra(2, TAU)
    for _ in range(2):
        assert_agrees(spectra.values(slice(0, 2), blocks.clone()), torch.linalg.svdvals(blocks)[..., :48])
    assert spectra._by_gram.tolist() == [True, False]
    assert BlockSpectra(1, TAU).values(slice(0, 1), torch.zeros(1, 4, 5)).shape == (1, 0)


ROWS: dict[str, Callable[[], Tensor]] = {
    "full": lambda: torch.rand(3, 160, 160).double(),
    "of low rank": lambda: (torch.rand(3, 160, 40) @ torch.rand(3, 40, 160)).double(),
    "signs": lambda: torch.randn(3, 160, 160).double(),
    "in a window": lambda: torch.rand(3, 160, 160).double().triu(-50),
    "in a window shorter than the steps": lambda: torch.rand(3, 160, 160).double().triu(-9),
    "one known, one not, one of zeros": lambda: torch.stack(
        [torch.rand(160, 160), torch.logspace(0, -30, 160).expand(160, -1), torch.zeros(160, 160)]
    ).double(),
    "not a number in a corner": lambda: torch.rand(3, 160, 160).double().index_fill(1, torch.tensor(159), torch.nan),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("held", [None, 30_000, 1])
@pytest.mark.parametrize("tolerance", [TAU, None])
def test_blocks_of_the_same_rows_share_their_products(
    name: str, held: int | None, tolerance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of positions and of Gram matrices that are held, each is that of an SVD of its block."""
    if held is not None:
        monkeypatch.setattr(blocks, "SLAB_ELEMENTS", held)
    torch.manual_seed(2)
    T = ROWS[name]().tril()
    rows = T[:, 20:] + torch.full((160, 160), torch.nan).triu(1)[20:].nan_to_num(7.0)  # above the diagonal: anything
    positions = [100, 20, 40, 80, 120, 40, 130, 159, 60]
    found = dict(BlockSpectra(3, tolerance).values_at(slice(0, 3), rows, 20, positions))
    assert set(found) == set(positions)
    for i, values in found.items():
        block = T[:, i:, :i]
        finite = block.isfinite().flatten(1).all(1)
        assert values[~finite].isnan().all()
        exact = torch.linalg.svdvals(block[finite])
        rank = values.shape[1]
        assert (exact[:, rank:] <= 1e-13 * exact[:, :1]).all()
        assert_agrees(values[finite], exact[:, :rank])
