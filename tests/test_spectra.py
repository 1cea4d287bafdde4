"""The spectrum that a reading carries, against singular values of T written out in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from ess_monitor import CaptureConfig, MonitorConfig, capture_operators, profile
from ess_monitor.ess.gram_spectrum import mean_spectrum
from ess_monitor.featurizers import build_mixer
from ess_monitor.pipeline.readings import SPECTRUM_VALUES

ALL = CaptureConfig(samples=3, heads=None)


def _middle_spectra(model: torch.nn.Module, x: torch.Tensor, position: int) -> torch.Tensor:
    """(samples x heads, rank) in float64."""
    (operator,) = capture_operators(model, x).values()
    T = operator.materialize().double()
    return torch.linalg.svdvals(T[..., position:, :position]).flatten(0, 1)


@pytest.mark.parametrize("featurizer", ["la", "gla", "s6", "sa"])
@pytest.mark.parametrize("positions", [3, "midpoint", "all"])
def test_the_spectrum_is_the_geometric_mean_at_the_position_nearest_the_middle(
    featurizer: str, positions: int | str
) -> None:
    mixer, x = build_mixer(featurizer, 16, 2, 8).double(), torch.randn(3, 40, 16).double()
    (reading,) = profile(mixer, x, config=MonitorConfig(positions=positions, capture=ALL)).readings
    spectra = _middle_spectra(mixer, x, 20)[:, : len(reading.spectrum)]
    assert reading.spectrum_ranks == tuple(range(1, len(reading.spectrum) + 1))
    assert len(reading.spectrum) == (20 if featurizer == "sa" else 8)
    clear = (spectra > 2e-6).all(0)  # the floor is a millionth at most
    assert clear.sum() >= 2
    found = torch.tensor(reading.spectrum, dtype=torch.float64)
    torch.testing.assert_close(found[clear], spectra.log().mean(0).exp()[clear], rtol=1e-4, atol=0)
    assert sorted(reading.spectrum, reverse=True) == list(reading.spectrum)


def test_a_spectrum_longer_than_the_limit_is_thinned_evenly_and_keeps_its_ends() -> None:
    mixer, x = build_mixer("sa", 16, 2, 8).double(), torch.randn(2, 200, 16).double()
    (reading,) = profile(mixer, x, config=MonitorConfig(positions="midpoint", capture=ALL)).readings
    ranks = reading.spectrum_ranks
    assert len(reading.spectrum) == len(ranks) == SPECTRUM_VALUES
    assert (ranks[0], ranks[-1]) == (1, 100)
    assert {later - earlier for earlier, later in pairwise(ranks)} == {3, 4}
    spectra = _middle_spectra(mixer, x, 100)[:, [rank - 1 for rank in ranks]]
    clear = (spectra > 2e-6).all(0)
    assert clear.sum() > 10
    found = torch.tensor(reading.spectrum, dtype=torch.float64)
    torch.testing.assert_close(found[clear], spectra.log().mean(0).exp()[clear], rtol=1e-4, atol=0)


def test_a_sequence_shorter_than_the_state_has_as_many_singular_values_as_its_middle_allows() -> None:
    (reading,) = profile(build_mixer("la", 16, 2, 8), torch.randn(2, 9, 16)).readings
    assert reading.spectrum_ranks == (1, 2, 3, 4)


def test_a_dead_head_lowers_the_spectrum_and_does_not_erase_it() -> None:
    alive = torch.tensor([1.0, 0.1, 0.0])
    spectrum = mean_spectrum(torch.stack([alive, alive, alive, torch.zeros(3)])[None], tolerance=1.0)
    floor = torch.finfo(torch.float32).eps
    assert spectrum.tolist() == pytest.approx([floor**0.25, 0.1**0.75 * floor**0.25, 0.0], rel=1e-4)


def test_what_the_tolerance_counts_is_never_cut_off_as_rounding() -> None:
    spectrum = mean_spectrum(torch.tensor([[[1e6, 2e-3, 1e-9]]]), tolerance=1e-3)
    assert spectrum.tolist() == pytest.approx([1e6, 2e-3, 0.0], rel=1e-4)


def test_an_operator_of_zeros_has_a_spectrum_of_zeros_at_any_tolerance() -> None:
    for tolerance in (0.0, 1e-3):
        assert mean_spectrum(torch.zeros(2, 2, 3), tolerance).tolist() == [0.0, 0.0, 0.0]


def test_a_reading_without_sizes_has_no_spectrum() -> None:
    mixer = build_mixer("gla", 16, 2, 8)
    readings = [profile(mixer, x).readings[0] for x in (torch.randn(2, 1, 16), torch.full((2, 20, 16), math.nan))]
    assert [reading.status for reading in readings] == ["too_short", "nonfinite"]
    assert all(reading.spectrum == reading.spectrum_ranks == () for reading in readings)
