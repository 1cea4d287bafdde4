"""A^power in one layer: what is counted, what is refused, and that everything is as before afterwards."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor import CaptureError, ConfigError, register_capture
from ess_monitor.capture import AlphaHandle, CaptureSpec, DecayHandle, Layer, Transition, find_layers
from ess_monitor.capture.adapters.mamba2 import ADAPTERS as MAMBA2
from ess_monitor.capture.decay_power import can_raise, decay_raised
from ess_monitor.capture.handles import STRONGEST_RATE, DecayInputs, raise_arguments, raised_log_decay
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite, Op
from ess_monitor.capture.hooks.changed_calls import ChangedCalls
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.featurizers import GLA, LA, S6, SA

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


def only(model: nn.Module) -> Layer:
    [layer] = find_layers(model)
    return layer


def by_alpha(layer: Layer) -> Layer:
    """A layer that computes A from its parameters, as far as anybody can see."""
    return dataclasses.replace(layer, spec=dataclasses.replace(layer.spec, decay=None))


def s6() -> Layer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return only(S6(16, state_size=4))


BOTH_WAYS = [pytest.param(lambda layer: layer, id="arguments"), pytest.param(by_alpha, id="alpha")]


@pytest.mark.parametrize("way", BOTH_WAYS)
@pytest.mark.parametrize("power", [0.1, 0.5, 1, 1.0, 4.0])
def test_both_ways_compute_what_another_rate_would(way: Any, power: float) -> None:
    layer = way(s6())
    before = layer.module(X)
    with torch.no_grad(), decay_raised(layer, power) as raised:
        found = layer.module(X)
        twice = layer.module(X)
    assert raised == ChangedCalls(calls=2)
    assert torch.equal(found, twice)
    assert torch.equal(layer.module(X), before)
    if power == 1:
        assert torch.equal(found, before)
    with torch.no_grad():
        layer.module.A_log += math.log(power)
        torch.testing.assert_close(found, layer.module(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", BOTH_WAYS)
def test_with_a_of_zero_every_token_is_alone(way: Any) -> None:
    layer = way(s6())
    with torch.no_grad(), decay_raised(layer, math.inf):
        together = layer.module(X)
        alone = torch.cat([layer.module(X[:, t : t + 1]) for t in range(X.shape[1])], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", BOTH_WAYS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(way: Any, error: type[BaseException]) -> None:
    layer, broken = way(s6()), [True]

    def fail(module: nn.Module, args: Any, output: Tensor) -> None:
        if broken[0]:
            raise error("not today")

    layer.module.norm.register_forward_hook(fail)
    with torch.no_grad():
        broken[0] = False
        before, A_log = layer.module(X), layer.module.A_log.clone()
        broken[0] = True
        with pytest.raises(error, match="not today"), decay_raised(layer, 0.5):
            layer.module(X)
        with pytest.raises(RuntimeError, match="of the caller"), decay_raised(layer, 0.5):
            raise RuntimeError("of the caller")
        broken[0] = False
        assert torch.equal(layer.module.A_log, A_log)
        assert torch.equal(layer.module(X), before)
    assert not layer.module._forward_pre_hooks
    assert not layer.module._forward_hooks
    assert not layer.module.core._forward_pre_hooks


def test_alpha_is_another_one_only_during_the_calls_of_the_layer_and_after_one_that_failed() -> None:
    layer = by_alpha(s6())
    A_log, seen = layer.module.A_log.detach().clone(), list[Tensor]()
    layer.module.core.register_forward_pre_hook(lambda module, args: seen.append(layer.module.A_log.detach().clone()))
    with torch.no_grad(), decay_raised(layer, 0.5) as raised:
        layer.module(X)
        assert torch.equal(layer.module.A_log, A_log)
        with pytest.raises(Exception, match="16"):
            layer.module(X[..., :3])
        assert torch.equal(layer.module.A_log, A_log)
        layer.module(X)
    assert raised.calls == 3
    assert torch.equal(layer.module.A_log, A_log)
    for during in seen:
        torch.testing.assert_close(during, A_log - math.log(2.0))


def test_the_graph_of_a_forward_pass_before_is_still_good_afterwards() -> None:
    layer, twin = by_alpha(s6()), s6()
    loss = layer.module(X).square().mean()
    with torch.no_grad(), decay_raised(layer, math.inf):
        layer.module(X)
    loss.backward()
    twin.module(X).square().mean().backward()
    for (name, p), q in zip(layer.module.named_parameters(), twin.module.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_the_calls_that_were_seen_are_told() -> None:
    layer = s6()
    with decay_raised(layer, 0.5) as raised:
        assert raised == ChangedCalls(0, 0)
    layer.module(X)
    assert raised == ChangedCalls(0, 0)

    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2)
    attention = transformers.RwkvModel(config).blocks[0].attention
    with torch.no_grad(), decay_raised(only(attention), 0.5) as raised:
        attention(X)
        assert raised == ChangedCalls(calls=1, unchanged=0)
        attention(X[:, :1])  # as a step of decoding
    assert raised == ChangedCalls(calls=1, unchanged=1)


# ops that call ops


def outer(x: Tensor, log_decay: Tensor) -> Tensor:
    """An op that passes its work on."""
    return inner(x, log_decay)


def inner(x: Tensor, log_decay: Tensor) -> Tensor:
    return x * log_decay


class CallsOps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return outer(x, torch.ones(1)) + inner(x, torch.ones(1))


def with_op_decay(module: nn.Module, *, has_raised: bool = True) -> Layer:
    def raised(call: Call, power: float) -> Arguments:
        return call.args, {**call.kwargs, "log_decay": call.kwargs["log_decay"] * power}

    site = CallSite(ops=(Op("outer", (globals(),)), Op("inner", (globals(),))))
    decay = DecayHandle(
        ("gate", "bias"),
        site,
        lambda call: DecayInputs((call.kwargs["log_decay"],), lambda tensors: Transition(tensors[0])),
        lambda call, tensors: (call.args, {**call.kwargs, "log_decay": tensors[0]}),
        raised if has_raised else None,
    )
    return Layer("mixer", module, CaptureSpec("custom", lambda call: None, site, decay=decay))


def test_an_op_that_calls_another_is_raised_once_and_every_op_of_the_layer_is() -> None:
    net = CallsOps()
    with decay_raised(with_op_decay(net), 0.5) as raised:
        found = net(X)
    assert torch.equal(found, X)
    assert raised == ChangedCalls(calls=2)
    assert torch.equal(net(X), 2 * X)


# what cannot be raised


class Ema(nn.Module):
    """A layer of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(-2, 0, 16))

    def forward(self, x: Tensor) -> Tensor:
        ys, s = [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            s = (-self.log_rate.exp()).exp() * s + x[:, t]
            ys.append(s)
        return torch.stack(ys, 1)


@pytest.fixture
def ema() -> Layer:
    @register_capture(Ema)
    def read(ema: Any, args: Any, kwargs: Any, output: Tensor) -> DiagonalRecurrence:
        ones = torch.ones(1, 16, output.shape[1], 1)
        return DiagonalRecurrence(-ema.log_rate.exp()[None, :, None, None], ones, ones)

    return only(Ema())


def test_a_layer_of_the_user_is_refused_unless_it_has_an_alpha(ema: Layer) -> None:
    assert can_raise(ema) == "Ema has no decay, or a fixed one"
    with pytest.raises(CaptureError, match=r"layer model: Ema has no decay"), decay_raised(ema, 0.5):
        pass
    alpha = dataclasses.replace(ema, spec=dataclasses.replace(ema.spec, alpha=AlphaHandle("log_rate")))
    assert can_raise(alpha) == ""
    with torch.no_grad(), decay_raised(alpha, math.inf) as raised:
        torch.testing.assert_close(ema.module(X), X)
    assert raised == ChangedCalls(calls=1)


def test_what_a_decay_without_a_power_follows_from_is_named() -> None:
    reason = can_raise(with_op_decay(CallsOps(), has_raised=False))
    assert reason == "A of CallsOps follows from gate, bias, and nothing in it is a decay that has a power"


@pytest.mark.parametrize("cls", [LA, SA])
def test_a_mixer_without_decay_is_refused(cls: type[nn.Module]) -> None:
    assert can_raise(only(cls(16, 2))) == f"{cls.__name__} has no decay, or a fixed one"


@pytest.mark.parametrize("power", [0, -1.0, math.nan, -math.inf, True, "half", None])
def test_a_power_that_is_none_is_refused(power: Any) -> None:
    layer = only(GLA(16, 2))
    with pytest.raises(ConfigError, match="power"), decay_raised(layer, power):
        pass
    with pytest.raises(ConfigError, match="layer"), decay_raised(layer.module, 0.5):  # type: ignore[arg-type]
        pass


# numbers


def test_a_reset_of_a_packed_sequence_stays_one() -> None:
    log_decay = torch.tensor([-math.inf, -2.0, 0.0])
    assert raised_log_decay(log_decay, 0.5).tolist() == [-math.inf, -1.0, 0.0]
    assert raised_log_decay(log_decay, math.inf).tolist() == [-math.inf, -30.0, -30.0]


def test_a_constant_decay_beside_the_gate_is_raised_as_well_and_a_call_with_neither_is_not() -> None:
    names = dict.fromkeys(("g", "gk", "g_gamma"), raised_log_decay)
    raised = raise_arguments(lambda call: DecayInputs((), lambda tensors: Transition(tensors[0])), names)
    given = {"q": X, "g": torch.tensor([-2.0]), "gk": None, "g_gamma": torch.tensor([-0.5])}
    layer = nn.Identity()
    found = raised(Call(layer, layer, "chunk_simple_gla", kwargs=given), 0.5)
    assert found == ((), {"q": X, "g": torch.tensor([-1.0]), "gk": None, "g_gamma": torch.tensor([-0.25])})
    assert raised(Call(layer, layer, "chunk_simple_gla", kwargs={"q": X, "g": None}), 0.5) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("form", ["exp", "softplus"])
def test_the_strongest_rate_is_finite_in_every_precision(form: Any, sign: float, dtype: torch.dtype) -> None:
    tensor = torch.linspace(-12, 30, 43, dtype=dtype)
    found = AlphaHandle("t", sign, form).raised(tensor, math.inf)
    assert found.dtype == dtype
    assert found.isfinite().all()
    rate = (sign * found.double()).exp() if form == "exp" else nn.functional.softplus(sign * found.double())
    least = min(STRONGEST_RATE, torch.finfo(dtype).max)
    assert (rate >= 0.9 * least).all()


class Divided(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x / self.number


@pytest.mark.parametrize("number", [16, 0.5])
def test_an_alpha_that_is_a_number_comes_back_as_it_was(number: float) -> None:
    module = Divided(number)
    spec = CaptureSpec("custom", lambda call: None, alpha=AlphaHandle("number", form="divisor"))
    layer = Layer("mixer", module, spec)
    with decay_raised(layer, 0.5):
        torch.testing.assert_close(module(X), X / (2 * number))
    with decay_raised(layer, math.inf):
        torch.testing.assert_close(module(X), X * STRONGEST_RATE)
    assert module.number == number
    assert type(module.number) is type(number)


CHUNK = 256


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """What a test wants to see of the op: its A."""
    return A


class Scans(nn.Module):
    def forward(self, dt: Tensor, A: Tensor) -> Tensor:
        x, b = torch.ones(*dt.shape, 1), torch.ones(*dt.shape[:2], 1, 1)
        return mamba_chunk_scan_combined(x, dt, A, b, b, CHUNK)


def test_sums_of_mamba2_stay_small_enough_for_their_differences_and_tokens_of_small_steps_forget_as_well() -> None:
    spec = MAMBA2[0].spec(Scans())
    assert spec is not None
    layer, A = Layer("mixer", Scans(), spec), torch.tensor([-1.0, -0.001, -16.0, -1.0])
    dt = torch.rand(2, 600, 4) * torch.tensor([1e-3, 0.1, 10.0, 0.1])
    dt[:, ::7] = dt.mean((0, 1)) / 1000
    dt[:, :, 3] = 0.0
    with decay_raised(layer, math.inf):
        found = layer.module(dt, A)
    log_decay = (dt * found)[..., :3]
    assert found.isfinite().all()
    assert (found <= A).all()
    assert log_decay.split(CHUNK, 1)[0].sum(1).abs().max() <= 2**22 * 1.001
    assert (log_decay[:, ::7] < -10).all()
    with decay_raised(layer, 0.5):
        assert torch.equal(layer.module(dt, A), A / 2)
