"""What a smaller state costs the loss: the outcome, the means, the error."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.evidence import EvidenceConfig
from ess_monitor.evidence.verdict import add_changes, weigh_state
from ess_monitor.records import Changes

CONFIG = EvidenceConfig(state_ratio=0.1, state_kl=0.05)


@pytest.mark.parametrize(
    ("base", "quarter", "outcome"),
    [
        (2.0, 0.2, "needed"),
        (2.0, 0.19, "spare"),
        (2.0, -0.5, "spare"),
        (-2.0, 0.2, "needed"),
        (0.0, 0.001, "needed"),
        (0.0, 0.0, "spare"),
    ],
)
def test_by_the_loss(base: float, quarter: float, outcome: str) -> None:
    changes = Changes(8, 8 * base, 8 * quarter, 8 * 0.7, 8 * 3.0, kind="state_loss")
    found = weigh_state("mixer", 700, changes, CONFIG, 0.4)
    assert (found.outcome, found.basis, found.batches, found.step) == (outcome, "loss", 8, 700)
    assert (found.base, found.quarter, found.half, found.whole) == pytest.approx((base, quarter, 0.7, 3.0))
    assert found.spectrum_end_ratio == 0.4
    assert f"{quarter:+.3g}" in found.reason


@pytest.mark.parametrize(("quarter", "outcome"), [(0.05, "needed"), (0.049, "spare"), (0.0, "spare")])
def test_by_outputs(quarter: float, outcome: str) -> None:
    found = weigh_state("mixer", 700, Changes(4, 0.0, 4 * quarter, 1.0, 2.0, kind="state_outputs"), CONFIG)
    assert (found.outcome, found.basis, found.base) == (outcome, "kl", None)
    assert "nats" in found.reason


def test_the_standard_error_is_that_of_the_batches() -> None:
    batches = torch.tensor([0.1, 0.4, 0.2, 0.5], dtype=torch.float64)
    total = Changes(kind="state_loss")
    for quarter in batches.tolist():
        total = add_changes(total, Changes(1, 2.0, quarter, 0.5, 1.0, quarter * quarter, "state_loss"))
    found = weigh_state("mixer", 700, total, CONFIG)
    assert found.quarter == pytest.approx(batches.mean().item())
    assert found.quarter_error == pytest.approx(batches.std().item() / 2)
