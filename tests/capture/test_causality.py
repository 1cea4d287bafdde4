"""A layer is measured when its call shows that T is lower triangular, and skipped with the reason otherwise."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import Monitor, MonitorConfig, describe, profile, register_capture
from ess_monitor.capture.causality.claims import Claim
from ess_monitor.capture.sampler import Sampler
from ess_monitor.ess import DenseOperator
from ess_monitor.evidence.causality import is_causal
from ess_monitor.featurizers import GLA

WIDTH, LENGTH, TAPS = 8, 12, 7
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
NONE = torch.zeros(LENGTH, LENGTH)
CAUSAL = NONE.masked_fill(LATER, -torch.inf)
PREFIX = CAUSAL.clone().index_fill_(1, torch.arange(4), 0.0)
SOFT = NONE.masked_fill(LATER, 0.7)
WINDOW = CAUSAL.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3), -torch.inf)
ALIBI = CAUSAL + (torch.arange(LENGTH)[None] - torch.arange(LENGTH)[:, None]) * 0.25
LARGE = NONE.masked_fill(LATER, torch.finfo(torch.float32).min)


MODES: list[bool] = []
"""Of the calls of `Attends`."""


class Attends(nn.Module):
    """Attention through torch's function."""

    def __init__(self, mask: Tensor | None = None, *, flipped: bool = False, **options: Any) -> None:
        super().__init__()
        self.qkv, self.mask, self.flipped, self.options = nn.Linear(WIDTH, 3 * WIDTH), mask, flipped, options

    def forward(self, x: Tensor) -> Tensor:
        MODES.append(self.training)
        x = x.flip(1) if self.flipped else x
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, self.mask, **self.options)[:, 0]
        return y.flip(1) if self.flipped else y


class Module(nn.Module):
    """Attention through torch's module."""

    def __init__(self, mask: Tensor | None, *, other: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mask, self.other, self.options = mask, other, options

    def forward(self, x: Tensor) -> Tensor:
        keys = x.flip(1) if self.other else x
        return self.attention(x, keys, keys, attn_mask=self.mask, **self.options)[0]


class Convolves(nn.Module):
    """A depth-wise convolution, padded by the caller, or cropped from some output on."""

    def __init__(self, pad: tuple[int, int] = (0, 0), inside: int = 0, begin: int = 0) -> None:
        super().__init__()
        self.conv, self.pad, self.begin = nn.Conv1d(WIDTH, WIDTH, TAPS, padding=inside, groups=WIDTH), pad, begin

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x.mT, self.pad))
        return y[..., self.begin : self.begin + x.shape[1]].mT


class Taught(nn.Module):
    """A layer of somebody's own, whose T is full."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, -1) @ x


@register_capture(Taught)
def read_taught(layer: Taught, args: Any, kwargs: Any, output: Tensor) -> DenseOperator:
    return DenseOperator(torch.softmax(args[0] @ args[0].mT, -1)[:, None])


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, **self.options)


NOT_CAUSAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no mask": (Attends, "without a mask"),
    "soft mask": (lambda: Attends(SOFT), "the mask lets tokens attend to later ones"),
    "prefix": (lambda: Attends(PREFIX), "the mask lets tokens attend to later ones"),
    "prefix, bool": (lambda: Attends(PREFIX == 0), "the mask lets tokens attend to later ones"),
    "flipped": (lambda: Attends(flipped=True, is_causal=True), "a later token changes earlier outputs of the layer"),
    "module": (lambda: Module(None), "without an attn_mask"),
    "module, equal lengths": (lambda: Module(None, other=True), "without an attn_mask"),
    "hint": (lambda: Module(PREFIX, is_causal=True, need_weights=True), "the mask lets tokens attend to later ones"),
    "encoder": (Encoder, "without an attn_mask"),
    "taught": (Taught, "a later token changes earlier outputs of the layer"),
    "padded on both sides": (lambda: Convolves((3, 3)), "does not begin with 6 zeros"),
    "padded on the right": (lambda: Convolves((0, 6)), "does not begin with 6 zeros"),
    "padded twice": (lambda: Convolves((6, 6), begin=6), "does not begin with 6 zeros and end with a token"),
    "cropped on the left": (lambda: Convolves(inside=6, begin=6), "a later token changes earlier outputs of Convolves"),
    "cropped on both sides": (lambda: Convolves(inside=6, begin=3), "a later token changes earlier outputs of Conv"),
}
CAUSES: dict[str, Callable[[], nn.Module]] = {
    "is_causal": lambda: Attends(is_causal=True),
    "causal mask": lambda: Attends(CAUSAL),
    "bool mask": lambda: Attends(~LATER),
    "the smallest number": lambda: Attends(LARGE),
    "sliding window": lambda: Attends(WINDOW),
    "positions in the mask": lambda: Attends(ALIBI),
    "module": lambda: Module(CAUSAL),
    "module, bool": lambda: Module(LATER, need_weights=False),
    "module with a window": lambda: Module(WINDOW, is_causal=True),
    "module with a true hint": lambda: Module(CAUSAL, is_causal=True, need_weights=False),
    "encoder": lambda: Encoder(src_mask=CAUSAL, is_causal=True),
    "padded on the left": lambda: Convolves((6, 0)),
    "cropped on the right": lambda: Convolves(inside=6),
}
HELD = [
    *((name, make, why) for name, (make, why) in NOT_CAUSAL.items()),
    *((n, make, "") for n, make in CAUSES.items()),
]


class Net(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.first, self.mixer, self.last = GLA(WIDTH, 2), mixer, GLA(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.mixer(x))


def looks_ahead(mixer: nn.Module) -> bool:
    """Whether an output depends on a later input, by the Jacobian of autograd."""
    mixer = copy.deepcopy(mixer).eval()
    x = torch.randn(1, LENGTH, WIDTH)
    jacobian = torch.autograd.functional.jacobian(mixer, x)[0].abs().sum((1, 2, 4))
    return bool((jacobian[LATER] > 1e-6 * jacobian.max()).any())


@pytest.mark.parametrize(
    ("name", "make", "why"), HELD, ids=[f"{'skip' if why else 'ok'}: {name}" for name, _, why in HELD]
)
@pytest.mark.parametrize("how", ["profile", "training"])
def test_a_layer_that_is_not_causal_is_skipped_and_the_others_are_measured(
    how: str, name: str, make: Callable[[], nn.Module], why: str
) -> None:
    torch.manual_seed(0)
    net, x = Net(make()), torch.randn(2, LENGTH, WIDTH)
    assert looks_ahead(net.mixer) == bool(why)
    if how == "profile":
        readings = profile(net, x).readings
    else:
        with Monitor(net, MonitorConfig(positions=3)) as monitor:
            net(x).sum().backward()
            monitor.step()
            readings = monitor.flush()
    first, mixer, last = readings
    assert first.status == last.status == "ok"
    assert mixer.status == ("skipped" if why else "ok"), mixer.message
    assert why in mixer.message


@pytest.mark.parametrize("begin", [0, 3, 6])
def test_a_convolution_is_tested_through_a_model_of_token_ids(begin: int) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(16, WIDTH), nn.Conv1d(WIDTH, WIDTH, TAPS, padding=6, groups=WIDTH)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.conv(self.embed(tokens).mT)[..., begin : begin + tokens.shape[1]].mT

    [reading] = profile(Flat(), torch.arange(2 * LENGTH).reshape(2, LENGTH) % 16).readings
    assert reading.status == ("skipped" if begin else "ok")


def test_a_skipped_layer_is_left_out_from_then_on_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Net(Encoder()), torch.randn(2, LENGTH, WIDTH)
    config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=None, strict=True)
    with caplog.at_level(logging.WARNING, "ess_monitor"), Monitor(net, config) as monitor:
        for step in range(3):
            net(x).sum().backward()
            monitor.step()
            assert [r.layer for r in monitor.flush() if r.step == step] == (
                ["first", "mixer.encoder.self_attn", "last"] if step == 0 else ["first", "last"]
            )
        assert monitor.snapshot().health.layers_off == ()
        assert sum(monitor.snapshot().health.part_failures_total.values()) == 0
    [record] = [r for r in caplog.records if "skipped" in r.getMessage()]
    assert (
        "mixer.encoder.self_attn is skipped from now on: the call was made without an attn_mask" in record.getMessage()
    )


class Stateful(nn.Module):
    """Everything that a second call could disturb: dropout, batch statistics, a generator and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.norm, self.drop = GLA(WIDTH, 2), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)
        self.generator, self.calls = torch.Generator().manual_seed(3), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        noise = torch.rand(x.shape, generator=self.generator)
        return self.drop(self.norm((self.mixer(x) + 0.1 * noise).mT).mT)


@register_capture(Stateful)
def read_stateful(layer: Stateful, args: Any, kwargs: Any, output: Tensor) -> DenseOperator:
    return DenseOperator(torch.eye(args[0].shape[1]))


def trained(watched: bool) -> tuple[list[Tensor], Tensor, int]:
    torch.manual_seed(0)
    net = nn.Sequential(Stateful(), nn.Linear(WIDTH, WIDTH), Stateful())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(net, MonitorConfig(every_n_steps=1, overhead_budget_ratio=None, strict=True)) if watched else None
    if monitor is not None:
        monitor.start()
    for _ in range(3):
        loss = net(torch.randn(4, LENGTH, WIDTH)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step({"loss": loss})
    if monitor is not None:
        assert {reading.status for reading in monitor.flush()} == {"ok"}
        monitor.close()
    return [t.clone() for t in net.state_dict().values()], torch.get_rng_state(), net[0].calls


def test_the_test_of_a_layer_leaves_no_trace_in_the_training() -> None:
    (bare, random, calls), (watched, random_watched, calls_watched) = trained(False), trained(True)
    assert all(map(torch.equal, bare, watched))
    assert torch.equal(random, random_watched)
    assert calls == calls_watched == 3


class WritesToItsArguments(nn.Module):
    """Takes a state that it writes to in place, as a cache is written to, and a list that it takes from."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = GLA(WIDTH, 2)

    def forward(self, x: Tensor, state: Tensor, queue: list[Tensor]) -> Tensor:
        y = self.mixer(x) + queue.pop()
        state.add_(y.detach().mean())
        return y


@register_capture(WritesToItsArguments)
def read_writes(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> DenseOperator:
    return DenseOperator(torch.eye(args[0].shape[1]))


def test_what_a_layer_writes_into_its_arguments_is_as_without_the_test() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = WritesToItsArguments()

        def forward(self, x: Tensor, state: Tensor, queue: list[Tensor]) -> Tensor:
            return self.layer(x, state, queue)

    net, x = Holder(), torch.randn(2, LENGTH, WIDTH)
    state, queue = torch.zeros(()), [torch.ones(()), torch.ones(())]
    with Monitor(net, MonitorConfig()) as monitor:
        y = net(x, state, queue)
        y.sum().backward()
        monitor.step()
        assert [r.status for r in monitor.flush()] == ["ok"]
    assert len(queue) == 1
    torch.testing.assert_close(state, y.detach().mean())


def test_padding_that_sees_nothing_is_no_proof_against_a_layer() -> None:
    """The eager kernel of transformers lets a row whose keys are all hidden see every token."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    net = transformers.LlamaForCausalLM(config)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[0, :3] = 0
    with Monitor(net, MonitorConfig()) as monitor:
        net(torch.randint(8, (2, LENGTH)), attention_mask=real, labels=torch.randint(8, (2, LENGTH))).loss.backward()
        monitor.step()
        assert [(r.status, r.message) for r in monitor.flush()] == [("ok", "")]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", lambda pad: ~pad),
        ("attention_mask", lambda pad: torch.where(pad, -1e9, 0.0)),
        ("key_padding_mask", lambda pad: pad),
        ("key_padding_mask", lambda pad: torch.where(pad, -torch.inf, 0.0)),
    ],
)
def test_outputs_of_padding_count_in_no_form_of_a_mask(name: str, mask: Any) -> None:
    pad = torch.zeros(2, 6, dtype=torch.bool)
    pad[0, :2] = True

    class SeesAllFromPadding(nn.Module):
        def forward(self, x: Tensor, **given: Tensor) -> Tensor:
            return torch.where(pad[..., None], x.sum(1, keepdim=True), x.cumsum(1))

    net, x = SeesAllFromPadding(), torch.randn(2, 6, 4)
    assert is_causal(net, (x,), {name: mask(pad)}, net(x), 6)
    assert not is_causal(net, (x,), {name: mask(torch.zeros_like(pad))}, net(x), 6)


def test_each_layer_is_tested_once_in_a_run_and_the_cost_charged_once() -> None:
    """By a clock that only a layer moves, by a second a call."""
    MODES.clear()
    net = Net(Attends(is_causal=True))
    config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=0.5)
    with Monitor(net, config, clock=lambda: float(len(MODES))) as monitor:
        for _ in range(4):
            net(torch.randn(2, LENGTH, WIDTH)).sum().backward()
            monitor.step()
            monitor.flush()
        assert MODES == [True, False, False, True, True, True]
        assert monitor.snapshot().overhead_seconds["capture"].total_seconds == 2.0
        assert monitor.snapshot().interval_steps == 1


def test_a_statement_that_is_not_looked_at_yet_decides_when_its_layer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where nothing waits for the mask."""
    plain = Sampler._take

    def with_claim(self: Sampler, layer: Any, call: Any) -> Any:
        captured = plain(self, layer, call)
        object.__setattr__(captured, "claims", (Claim(torch.tensor(layer.name != "mixer"), "looks ahead"),))
        return captured

    monkeypatch.setattr(Sampler, "_take", with_claim)
    net = Net(Attends(is_causal=True))
    assert [r.status for r in profile(net, torch.randn(2, LENGTH, WIDTH)).readings] == ["ok", "skipped", "ok"]
    with Monitor(net, MonitorConfig()) as monitor:
        net(torch.randn(2, LENGTH, WIDTH)).sum().backward()
        monitor.step()
        assert [(r.status, r.message) for r in monitor.flush()] == [("ok", ""), ("skipped", "looks ahead"), ("ok", "")]


def test_a_model_that_says_it_is_not_causal_is_not_called_measurable() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, is_causal=False
    )
    [info] = describe(transformers.LlamaModel(config)).layers
    assert not info.supported
    assert "config.is_causal=False" in info.reason
