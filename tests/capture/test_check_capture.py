"""A capture that was taught is compared with what its layer computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ess_monitor import CaptureError, Monitor, MonitorConfig, check_capture, profile, register_capture
from ess_monitor.ess import Convolution, DenseOperator, DiagonalRecurrence, Operator

WIDTH, LENGTH = 6, 24
X = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """s_t = a_t s_{t-1} + (1 - a_t) x_t for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def decay(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        state, outputs, decay = torch.zeros_like(x[:, 0]), [], self.decay(x)
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (1 - decay[:, t]) * x[:, t]
            outputs.append(state)
        return torch.stack(outputs, 1)


def of(layer: Gated, x: Tensor) -> Tensor:
    return layer.decay(x).transpose(1, 2)[..., None]


def right(layer, args, kwargs, output):
    a = of(layer, args[0])
    return DiagonalRecurrence(a.log(), 1 - a, torch.ones_like(a))


def no_logarithm(layer, args, kwargs, output):
    a = of(layer, args[0])
    return DiagonalRecurrence(a, 1 - a, torch.ones_like(a))


def other_gate(layer, args, kwargs, output):
    a = of(layer, args[0])
    return DiagonalRecurrence((1 - a).log(), a, torch.ones_like(a))


def factor(layer, args, kwargs, output):
    a = of(layer, args[0])
    return DiagonalRecurrence(a.log(), 5 * (1 - a), torch.ones_like(a))


def other_axes(layer, args, kwargs, output):
    a = layer.decay(args[0])[..., None]  # (batch, length, channels, 1)
    return DiagonalRecurrence(a.log(), 1 - a, torch.ones_like(a))


def nothing(layer, args, kwargs, output):
    return None


def matrix(layer, args, kwargs, output):
    return torch.ones(LENGTH, LENGTH)


@pytest.fixture
def taught(request: pytest.FixtureRequest) -> nn.Module:
    """An instance of a class of its own, with the capture that the test names."""
    kind = type("Taught", (Gated,), {})
    register_capture(kind)(request.param)
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("taught", [right], indirect=True)
def test_a_right_capture_is_confirmed(taught: nn.Module) -> None:
    check = check_capture(taught, X)
    assert check.ok
    assert check.difference is not None
    assert check.difference < 1e-5
    assert "T u is the layer's output" in str(check)


WRONG = [
    (no_logarithm, "is the log decay a logarithm"),
    (other_gate, "differs from the layer's output"),
    (factor, "0.2 times T u"),
    (other_axes, "axes"),
]


@pytest.mark.parametrize(("taught", "word"), WRONG, indirect=["taught"])
def test_a_wrong_capture_is_told_by_the_check_and_by_the_first_sample(
    taught: nn.Module, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    check = check_capture(taught, X)
    assert not check.ok
    assert word in check.problem
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), taught)
    with Monitor(model, MonitorConfig(every_n_steps=1)) as monitor:
        for _ in range(3):
            model(X).sum().backward()
            monitor.step()
    [record] = [r.getMessage() for r in caplog.records if "does not fit" in r.getMessage()]
    assert "layer 1: the capture of Taught" in record


@pytest.mark.parametrize(("taught", "word"), [(nothing, "None"), (matrix, "Tensor")], indirect=["taught"])
def test_what_is_no_operator_is_told(taught: nn.Module, word: str) -> None:
    with pytest.raises(CaptureError, match=rf"returned .*{word}.*DenseOperator\(T\)"):
        check_capture(taught, X)
    [reading] = profile(taught, X).readings
    assert reading.status == "failed"
    assert "return an operator of ess_monitor.ess" in reading.message


class Projected(nn.Module):
    """Head by head between two projections, with or without a gate behind."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.into, self.out, self.gated = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), gated
        self.taps = nn.Parameter(torch.rand(2, 5))

    def matrix(self) -> Tensor:
        return Convolution(self.taps[None], LENGTH).materialize()

    def mixing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.into(x).unflatten(2, (2, -1)).transpose(1, 2)
        return u, self.matrix().to(u) @ u

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.mixing(x)[1].transpose(1, 2).flatten(2))
        return y * x.sigmoid() if self.gated else y


def taught_projection(gated: bool, **options: Callable[..., object]) -> nn.Module:
    kind = type("TaughtProjection", (Projected,), {})
    register_capture(kind, **options)(lambda layer, args, kwargs, output: Convolution(layer.taps[None], LENGTH))
    torch.manual_seed(0)
    return kind(gated=gated)


def test_projections_around_the_mixing_are_seen_through() -> None:
    check = check_capture(taught_projection(gated=False), torch.randn(4, LENGTH, WIDTH))
    assert check.ok
    assert "linear map" in check.compared


def test_a_gate_behind_the_mixing_needs_to_be_told() -> None:
    x = torch.randn(4, LENGTH, WIDTH)
    assert "mixed" in check_capture(taught_projection(gated=True), x).problem
    told = taught_projection(gated=True, mixed=lambda layer, args, kwargs, output: layer.mixing(args[0]))
    assert check_capture(told, x).compared == "u and y of `mixed`"
    wrong = taught_projection(gated=True, mixed=lambda layer, args, kwargs, output: layer.mixing(args[0].flip(1))[::-1])
    assert not check_capture(wrong, x).ok


def test_a_layer_that_nobody_taught_is_an_error() -> None:
    with pytest.raises(CaptureError, match="no capture is known for Linear"):
        check_capture(nn.Linear(2, 2), torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    "build", [lambda k: Convolution(k, 64), lambda k: DenseOperator(Convolution(k, 64).materialize())]
)
def test_the_state_of_a_kernel_that_was_registered_is_its_capacity(build: Callable[[Tensor], Operator]) -> None:
    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    rate, weight = torch.linspace(0.5, 0.95, 4)[:, None], torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    kernel = (weight.double() @ rate.double() ** torch.arange(64))[None]
    register_capture(Kernel, state_capacity=lambda layer: 4)(lambda *call: build(kernel))
    [reading] = profile(nn.Sequential(Kernel()), torch.randn(2, 64, 2)).readings
    assert (reading.state_capacity, reading.capacity_grows) == (4, False)
    H = Convolution(kernel.double(), 64).materialize()[0, :, 32:, :32]
    assert (torch.linalg.svdvals(H) > 1e-5).sum(-1).tolist() == [4, 4]
