"""An alpha that is a plain number of the layer, as in fla: rescaled, taken back, and set again in a resumed run."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor.capture import Layer, find_layers
from ess_monitor.errors import CaptureError
from ess_monitor.interventions import Autopilot, AutopilotConfig, rescale_alpha, restore_alpha
from ess_monitor.interventions.remedies import PullToIdentity, RescaleAlpha, choose_remedy
from ess_monitor.interventions.treatment import Treatment, TreatmentState

LAYERS = ("gla.GatedLinearAttention", "simple_gla.SimpleGatedLinearAttention")


def found(path: str = LAYERS[0], **settings: Any) -> Layer:
    pytest.importorskip("fla")
    from benchmarks.layers.fla import layer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library: no accelerator
        model, _, _ = layer(path, 1, num_heads=2, **settings)
        [only] = find_layers(model)
    return only


def number(layer: Layer) -> Any:
    return layer.module.gate_logit_normalizer


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def treatment(layer: Layer) -> Treatment:
    return Treatment(RescaleAlpha(layer), "collapsed", None)


@pytest.mark.parametrize("path", LAYERS)
@pytest.mark.parametrize("before", [16, 16.1, 3])
def test_the_number_is_multiplied_and_comes_back_as_it_was(path: str, before: float) -> None:
    layer = found(path, gate_logit_normalizer=before)
    assert layer.spec.handles[1] == "alpha: gate_logit_normalizer"
    optimizer = torch.optim.Adam(layer.module.parameters())
    for _ in range(2):
        kept = rescale_alpha(layer.module, 100.0, optimizer=optimizer)
        assert number(layer) == before * 100.0
        rescale_alpha(layer.module, 10.0)
        restore_alpha(layer.module, kept, optimizer=optimizer)
        assert number(layer) == before
        assert type(number(layer)) is type(before)
    assert not optimizer.state


def test_a_clamp_behind_the_number_takes_the_handle_away() -> None:
    layer = found(clamp_min=-3.0)
    assert layer.spec.alpha is None
    with pytest.raises(CaptureError, match="GatedLinearAttention has no tensor"):
        rescale_alpha(layer.module, 10.0)


def test_the_autopilot_pulls_where_the_number_would_be_lost_with_the_saved_weights() -> None:
    layer = found()
    assert choose_remedy(layer) is PullToIdentity
    assert not RescaleAlpha.obstacle(layer)


def test_a_resumed_treatment_sets_the_number_again_and_can_still_be_taken_back() -> None:
    first = found(gate_logit_normalizer=7)
    begun = treatment(first)
    begun.start(4, 100.1, 1.0, None)
    begun.climb(8, 10.3, 1.0, None)
    state = saved_and_loaded(begun.state_dict())
    second = found(gate_logit_normalizer=7)
    second.module.load_state_dict(first.module.state_dict())
    for _ in range(2):  # also a second time, in a process that goes on
        resumed = Treatment.from_state(
            RescaleAlpha(second), TreatmentState.model_validate(state), RescaleAlpha.State.model_validate(state)
        )
        assert number(second) == number(first) == 7 * 100.1 * 10.3
    assert resumed.state_dict() == begun.state_dict()
    for layer, under_way in ((first, begun), (second, resumed)):
        assert under_way.roll_back(None) == ("rolled_back", "rescale_alpha undone, and not tried again")
        assert number(layer) == 7
        assert isinstance(number(layer), int)


def test_the_state_of_an_autopilot_carries_the_number() -> None:
    first, second = found(), found()
    pilots = [Autopilot(AutopilotConfig(mode="auto"), (layer,)) for layer in (first, second)]
    begun = treatment(first)
    begun.start(4, 100.0, 1.0, None)
    pilots[0]._treatments[first.name] = begun
    pilots[1].load_state_dict(saved_and_loaded(pilots[0].state_dict()))
    assert number(second) == 1600.0


def test_the_state_of_another_alpha_says_nothing_of_a_number() -> None:
    from ess_monitor.featurizers import S6

    [layer] = find_layers(nn.Sequential(S6(16, state_size=8)))
    begun = treatment(layer)
    begun.start(4, 100.0, 1.0, None)
    assert "number" not in begun.state_dict()
