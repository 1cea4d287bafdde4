"""What the training thread does in a sampled pass where a device is the default, or records a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ess_monitor import Monitor, MonitorConfig
from ess_monitor.capture import sampler
from ess_monitor.ess.linalg import index_tensor
from ess_monitor.featurizers import Backbone, BackboneConfig


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=16, width=16, depth=3, featurizer=("gla", "sa", "s6")))


def sampled() -> list[tuple[str, str, float | None]]:
    """Sample one step; return what was measured of each layer."""
    model = backbone()
    with Monitor(model, MonitorConfig(every_n_steps=1), exporters=[]) as monitor:
        model(torch.randint(0, 16, (2, 12))).square().mean().backward()
        monitor.step()
        return [(r.layer, r.status, r.effective_size) for r in monitor.flush()]


def test_an_index_is_made_on_the_host_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert index_tensor([2, 0], torch.device("cpu")).tolist() == [2, 0]


def test_what_is_copied_does_not_depend_on_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, take = sampled(), sampler.Sampler._take

    def elsewhere(*call: object) -> object:
        with torch.device("meta"):  # a tensor that is made there by mistake holds nothing
            return take(*call)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler.Sampler, "_take", elsewhere)
    assert sampled() == expected
    assert {status for _, status, _ in expected} == {"ok"}


def test_a_pass_that_is_recorded_into_a_graph_is_not_read_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []
    monkeypatch.setattr(sampler, "is_recorded", lambda device_type: True)
    monkeypatch.setattr(sampler.Sampler, "_take", lambda self, layer, call: copies.append(layer.name))
    assert {status for _, status, _ in sampled()} == {"skipped"}
    assert copies == []
