"""The injected gradients are those of strength * ||A - I||_F added to the loss, in every way of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ess_monitor.featurizers import Backbone
from tests.interventions.helpers import (
    DECAYING,
    STRENGTH,
    Checkpointed,
    backbone,
    batch,
    gradients,
    largest_difference,
    pull_on,
    regularised_loss,
    task_loss,
)
from tests.interventions.ranks import WORLD_SIZE, averaged_gradients
from tests.ranks import saved_by_ranks

FLOAT32, FLOAT64 = 1e-5, 1e-10


@pytest.fixture(params=DECAYING)
def model(request: pytest.FixtureRequest) -> Backbone:
    return backbone(request.param)


def expected_gradients(model: Backbone, *, scale: float = 1.0) -> list[Tensor]:
    (scale * regularised_loss(model, batch(0))).backward()
    return gradients(model)


def test_without_the_pull_the_gradients_are_other_ones(model: Backbone) -> None:
    """What all others compare would be equal by accident if the term did not matter."""
    task_loss(model, batch(0)).backward()
    assert largest_difference(gradients(model), expected_gradients(model)) > 1e-2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=str)
def test_gradients_equal_those_of_the_added_term(model: Backbone, dtype: torch.dtype, limit: float) -> None:
    model.to(dtype)
    regularised_loss(model, batch(0)).backward()
    expected = gradients(model)
    pull_on(model).attach()
    task_loss(model, batch(0)).backward()
    assert largest_difference(gradients(model), expected) < limit


def test_gradients_accumulate_over_three_batches_with_the_share_of_each(model: Backbone) -> None:
    batches = [batch(seed) for seed in range(3)]
    torch.stack([regularised_loss(model, data) for data in batches]).mean().backward()
    expected = gradients(model)
    pull_on(model, grad_scale=lambda: 1 / len(batches)).attach()
    for data in batches:
        (task_loss(model, data) / len(batches)).backward()
    assert largest_difference(gradients(model), expected) < FLOAT32


@pytest.mark.parametrize("scale", [lambda: 1024.0, lambda: torch.tensor(1024.0)], ids=["number", "tensor"])
def test_gradients_carry_the_loss_scale(model: Backbone, scale: Callable[[], float | Tensor]) -> None:
    expected = expected_gradients(model, scale=1024.0)
    pull_on(model, grad_scale=scale).attach()
    (1024.0 * task_loss(model, batch(0))).backward()
    assert largest_difference(gradients(model), expected) < FLOAT32


def test_the_scale_is_asked_at_every_backward_pass(model: Backbone) -> None:
    scales = iter([1.0, 1024.0])
    pull_on(model, grad_scale=lambda: next(scales)).attach()
    task_loss(model, batch(0)).backward()
    once = gradients(model)
    (1024.0 * task_loss(model, batch(0))).backward()
    assert largest_difference([g / 1024.0 for g in gradients(model)], once) < FLOAT32


def test_bf16_autocast_differs_by_less_than_the_noise_of_bf16(model: Backbone) -> None:
    precise = expected_gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = regularised_loss(model, batch(0))
    added.backward()
    expected = gradients(model)
    pull_on(model).attach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task_loss(model, batch(0))
    loss.backward()
    assert largest_difference(gradients(model), expected) < largest_difference(expected, precise)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("attached", ["before wrapping", "after wrapping"])
def test_activation_checkpointing_changes_nothing(model: Backbone, use_reentrant: bool, attached: str) -> None:
    expected = expected_gradients(model)
    if attached == "before wrapping":
        pull_on(model).attach()
    for block in model.blocks:
        block.mixer = Checkpointed(block.mixer, use_reentrant=use_reentrant)
    if attached == "after wrapping":
        pull_on(model).attach()
    task_loss(model, batch(0)).backward()
    assert largest_difference(gradients(model), expected) < FLOAT32


def test_two_layers_carry_the_sum_of_their_penalties() -> None:
    model = backbone("gla")
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    pull_on(second).attach()
    pull_on(first.blocks[0]).attach()
    pull_on(model).attach()
    pull_on(model.blocks[0]).attach()
    found = []
    for each in (model, first, second, backbone("gla")):
        task_loss(each, batch(0)).backward()
        found.append(gradients(each))
    both, one, other, none = found
    expected = [a + b - c for a, b, c in zip(one, other, none, strict=True)]
    assert largest_difference(both, expected) < FLOAT32


def test_ddp_averages_loss_and_penalty_over_two_processes_with_different_data(tmp_path: Path) -> None:
    found = saved_by_ranks(averaged_gradients, tmp_path, WORLD_SIZE)
    expected = {}
    for featurizer in DECAYING:
        model = backbone(featurizer)
        losses = [regularised_loss(model, batch(seed=rank)) for rank in range(WORLD_SIZE)]
        torch.stack(losses).mean().backward()
        expected[featurizer] = gradients(model)
    for featurizer in DECAYING:
        assert largest_difference(found[0][featurizer], expected[featurizer]) < FLOAT32
        assert all(map(torch.equal, found[0][featurizer], found[1][featurizer]))


def test_strength_scales_the_injected_gradient(model: Backbone) -> None:
    regularised_loss(model, batch(0), strength=4 * STRENGTH).backward()
    expected = gradients(model)
    pull_on(model, strength=4 * STRENGTH).attach()
    task_loss(model, batch(0)).backward()
    assert largest_difference(gradients(model), expected) < FLOAT32
