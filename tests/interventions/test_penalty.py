"""`collect_penalties`: the regularizer as a term for one's own loss."""

from __future__ import annotations

import pytest
import torch

from ess_monitor.capture import LayerFilter
from ess_monitor.errors import CaptureError, ConfigError
from ess_monitor.interventions import collect_penalties
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
    watched_decay,
    written_out_penalty,
)

LAST = "blocks.1.mixer"


@pytest.mark.parametrize("featurizer", DECAYING)
def test_adding_the_total_equals_the_attached_pull(featurizer: str) -> None:
    model = backbone(featurizer)
    with collect_penalties(model, LAST) as penalties:
        loss = task_loss(model, batch(0))
    (loss + STRENGTH * penalties.total()).backward()
    added = gradients(model)
    pull_on(model).attach()
    task_loss(model, batch(0)).backward()
    assert largest_difference(gradients(model), added) < 1e-5


@pytest.mark.parametrize("featurizer", DECAYING)
def test_the_penalty_of_a_layer_is_that_of_its_decay(featurizer: str) -> None:
    model = backbone(featurizer)
    with collect_penalties(model) as penalties, watched_decay(model) as seen:
        model(batch(0)[0])
    assert list(penalties.per_layer) == ["blocks.0.mixer", LAST]
    torch.testing.assert_close(penalties.per_layer[LAST], written_out_penalty(seen[0]))
    assert torch.equal(penalties.total(), penalties.per_layer["blocks.0.mixer"] + penalties.per_layer[LAST])


def test_a_layer_called_twice_adds_up() -> None:
    model = backbone("gla").blocks[1].mixer
    features = torch.randn(2, 6, 16)
    with collect_penalties(model) as once:
        model(features)
    with collect_penalties(model) as twice:
        model(features)
        model(features)
    torch.testing.assert_close(twice.total(), 2 * once.total())


@pytest.mark.parametrize("layers", [LAST, [LAST], LayerFilter(include=(LAST,)), LayerFilter(exclude=("blocks.0.*",))])
def test_layers_are_chosen_by_name(layers: LayerFilter | str | list[str]) -> None:
    model = backbone("wla")
    with collect_penalties(model, layers) as penalties:
        model(batch(0)[0])
    assert list(penalties.per_layer) == [LAST]


@pytest.mark.parametrize("lacking", ["la", "sa"])
def test_layers_without_decay_are_passed_over_unless_they_are_named(lacking: str) -> None:
    model = backbone((lacking, "gla"))
    with collect_penalties(model) as penalties:
        model(batch(0)[0])
    assert list(penalties.per_layer) == [LAST]
    named = rf"nothing to regularize in blocks\.0\.mixer \({lacking.upper()}\)"
    with pytest.raises(CaptureError, match=named), collect_penalties(model, "blocks.*"):
        pass


@pytest.mark.parametrize("featurizer", ["la", "sa"])
def test_a_model_with_nothing_to_regularise_says_so(featurizer: str) -> None:
    named = rf"nothing to regularize in blocks\.0\.mixer \({featurizer.upper()}\), blocks\.1\.mixer"
    with pytest.raises(CaptureError, match=named), collect_penalties(backbone(featurizer)):
        pass
    with pytest.raises(CaptureError, match="nothing to regularize in Linear"), collect_penalties(torch.nn.Linear(2, 2)):
        pass


def test_a_pattern_that_matches_no_layer_is_an_error() -> None:
    with (
        pytest.raises(ConfigError, match=r"'blocks\.7\.mixer' matches none"),
        collect_penalties(backbone("gla"), "blocks.7.mixer"),
    ):
        pass


def test_a_total_before_any_forward_pass_is_an_error() -> None:
    with collect_penalties(backbone("gla")) as penalties, pytest.raises(CaptureError, match="not seen"):
        penalties.total()


def test_a_layer_that_was_not_called_is_named_and_never_left_out_in_silence() -> None:
    model = backbone("gla")
    with collect_penalties(model) as penalties:
        model.blocks[0].mixer(torch.randn(2, 6, 16))
    assert list(penalties.per_layer) == ["blocks.0.mixer"]
    with pytest.raises(CaptureError, match=rf"\['{LAST}'\] not seen"):
        penalties.total()


def test_no_hook_stays_behind_also_after_an_error() -> None:
    model = backbone("gla")

    def fail() -> None:
        with collect_penalties(model):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_gradients_it_only_looks() -> None:
    model = backbone("gla")
    with torch.no_grad(), collect_penalties(model) as penalties:
        model(batch(0)[0])
    assert penalties.total().item() > 0
    assert not penalties.total().requires_grad


def test_non_reentrant_checkpointing_keeps_the_graph() -> None:
    model = backbone("gla")
    regularised_loss(model, batch(0)).backward()
    expected = gradients(model)
    model.blocks[1].mixer = Checkpointed(model.blocks[1].mixer, use_reentrant=False)
    with collect_penalties(model, LAST) as penalties:
        loss = task_loss(model, batch(0))
    (loss + STRENGTH * penalties.total()).backward()
    assert largest_difference(gradients(model), expected) < 1e-5


def test_reentrant_checkpointing_which_loses_the_graph_is_an_error() -> None:
    model = backbone("gla")
    model.blocks[1].mixer = Checkpointed(model.blocks[1].mixer, use_reentrant=True)
    with collect_penalties(model) as penalties:
        task_loss(model, batch(0))
    with pytest.raises(CaptureError, match=rf"\['{LAST}'\] ran without gradients.*use_reentrant=False"):
        penalties.total()
