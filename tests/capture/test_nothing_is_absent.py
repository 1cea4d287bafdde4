"""Every module that mixes tokens is in the list of `describe`, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.census import own_layers
from ess_monitor import CaptureConfig, CaptureError, Monitor, MonitorConfig, describe, profile, register_capture
from ess_monitor.capture import find_layers
from ess_monitor.capture.linearized import LINEARIZED
from ess_monitor.ess import Convolution
from ess_monitor.featurizers import GLA, SA
from tests.capture.test_forward_code import ByCell

WIDTH = 8


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


@pytest.mark.parametrize("name", ["MyMamba", "HFMamba", "LitMamba"])
def test_a_module_around_a_whole_model_is_no_mixer_whatever_it_is_called(name: str) -> None:
    model = named("Tower", embeddings=nn.Embedding(16, WIDTH), mixer=named("MinGRU"))
    assert [info.name for info in describe(named("Trained", wrapped=named(name, model=model))).layers] == [
        "wrapped.model.mixer"
    ]


def test_a_short_convolution_beside_a_mixer_is_a_layer_of_its_own() -> None:
    block = named("Block", conv=short_convolution(), recurrence=named("minGRU"), mlp=nn.Linear(4, 4))
    assert [(i.name, i.supported) for i in describe(block).layers] == [("conv", True), ("recurrence", False)]


class StepByStep(nn.Module):
    """A cell below a module that knows nothing of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, token: Tensor, state: Tensor) -> Tensor:
        return self.cell(token, state)


class AddsAKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("make", [*own_layers.LAYERS, StepByStep, AddsAKey, lambda: nn.GRU(4, 4, bidirectional=True)])
def test_a_reason_says_what_can_be_done_and_jacobian_does_it_where_it_says_so(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make())
    infos = describe(model).layers
    promised = [info.name for info in infos if "capture.unknown: jacobian measures" in info.reason]
    linearized = [layer.name for layer in find_layers(model, unknown="jacobian") if layer.spec is LINEARIZED]
    assert linearized == promised
    for info in infos:
        never = "later tokens" in info.reason or "transposed" in info.reason or "a shift" in info.reason
        assert info.supported or never or "register_capture(" in info.reason or "jacobian" in info.reason


def test_the_linearization_of_a_layer_that_an_adapter_refuses_is_its_own() -> None:
    torch.manual_seed(0)
    layer, x = AddsAKey(), torch.randn(1, 6, WIDTH)
    config = MonitorConfig(positions="midpoint", capture=CaptureConfig(unknown="jacobian"))
    [found] = profile(layer, x, config=config).readings
    J = torch.autograd.functional.jacobian(lambda u: layer.double()(u), x.double())[0, 3:, :, 0, :3]
    assert found.status == "ok"
    assert found.effective_size == (torch.linalg.svdvals(J.reshape(3 * WIDTH, 3 * WIDTH)) > 1e-3).sum()


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
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (x @ x.mT).masked_fill(later, -torch.inf).softmax(-1) @ x


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


def test_inputs_correct_what_a_branch_that_is_not_taken_seemed_to_allow() -> None:
    net = Holding(Branching())
    assert [info.supported for info in describe(net).layers] == [True, True]
    first, second = describe(net, torch.randn(2, 8, WIDTH)).layers
    assert (first.supported, second.supported) == (True, False)
    assert "took a branch" in second.reason
