from __future__ import annotations

import pytest
import torch
from torch import nn

from ess_monitor import CaptureConfig, MonitorConfig, NoLayersError, capture_operators, profile
from ess_monitor.featurizers import SA, Backbone, BackboneConfig, build_mixer


def model() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(vocab_size=16, width=16, state_size=8, mixer_options={"beta": 2.0}))


def test_a_profile_is_an_svd_of_every_operator() -> None:
    net, tokens = model(), torch.randint(0, 16, (3, 40))
    found = profile(net, tokens, config=MonitorConfig(positions="all", capture=CaptureConfig(samples=3, heads=None)))
    operators = capture_operators(net, tokens)
    assert [r.layer for r in found.readings] == list(operators)
    for reading in found.readings:
        T = operators[reading.layer].materialize().double()
        spectra = [torch.linalg.svdvals(T[..., i:, :i]) for i in range(1, 40)]
        counts = torch.stack([(s > 1e-3).sum(-1).double() for s in spectra], -1)
        assert reading.effective_size == pytest.approx(float(counts.mean()), abs=1e-9)
        p = [s / s.sum(-1, keepdim=True) for s in spectra]
        entropy = torch.stack([torch.special.entr(q).sum(-1).exp() for q in p], -1)
        assert reading.entropy_size == pytest.approx(float(entropy.mean()), rel=1e-5)
        assert reading.minimum_effective_size == float(counts[..., 19].min())
        assert reading.per_head == pytest.approx(tuple(counts.mean((0, 2)).tolist()))
        assert reading.total_effective_size == pytest.approx(float(counts.mean()) * 2)
        assert reading.effective_size_lower == pytest.approx(float(counts.mean()))


def test_retention_is_the_ess_against_that_without_decay() -> None:
    mixer = build_mixer("gla", 16, 2, 8, beta=0.5)
    x = torch.randn(4, 48, 16)
    (reading,) = profile(mixer, x).readings
    operator = capture_operators(mixer, x)["model"]
    plain = (operator.c @ operator.b.mT).tril().double()
    undecayed = [(torch.linalg.svdvals(plain[..., i:, :i]) > 1e-3).sum(-1).double().mean() for i in reading.positions]
    assert reading.retention_ratio == pytest.approx(reading.effective_size / float(torch.stack(undecayed).mean()))
    assert reading.mean_decay == pytest.approx(float(operator.log_decay.exp().mean()), rel=1e-5)


def test_softmax_attention_has_a_capacity_that_grows_and_no_retention() -> None:
    (reading,) = profile(SA(16, 2), torch.randn(2, 20, 16)).readings
    assert reading.capacity_grows
    assert reading.retention_ratio is None
    assert reading.mean_decay is None
    assert reading.state_capacity == pytest.approx(sum(reading.positions) / len(reading.positions))


def test_a_profile_leaves_the_model_as_it_was() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    profile(net, torch.randint(0, 16, (2, 20)))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(NoLayersError):
        profile(nn.Linear(2, 2), torch.randn(2, 2))
