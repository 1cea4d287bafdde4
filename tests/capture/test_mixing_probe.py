"""What a module's output depends on, against the Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor import Monitor, MonitorConfig, describe
from ess_monitor.capture.detection import MixingProbe
from ess_monitor.featurizers import GLA

WIDTH = 8


class Shift(nn.Linear):
    """Mixes by a slice, which no name and no operation tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1))


class Reversed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


class FalseAttention(nn.Linear):
    """Is called like a mixer, and is none."""


class AcrossTokens(nn.Module):
    """As in an MLP-Mixer: a linear layer over the axis of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.mT).mT


PROBED = {
    "gru": nn.GRU(WIDTH, WIDTH, batch_first=True),
    "shift": Shift(WIDTH, WIDTH),
    "reversed": Reversed(WIDTH, WIDTH),
    "norm": nn.LayerNorm(WIDTH),
    "gla": GLA(WIDTH, 2),
    "pointwise": FalseAttention(WIDTH, WIDTH),
}


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """Sizes of the blocks dy_i / dx_j, (length, length)."""

    def first(x: Tensor) -> Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    blocks = torch.autograd.functional.jacobian(first, x)[0, :, :, 0]
    return blocks.abs().sum((1, 3))


@pytest.mark.parametrize("name", PROBED)
def test_the_middle_token_depends_on_what_the_jacobian_says(name: str) -> None:
    torch.manual_seed(0)
    module, x = PROBED[name], torch.randn(1, 6, WIDTH)
    row = jacobian(module, x)[3]
    with MixingProbe(nn.Sequential(nn.Identity(), module)) as probe:
        probe._model(x)
    if name in ("norm", "pointwise") and not row[[0, 1, 2, 4, 5]].any():
        assert not probe.found.get("1") or probe.found["1"].is_pointwise
        return
    mixing = probe.found["1"] if "1" in probe.found else next(m for m in probe.found.values() if m.mixes)
    assert (bool(mixing.past), bool(mixing.future), bool(mixing.seen)) == (
        bool(row[:3].any()),
        bool(row[4:].any()),
        bool(row[3]),
    )


def test_a_description_with_inputs_lists_what_mixes_and_nothing_else() -> None:
    net = nn.Sequential(GLA(WIDTH, 2), Shift(WIDTH, WIDTH), FalseAttention(WIDTH, WIDTH), AcrossTokens(), nn.ReLU())
    assert [info.name for info in describe(net).layers] == ["0", "2"]
    found = describe(net, torch.randn(2, 6, WIDTH))
    assert [(info.name, info.supported) for info in found.layers] == [("0", True), ("1", False), ("3.tokens", False)]
    assert "depends on other tokens" in found.layers[1].reason
    assert "depends on later tokens" in found.layers[2].reason


def test_a_layer_that_looks_ahead_on_these_inputs_is_skipped() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 1)
    x = torch.randn(2, 6, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    [info] = describe(encoder, x).layers
    assert not info.supported
    assert "later tokens" in info.reason
    assert describe(encoder, x, mask=mask, is_causal=True).supported


@pytest.mark.parametrize("frozen", [False, True])
def test_a_probe_leaves_the_model_as_it_was(frozen: bool) -> None:
    net = nn.Sequential(nn.Embedding(9, WIDTH), GLA(WIDTH, 2), Shift(WIDTH, WIDTH), nn.Dropout(0.5))
    net.requires_grad_(not frozen)
    tokens, before = torch.randint(9, (2, 6)), {k: v.clone() for k, v in net.state_dict().items()}
    generator = torch.get_rng_state()
    assert [info.name for info in describe(net, tokens).layers] == ["1", "2"]
    assert net.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad is not frozen for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Twisted(nn.Module):
    """A chain whose second layer is found by its behavior alone."""

    def __init__(self, shift: nn.Module) -> None:
        super().__init__()
        self.embed, self.gla, self.shift = nn.Linear(WIDTH, WIDTH), GLA(WIDTH, 2), shift

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(self.gla(self.embed(x)))


def losses(net: nn.Module, after: Callable[[], object] = lambda: None) -> list[float]:
    generator, found = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(2)
    for _ in range(4):
        loss = net(torch.randn(2, 6, WIDTH, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        found.append(loss.item())
    return found


def test_a_run_says_once_which_module_mixes_and_is_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = Twisted(nn.Sequential(Shift(WIDTH, WIDTH), nn.Dropout(0.2)))
    bare = losses(copy.deepcopy(net))
    with Monitor(net, MonitorConfig(every_n_steps=1, strict=True)) as monitor:
        assert losses(net, monitor.step) == bare
    [record] = [r.getMessage() for r in caplog.records if r.name == "ess_monitor"]
    assert record.startswith("ess_monitor: shift.0: no capture is known for Shift")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Doubled(torch.autograd.Function):
    """Writes into what it saved, as fused kernels do: a second backward pass would be wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        result = 2 * x * gradient
        x.zero_()
        return result


class ByKernel(Shift):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Doubled.apply(x))


class Checkpointed(Shift):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [ByKernel, Checkpointed])
def test_a_run_does_not_ask_where_a_second_backward_pass_might_do_harm(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = Twisted(kind(WIDTH, WIDTH))
    bare = losses(copy.deepcopy(net))
    with Monitor(net, MonitorConfig(every_n_steps=1, strict=True)) as monitor:
        assert losses(net, monitor.step) == bare


def test_a_run_does_not_ask_where_others_have_hooks(caplog: pytest.LogCaptureFixture) -> None:
    net = Twisted(Shift(WIDTH, WIDTH))
    calls: list[object] = []
    net.shift.register_full_backward_hook(lambda *call: calls.append(call))
    with Monitor(net, MonitorConfig(every_n_steps=1, strict=True)) as monitor:
        losses(net, monitor.step)
    assert len(calls) == 4
    assert not [r for r in caplog.records if r.name == "ess_monitor"]


class AddAndNorm(nn.Module):
    """Treats each token by itself, of two tensors of which one was mixed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.norm(mixed + x)


class Scores(nn.Module):
    """Mixes by its second and third argument, and treats the tokens of the first by themselves."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tril() @ v


class OfSeveral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gla, self.close, self.scores = GLA(WIDTH, 2), AddAndNorm(), Scores()

    def forward(self, x: Tensor) -> Tensor:
        y = self.close(self.gla(x), x)
        return self.scores(y, y, y)


def test_every_argument_is_asked_by_itself() -> None:
    net = OfSeveral()
    with MixingProbe(net, listed=["gla"]) as probe:
        net(torch.randn(2, 6, WIDTH))
    assert probe.found["close"].is_pointwise
    assert (bool(probe.found["scores"].past), bool(probe.found["scores"].future)) == (True, False)
    assert [info.name for info in describe(net, torch.randn(2, 6, WIDTH)).layers] == ["gla", "scores"]


class Padded(nn.Module):
    """A causal convolution across channels, padded on both sides and cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT


def test_channels_that_mix_are_not_taken_for_tokens() -> None:
    found = describe(Padded(), torch.randn(2, 6, WIDTH)).layers
    assert [(info.name, info.supported) for info in found] == [("conv", True)]
    channels_first = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 3, padding=1))
    assert not describe(channels_first, torch.randn(2, WIDTH, 6)).supported


class Scaled(nn.Module):
    """A norm of one's own, over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class TwoTowers(nn.Module):
    """Text of as many tokens as the image's patches have channels."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, WIDTH)
        self.vision = nn.Sequential(nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH), Scaled(), nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList([Scaled(), AcrossLast()])

    def forward(self, words: Tensor, patches: Tensor) -> Tensor:
        x = self.words(words) + self.vision(patches).mean(1, keepdim=True)
        for layer in self.layers:
            x = layer(x)
        return x


class AcrossLast(nn.Module):
    """Moves the tokens to the last axis, for two modules inside of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, :, :5].mT).mT


def test_channels_as_many_as_the_tokens_are_not_taken_for_tokens() -> None:
    net, inputs = TwoTowers(), (torch.randint(9, (2, WIDTH)), torch.randn(2, 5, 12))
    with MixingProbe(net, listed=["layers.1"], in_training=True) as probe:
        net(*inputs)
    assert probe.found
    assert not [name for name, mixing in probe.found.items() if mixing.mixes]
    found = describe(net, *inputs).layers
    assert [info.name for info in found] == ["layers.1.inner.0.0"]


class Resampled(nn.Module):
    """Channels come before time, until a convolution has changed the number of tokens: then norms over channels."""

    def __init__(self, stride: int, up: bool) -> None:
        super().__init__()
        kind = nn.ConvTranspose1d if up else nn.Conv1d
        self.resample = nn.Sequential(kind(WIDTH, WIDTH, 2 * stride, stride))
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), Scaled(), nn.Linear(WIDTH, WIDTH))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(x).mT
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("length", [WIDTH, 12])
def test_channels_of_a_model_that_has_them_first_are_not_taken_for_tokens(length: int, up: bool) -> None:
    net = Resampled(2, up)
    with MixingProbe(net) as probe:
        y = net(torch.randn(2, WIDTH, length))
    assert y.shape == (2, 2 * length + 2 if up else length // 2 - 1, WIDTH)
    assert not [name for name in probe.unlisted() if name.startswith("layers")]


class OverTime(nn.Module):
    """Channels come before time; an unknown module mixes along time, one along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mix, self.out = nn.Conv1d(5, 5, 1), ShiftLast(), AcrossChannels()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.into(x)))


class ShiftLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(x[..., :1]), x[..., :-1]), -1)


class AcrossChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


def test_tokens_are_on_the_last_axis_where_a_convolution_takes_what_is_before_them_for_channels() -> None:
    net, x = OverTime(), torch.randn(1, 5, 9)
    mixed = jacobian(lambda tokens: net.mix(tokens.mT).mT, x.mT)  # type: ignore[arg-type]
    assert mixed.tril(-1).any()
    assert not mixed.triu(1).any()
    assert [info.name for info in describe(net, x).layers] == ["mix"]


def test_a_parametrization_of_a_weight_mixes_no_tokens() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), Shift(6, 6))
    assert [info.name for info in describe(net, torch.randn(2, 6, 6)).layers] == ["1"]
    wide = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 12, 1)))
    assert not describe(wide, torch.randn(2, 6, 6)).layers
