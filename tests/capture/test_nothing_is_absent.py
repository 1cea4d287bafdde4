"""Every module that mixes tokens is in the list of `describe`, and nothing else is."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import CaptureError, Monitor, MonitorConfig, describe, profile, register_capture
from ess_monitor.ess import Convolution
from ess_monitor.featurizers import GLA, SA

WIDTH = 8


class Wide(nn.Module):
    """Two projections, so that the layers below have parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)


class ByScan(Wide):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, -1)
        log_gate = F.logsigmoid(gate).cumsum(1)
        return self.out(log_gate.exp() * (value / log_gate.exp()).cumsum(1))


class ByFourier(Wide):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, 2 * x.shape[1], 1) * torch.fft.rfft(x, 2 * x.shape[1], 1)
        return torch.fft.irfft(spectrum, 2 * x.shape[1], 1)[:, : x.shape[1]]


class ByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = functools.partial(torch.fft.fftn, dim=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x).real


class ByCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        state, outputs = (x.new_zeros(batch, width),) * 2, []
        for t in range(length):
            state = self.cell(x[:, t], state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


class ByUnbind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            state = 0.5 * state + token
            outputs.append(state)
        return torch.stack(outputs, 1)


class ByProducts(Wide):
    """Linear attention by hand."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.into(x).chunk(2, -1)
        return torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", x, k).tril(), v)


class ByHand(Wide):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.into(x).chunk(2, -1)
        return self.scores(x, k) @ v


class ByConvolution(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x.mT, (3, 0)), torch.ones(WIDTH, 1, 4), groups=WIDTH).mT


class ByFunctionBeside(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return _scanned(self.into(x))


def _scanned(x: Tensor) -> Tensor:
    return x.cumsum(1)


MIXERS = (
    ByScan,
    ByFourier,
    ByAttribute,
    ByCell,
    ByUnbind,
    ByProducts,
    ByHand,
    ByConvolution,
    ByFunctionBeside,
)


class LowRank(nn.Module):
    """Products with its own parameters mix no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.ones(2, WIDTH)), nn.Parameter(torch.ones(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.transpose(0, 1)


class Deep(nn.Module):
    """A loop over layers is none over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        for k in range(len(self.parts)):
            x = self.parts[k](x)
        return x


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.weight = nn.Linear(WIDTH, 2), nn.Parameter(torch.ones(2, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return torch.einsum("ble,bled->bld", shares, torch.einsum("bld,edf->blef", x, self.weight))


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_is_found_by_its_code_whatever_it_is_called(kind: type[nn.Module]) -> None:
    net = nn.Sequential(GLA(WIDTH, 2), nn.Sequential(nn.LayerNorm(WIDTH), kind()))
    [gla, info] = describe(net).layers
    assert (gla.supported, info.name, info.module, info.supported) == (True, "1.1", kind.__name__, False)
    nonlinear = kind is ByCell
    assert ("nonlinear recurrence" if nonlinear else f"register_capture({kind.__name__})") in info.reason


@pytest.mark.parametrize("kind", [LowRank, Deep, Experts])
def test_what_treats_each_token_by_itself_is_not_listed(kind: type[nn.Module]) -> None:
    assert not describe(nn.Sequential(kind())).layers


@pytest.mark.parametrize(
    "name",
    ["MinGRU", "minLSTM", "mLSTMCell", "sLSTMLayer", "SRU", "TTTLinear", "NeuralMemory", "MHA", "QKNormAttention"],
)
def test_a_mixer_is_found_by_its_name_where_its_code_says_nothing(name: str) -> None:
    kind = type(name, (nn.Module,), {"forward": lambda self, x: self.hidden(x)})
    [info] = describe(nn.Sequential(kind())).layers
    assert info.module == name
    assert f"register_capture({name})" in info.reason


@pytest.mark.parametrize("name", ["GemmaMLP", "LSTMNorm", "MambaEmbedding", "AttentionMask", "Schema", "MoEMixture"])
def test_other_parts_of_an_architecture_are_no_mixers(name: str) -> None:
    assert not describe(nn.Sequential(type(name, (nn.Linear,), {})(4, 4))).layers


class Cell(nn.Module):
    """A mixer whose code is elsewhere."""


@pytest.mark.parametrize(
    "name", ["AttentionHead", "MultiHeadEMA", "H3", "MegaLayer", "FNet", "S4D", "LocalAttention", "Based", "XLSTM"]
)
def test_so_are_those_whose_names_are_short_or_say_part_of_it(name: str) -> None:
    test_a_mixer_is_found_by_its_name_where_its_code_says_nothing(name)


def named(name: str, **children: nn.Module) -> nn.Module:
    module = type(name, (nn.Module,), {})()
    for child, part in children.items():
        module.add_module(child, part)
    return module


def short_convolution() -> nn.Conv1d:
    return nn.Conv1d(WIDTH, WIDTH, 4, padding=3, groups=WIDTH)


def test_a_short_convolution_inside_of_a_mixer_that_cannot_be_read_is_a_part_of_it() -> None:
    layer = named("mLSTMLayer", conv=named("CausalConv", conv=short_convolution()), cell=named("mLSTMCell"))
    [info] = describe(named("Stack", blocks=nn.ModuleList([named("Block", mixer=layer)]))).layers
    assert (info.name, info.module, info.supported) == ("blocks.0.mixer", "mLSTMLayer", False)


def test_a_short_convolution_beside_a_mixer_is_a_layer_of_its_own() -> None:
    block = named("Block", conv=short_convolution(), recurrence=named("minGRU"), mlp=nn.Linear(4, 4))
    assert [(i.name, i.supported) for i in describe(block).layers] == [("conv", True), ("recurrence", False)]


class HyenaFilter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x))


class S4DKernel(nn.Module):
    def forward(self, length: int) -> Tensor:
        return torch.ones(length)


class S4D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = S4DKernel()

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.kernel(x.shape[1])))


def test_the_module_whose_output_is_mixed_is_named_and_not_a_part_of_it() -> None:
    hyena = named("HyenaOperator", short_filter=short_convolution(), filter_fn=HyenaFilter())
    net = named("Model", layers=nn.ModuleList([named("Block", mixer=hyena), named("Block", mixer=S4D())]))
    assert [(i.name, i.module) for i in describe(net).layers] == [
        ("layers.0.mixer", "HyenaOperator"),
        ("layers.1.mixer", "S4D"),
    ]


class Angry(nn.Module):
    """Every attribute that is not there is an error of an own kind."""

    def __getattr__(self, name: str) -> object:
        if name in ("is_causal", "config", "num_heads", "d_state", "A_log", "is_cross_attention"):
            raise KeyError(name)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_a_reader_that_fails_on_a_layer_is_a_reason_and_no_error() -> None:
    infos = describe(nn.Sequential(Angry(), GLA(WIDTH, 2))).layers
    assert [i.supported for i in infos] == [False, True]
    assert "failed on Angry: KeyError" in infos[0].reason


def test_a_size_that_a_registration_cannot_tell_is_a_reason_and_no_error() -> None:
    class Taught(nn.Module):
        pass

    register_capture(Taught, state_capacity=lambda layer: layer.missing)(
        lambda *call: Convolution(torch.ones(1, 1, 1), 2)
    )
    [info] = describe(nn.Sequential(Taught())).layers
    assert not info.supported
    assert "missing" in info.reason


class Prefixed(nn.Module):
    """Keys of a learned prefix before those of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.cat((torch.ones_like(x[:, :3]), x), 1)
        return F.scaled_dot_product_attention(x, keys, keys)


class Branching(nn.Module):
    """Has the op in a branch that is not taken."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[1] > 10**6:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return (x @ x.mT).tril().softmax(-1) @ x


class Unused(GLA):
    """Held and never called."""


class Holding(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.gla, self.part = GLA(WIDTH, 2), part

    def forward(self, x: Tensor) -> Tensor:
        return self.gla(x) if isinstance(self.part, Unused) else self.part(self.gla(x))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Prefixed(), "8 queries and 11 keys"),
        (Branching(), "took a branch that does not call scaled_dot_product_attention"),
        (Unused(WIDTH, 2), "its forward was not called"),
    ],
)
def test_a_profile_has_a_row_with_the_true_reason_for_a_layer_that_is_not_read(part: nn.Module, reason: str) -> None:
    good, bad = profile(Holding(part), torch.randn(2, 8, WIDTH)).readings
    assert (good.status, bad.status, bad.layer) == ("ok", "failed", "part")
    assert reason in bad.message


@pytest.mark.parametrize("layer", [GLA(WIDTH, 2), SA(WIDTH, 2), short_convolution()])
def test_a_sequence_of_one_token_is_too_short_and_not_unseen(layer: nn.Module) -> None:
    [reading] = profile(
        layer, torch.randn(2, WIDTH, 1) if isinstance(layer, nn.Conv1d) else torch.randn(2, 1, WIDTH)
    ).readings
    assert reading.status == "too_short"


class PerSample(nn.Module):
    """Runs its layer inside of transforms of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.gla = GLA(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        def loss(sample: Tensor) -> Tensor:
            return self.gla(sample[None]).sum()

        return torch.func.vmap(torch.func.grad(loss))(x)


def test_a_transform_of_torch_func_is_a_reason_in_our_words() -> None:
    [reading] = profile(PerSample(), torch.randn(2, 8, WIDTH)).readings
    assert reading.status == "failed"
    assert "inside of a transform of torch.func" in reading.message


def test_strict_raises_for_a_layer_that_is_not_read() -> None:
    with pytest.raises(CaptureError, match=r"part: .*8 queries and 11 keys"):
        profile(Holding(Prefixed()), torch.randn(2, 8, WIDTH), config=MonitorConfig(strict=True))


def test_a_profile_names_the_mixers_that_it_cannot_measure() -> None:
    result = profile(Holding(ByCell()), torch.randn(2, 8, WIDTH))
    assert [info.name for info in result.skipped] == ["part"]


def test_a_run_says_once_why_a_layer_in_its_list_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    net = Holding(Branching())
    with Monitor(net, MonitorConfig(every_n_steps=1)) as monitor:
        for _ in range(3):
            net(torch.randn(2, 8, WIDTH)).sum().backward()
            monitor.step()
        readings = {r.layer: r for r in monitor.flush()}
    assert (readings["gla"].status, readings["part"].status) == ("ok", "failed")
    [record] = [r.getMessage() for r in caplog.records if "took a branch" in r.getMessage()]
    assert "part is not measured" in record
