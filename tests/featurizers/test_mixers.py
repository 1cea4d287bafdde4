"""Every mixer applies the operator that its core is called with, and that operator is the paper's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.errors import ConfigError
from ess_monitor.featurizers import FEATURIZERS, GLA, GLAS6, LA, S6, SA, WLA, CausalSoftmax, DiagonalScan, build_mixer
from tests.featurizers.helpers import scan_operator, softmax_operator, watch_core

WIDTH, HEADS, STATE = 12, 2, 4
NAMES = tuple(FEATURIZERS)


def mixer_of(name: str) -> nn.Module:
    mixer = build_mixer(name, WIDTH, HEADS, STATE)
    with torch.no_grad():  # leave the starting point, where some parameters are 0
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def operator_of(args: tuple[object, ...]) -> Tensor:
    q, k, _, last = args
    return softmax_operator(q, k, last) if isinstance(last, float) else scan_operator(q, k, last)


@pytest.mark.parametrize("length", [1, 2, 13, 32, 33, 70])
@pytest.mark.parametrize("name", NAMES)
def test_core_applies_the_operator_of_its_arguments(name: str, length: int) -> None:
    with torch.no_grad():
        args, y, _ = watch_core(mixer_of(name), torch.randn(2, length, WIDTH))
    expected = operator_of(args) @ args[2].double()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_core_mixes_positions(name: str) -> None:
    mixer = mixer_of(name)
    u = torch.randn(2, 9, WIDTH)
    order = torch.randperm(9)
    _, core_output, output = watch_core(mixer, u)
    mixer.core.forward = lambda *_: core_output[:, :, order]
    torch.testing.assert_close(mixer(u), output[:, order])
    assert [*mixer.core.parameters(), *mixer.core.buffers()] == []
    assert isinstance(mixer.core, CausalSoftmax if name == "sa" else DiagonalScan)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_do_not_depend_on_later_tokens(name: str) -> None:
    mixer = mixer_of(name)
    u = torch.randn(2, 50, WIDTH)
    changed = u.clone()
    changed[:, 37:] = torch.randn(2, 13, WIDTH)
    before, after = mixer(u), mixer(changed)
    torch.testing.assert_close(before[:, :37], after[:, :37], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 37:], after[:, 37:], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_input_decide_everything(name: str) -> None:
    u = torch.randn(2, 40, WIDTH)
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        mixer = build_mixer(name, WIDTH, HEADS, STATE)
        y = mixer(u)
        y.square().sum().backward()
        outputs.append((y, [parameter.grad for parameter in mixer.parameters()]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(one, other) for one, other in zip(outputs[0][1], outputs[1][1], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    mixer = mixer_of(name)
    (mixer(torch.randn(2, 40, WIDTH)) * torch.randn(2, 40, WIDTH)).sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_core_gets_the_documented_shapes(name: str) -> None:
    mixer = build_mixer(name, WIDTH, HEADS, STATE)
    q, k, v, last = watch_core(mixer, torch.randn(3, 20, WIDTH))[0]
    heads, values = (WIDTH, 1) if name == "s6" else (HEADS, WIDTH // HEADS)
    assert mixer.num_heads == heads
    assert q.shape == k.shape == (3, heads, 20, STATE)
    assert v.shape == (3, heads, 20, values)
    assert mixer.state_capacity == (None if name == "sa" else STATE)
    expected = {"la": None, "wla": (1, HEADS, 1, STATE), "sa": STATE**-0.5}.get(name, tuple(q.shape))
    assert (tuple(last.shape) if isinstance(last, Tensor) else last) == expected


def test_la_has_no_decay_and_sees_only_differences_of_positions() -> None:
    mixer = LA(WIDTH, HEADS, expand_k=1 / 3)
    q, k, _, log_decay = watch_core(mixer, torch.randn(1, 1, WIDTH).expand(1, 9, WIDTH))[0]
    assert log_decay is None
    products = q @ k.mT
    torch.testing.assert_close(products[..., 1:, 1:], products[..., :-1, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer_type", [LA, SA])
def test_rotary_positions_turn_pairs_by_the_documented_angles(mixer_type: type[nn.Module]) -> None:
    base = 50.0
    mixer = mixer_type(WIDTH, HEADS, expand_k=2 / 3, rope_base=base)
    u = torch.randn(1, 30, WIDTH)
    k = watch_core(mixer, u)[0][1]
    plain = mixer.features.k(u).view(1, 30, HEADS, STATE).transpose(1, 2)
    as_complex = torch.complex(plain[..., : STATE // 2], plain[..., STATE // 2 :])
    angle = torch.arange(30.0)[:, None] * base ** (-torch.arange(0.0, STATE, 2) / STATE)
    turned = as_complex * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(k, torch.cat([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 16.0])
def test_wla_decay_is_sigmoid_of_the_logit_to_the_power_of_one_over_beta(beta: float) -> None:
    mixer = WLA(WIDTH, HEADS, beta=beta)
    assert torch.equal(mixer.decay_logit, torch.zeros(HEADS, WIDTH // HEADS))
    nn.init.normal_(mixer.decay_logit)
    log_decay = watch_core(mixer, torch.randn(1, 5, WIDTH))[0][3]
    torch.testing.assert_close(log_decay.exp()[0, :, 0], mixer.decay_logit.sigmoid() ** (1 / beta))


@pytest.mark.parametrize("beta", [1.0, 16.0])
def test_gla_decay_is_sigmoid_of_the_low_rank_gate(beta: float) -> None:
    mixer = GLA(WIDTH, HEADS, beta=beta, gate_rank=3)
    u = torch.randn(2, 7, WIDTH)
    log_decay = watch_core(mixer, u)[0][3]
    logits = (u @ mixer.gate.down.weight.T @ mixer.gate.up.weight.T + mixer.gate.up.bias).view(2, 7, HEADS, -1)
    assert mixer.gate.down.weight.shape == (3, WIDTH)
    torch.testing.assert_close(log_decay.exp(), logits.transpose(1, 2).sigmoid() ** (1 / beta))


@pytest.mark.parametrize("alpha", [1.0, 1000.0])
def test_gla_s6_decay_is_the_arange_over_alpha_times_softplus_of_the_gate(alpha: float) -> None:
    mixer = GLAS6(WIDTH, HEADS, alpha=alpha)
    u = torch.randn(2, 7, WIDTH)
    log_decay = watch_core(mixer, u)[0][3]
    arange = torch.arange(1, WIDTH // HEADS + 1)
    torch.testing.assert_close(log_decay, -arange / alpha * F.softplus(mixer.gate(u)))


def test_gla_s6_keeps_a_changed_alpha_in_its_checkpoint() -> None:
    mixer, restored = GLAS6(WIDTH, HEADS, alpha=1.0), GLAS6(WIDTH, HEADS, alpha=7.0)
    mixer.log_alpha.fill_(math.log(100.0))
    restored.load_state_dict(mixer.state_dict())
    u = torch.randn(1, 20, WIDTH)
    assert torch.equal(restored(u), mixer(u))
    assert not any(name == "log_alpha" for name, _ in mixer.named_parameters())


def test_s6_discretises_every_channel_with_its_own_delta() -> None:
    mixer = S6(WIDTH, state_size=STATE)
    u = torch.randn(2, 6, WIDTH)
    q, k, v, log_decay = watch_core(mixer, u)[0]
    delta = F.softplus(u @ mixer.delta.weight.T + mixer.delta.bias)
    for channel in range(WIDTH):
        d = delta[:, :, channel, None]
        torch.testing.assert_close(log_decay[:, channel], -d * torch.arange(1, STATE + 1))
        torch.testing.assert_close(k[:, channel], d * (u @ mixer.b.weight.T))
        torch.testing.assert_close(q[:, channel], u @ mixer.c.weight.T)
        assert torch.equal(v[:, channel, :, 0], u[:, :, channel])


def test_float64_models_stay_in_float64() -> None:
    for name in NAMES:
        assert build_mixer(name, WIDTH, HEADS, STATE).double()(torch.randn(1, 8, WIDTH).double()).dtype == torch.float64


def test_autocast_changes_outputs_by_no_more_than_its_rounding() -> None:
    u = torch.randn(2, 40, WIDTH)
    for name in NAMES:
        mixer = build_mixer(name, WIDTH, HEADS, STATE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = mixer(u)
        high = mixer(u)
        assert (low - high).abs().mean() < 0.05 * high.abs().mean(), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LA(10, 3), "num_heads=3 must divide width=10"),
        (lambda: LA(12, 0), "num_heads=0 must be a whole number from 1"),
        (lambda: WLA(12, 2, expand_k=0.25), "expand_k=0.25 gives 1.5 state dimensions per head"),
        (lambda: LA(12, 2, expand_k=0.5), "state size per head is 3.*even"),
        (lambda: SA(12, 2, rope_base=0.5), "rope_base=0.5 must be a finite number above 1"),
        (lambda: WLA(12, 2, beta=0), "beta=0 must be a finite number above 0"),
        (lambda: GLA(12, 2, beta=-1), "beta=-1 must be a finite number above 0"),
        (lambda: GLA(12, 2, gate_rank=0), "gate_rank=0 must be a whole number from 1"),
        (lambda: GLAS6(12, 2, alpha=0), "alpha=0 must be a finite number above 0"),
        (lambda: GLA(12, 2, qk_bias_std=-1), "qk_bias_std=-1 must be a finite number from 0 up"),
        (lambda: GLA(12, 2, gate_bias_std=-1), "gate_bias_std=-1 must be a finite number from 0 up"),
        (lambda: S6(12, state_size=0), "state_size=0 must be a whole number from 1"),
        (lambda: build_mixer("mamba", 12, 2, 4), "featurizer 'mamba' is unknown; take one of la, wla"),
        (lambda: build_mixer("la", 12, 2, 4, beta=1), "option 'beta' is unknown to la"),
        (lambda: build_mixer("s6", 12, 2, 4, beta=1), "they have no options"),
        (lambda: build_mixer("gla", 12, 2, 0), "state_size=0 must be a whole number from 1"),
    ],
)
def test_impossible_settings_are_refused_with_the_way_out(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("state_size", [2, 6, 10, 22])
@pytest.mark.parametrize("name", NAMES)
def test_build_mixer_reaches_any_state_size_at_any_width(name: str, state_size: int) -> None:
    mixer = build_mixer(name, 30, 3, state_size)
    assert mixer.state_capacity in (state_size, None)
    assert watch_core(mixer, torch.randn(1, 5, 30))[0][0].shape[-1] == state_size


def test_softmax_attention_compiles_with_a_scale_that_is_not_a_constant() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CausalSoftmax(), dynamic=True, fullgraph=True, backend="eager")
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    for scale in (0.5, 0.25):
        assert torch.allclose(compiled(q, k, v, scale), CausalSoftmax()(q, k, v, scale))
    torch._dynamo.reset()
