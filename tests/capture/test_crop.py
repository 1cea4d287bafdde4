"""The crop of a long batch is among the real tokens of each row's longest sequence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import padding
from benchmarks.padding import FAMILIES, FORMS, REAL
from ess_monitor import CaptureConfig, MonitorConfig, profile
from ess_monitor.records import Reading
from tests.ess.kinds import KINDS
from tests.programs import ROOT, run_program

pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("most", [32, 16])
def test_the_crop_is_among_the_real_tokens_of_the_longest_sequence(name: str, most: int) -> None:
    """Padding on the left was longer than the crop, and the reading was too_short."""
    family = FAMILIES[name]
    for kernel in family.kernels:
        if kernel == "flex_attention":  # slow
            continue
        model, found = padding.built(name, kernel), {}
        for form in FORMS:
            config = padding.CONFIG.model_copy(update={"capture": CaptureConfig(max_length=most)})
            given = padding.inputs(form, family.packed_by)
            found[form] = profile(model, config=config, **given).readings[0]
        assert (found["alone"].status, found["alone"].length) == ("ok", min(most, REAL))
        for form in FORMS[1:]:
            assert_same(found[form], found["alone"])


class Recurrent(nn.Module):
    """An LSTM that nobody tells about padding, with the mask at the top only."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize("real", [7, 10])
def test_the_crop_of_a_linearized_layer_is_among_its_real_tokens(real: int) -> None:
    model, x = Recurrent().double(), torch.randn(2, 20, 6).double()
    capture = CaptureConfig(max_length=8, unknown="jacobian", samples=2)
    config = MonitorConfig(positions="midpoint", capture=capture)
    [alone] = profile(model, x[:, -real:], config=config).readings
    mask = (torch.arange(20) >= 20 - real).expand(2, -1)
    [padded] = profile(model, x, attention_mask=mask, config=config).readings
    assert (padded.status, padded.length, padded.positions) == ("ok", min(real, 8), alone.positions)
    assert padded.effective_size == alone.effective_size


def assert_same(one: Reading, other: Reading) -> None:
    names = ("status", "length", "positions", "operators", "effective_size", "state_capacity", "attainable_size")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert one.far_share_ratio == pytest.approx(other.far_share_ratio, rel=1e-5)


def test_on_an_accelerator_the_crop_is_the_same_and_the_host_reads_nothing(tmp_path: Path) -> None:
    run = run_program(["-m", "tests.capture.crop_on_second_device"], tmp_path, cwd=ROOT)
    found = json.loads(run.stdout)
    assert set(found) == set(KINDS)
    assert all(difference < 1e-12 and reads == [] for difference, reads in found.values()), found
