"""From changes of the loss to an outcome, at and around each threshold."""

from __future__ import annotations

import math

import pytest
import torch

from ess_monitor.evidence import EvidenceConfig
from ess_monitor.evidence.verdict import add_changes, weigh
from ess_monitor.records import Changes

CONFIG = EvidenceConfig()


def by_loss(m50: float, m90: float, cut: float, *, base: float = 2.0, batches: int = 8) -> Changes:
    return Changes(batches, *(batches * value for value in (base, m50, m90, cut)))


def by_outputs(m50: float, m90: float, cut: float, batches: int = 8) -> Changes:
    return Changes(batches, 0.0, *(batches * value for value in (m50, m90, cut)), kind="outputs")


@pytest.mark.parametrize(
    ("m50", "m90", "cut", "outcome"),
    [
        (0.002, 0.03, 0.4, "loud"),  # m50 is half a percent of what the past is worth
        (-0.01, -0.02, 0.4, "loud"),  # remembering more would help
        (0.047, 0.2, 0.4, "loud"),
        (0.049, 0.2, 0.4, "by_choice"),  # just over 12 % of the cut
        (0.099, 0.2, 40.0, "loud"),
        (0.101, 0.2, 40.0, "by_choice"),  # the past is worth twenty times the loss, and m50 5 % of it
        (0.2, 0.9, 0.4, "by_choice"),
        (0.0, 0.0, 0.0, "silent"),
        (0.0005, 0.0019, 0.0019, "silent"),
        (-0.0005, -0.0019, -0.0019, "silent"),
        (0.001, 0.03, 0.0, "by_choice"),  # the past is worth nothing, and remembering it costs
        (0.0, -0.03, 0.0, "unclear"),
        (0.0, 0.0, 0.01, "unclear"),  # between silent and loud
        (0.0, 0.0, -0.4, "unclear"),  # the past does harm
    ],
)
def test_the_outcome_by_the_loss(m50: float, m90: float, cut: float, outcome: str) -> None:
    evidence = weigh("mixer", 700, by_loss(m50, m90, cut), CONFIG, 0.1)
    assert (evidence.outcome, evidence.basis, evidence.batches) == (outcome, "loss", 8)
    assert (evidence.base, evidence.far_share_ratio, evidence.step) == (2.0, 0.1, 700)
    assert evidence.m50 == pytest.approx(m50)


@pytest.mark.parametrize("far", [0.0, 0.001, 0.099])
def test_a_layer_whose_output_comes_from_nearby_needs_no_memory(far: float) -> None:
    found = weigh("mixer", 700, by_loss(0.0, 0.0, 0.4), CONFIG, far)
    assert found.outcome == "by_choice"
    assert f"only {far:.2g} of what the layer puts out comes from afar, below 0.1" in found.reason
    assert weigh("mixer", 700, by_outputs(0.001, 0.01, 0.5), CONFIG, far).outcome == "by_choice"
    assert weigh("mixer", 700, by_loss(0.0, 0.0, 0.0), CONFIG, far).outcome == "silent", "it may be a collapse"


@pytest.mark.parametrize(("m50", "outcome"), [(0.0119, "loud"), (0.0121, "by_choice")])
def test_without_a_far_share_the_line_is_a_lower_one(m50: float, outcome: str) -> None:
    assert weigh("mixer", 700, by_loss(m50, 0.2, 0.4), CONFIG).outcome == outcome


@pytest.mark.parametrize("base", [-2.0, 1e-4, 5e3])
def test_changes_are_taken_against_the_size_of_the_loss(base: float) -> None:
    scale = abs(base)
    assert weigh("m", 1, by_loss(0.001 * scale, 0.01 * scale, 0.2 * scale, base=base), CONFIG).outcome == "loud"
    assert weigh("m", 1, by_loss(1e-5 * scale, 1e-5 * scale, 1e-5 * scale, base=base), CONFIG).outcome == "silent"


def test_a_loss_of_zero_has_no_silence() -> None:
    assert weigh("m", 1, by_loss(0.0, 1e-6, 1e-3, base=0.0), CONFIG).outcome == "loud"
    assert weigh("m", 1, by_loss(1e-9, 1e-6, 1e-3, base=0.0), CONFIG).outcome == "by_choice", "any change is much"
    assert weigh("m", 1, by_loss(0.0, 0.0, 0.0, base=0.0), CONFIG).outcome == "unclear"


@pytest.mark.parametrize(
    ("m50", "m90", "cut", "outcome"),
    [
        (0.001, 0.01, 0.5, "loud"),
        (0.0124, 0.2, 0.5, "loud"),
        (0.0126, 0.2, 0.5, "by_choice"),
        (0.3, 0.9, 0.5, "by_choice"),
        (0.0, 0.0029, 0.0, "silent"),
        (0.0, 0.0031, 0.0, "by_choice"),
    ],
)
def test_the_outcome_by_outputs(m50: float, m90: float, cut: float, outcome: str) -> None:
    evidence = weigh("mixer", 700, by_outputs(m50, m90, cut), CONFIG)
    assert (evidence.outcome, evidence.basis, evidence.base) == (outcome, "kl", None)


def test_every_threshold_is_a_setting() -> None:
    changes = by_loss(0.05, 0.2, 0.4)
    assert weigh("m", 1, changes, CONFIG).outcome == "by_choice"
    assert weigh("m", 1, changes, EvidenceConfig(m50_share=0.2)).outcome == "loud"
    assert weigh("m", 1, changes, EvidenceConfig(far_m50_share=0.2), 0.5).outcome == "loud"
    assert weigh("m", 1, changes, EvidenceConfig(far_m50_share=0.2, far_share_ratio=0.6), 0.5).outcome == "by_choice"
    assert weigh("m", 1, changes, EvidenceConfig(far_m50_share=0.2, m50_ratio=0.02), 0.5).outcome == "by_choice"
    assert weigh("m", 1, by_loss(0.0, 0.0, 0.03), CONFIG).outcome == "unclear"
    assert weigh("m", 1, by_loss(0.0, 0.0, 0.03), EvidenceConfig(cut_ratio=0.01)).outcome == "loud"
    assert weigh("m", 1, by_loss(0.0, 0.0, 0.03), EvidenceConfig(silent_ratio=0.02)).outcome == "silent"
    assert weigh("m", 1, by_outputs(0.1, 0.2, 0.5), EvidenceConfig(kl_share=0.3)).outcome == "loud"
    assert weigh("m", 1, by_outputs(0.1, 0.2, 0.5), EvidenceConfig(kl_silent=0.3)).outcome == "silent"


def test_means_and_standard_error_are_those_of_the_batches() -> None:
    batches = torch.tensor([0.1, 0.3, 0.2, 0.6], dtype=torch.float64)
    total = Changes()
    for m50 in batches.tolist():
        total = add_changes(total, Changes(1, 2.0, m50, 0.5, 1.0, m50 * m50))
    evidence = weigh("m", 1, total, CONFIG)
    assert evidence.m50 == pytest.approx(float(batches.mean()))
    assert evidence.m50_error == pytest.approx(float(batches.std()) / math.sqrt(4))
    assert (evidence.base, evidence.m90, evidence.cut) == pytest.approx((2.0, 0.5, 1.0))


def test_changes_of_two_kinds_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="do not add up"):
        add_changes(by_loss(0, 0, 0), by_outputs(0, 0, 0))
    assert add_changes(Changes(), by_outputs(0, 0, 0)).kind == "outputs"
