"""Layers of an unknown kind, linearized on a copy: in `profile`, and beside a training that does not see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.census.own_layers import NeuralMemory, TTTLinear
from ess_monitor import CaptureConfig, Monitor, MonitorConfig, NoLayersError, describe, profile
from ess_monitor.capture import Captured, find_layers
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.linearized import LINEARIZED, LayerAlone, linearized
from ess_monitor.errors import CaptureError
from ess_monitor.ess import JacobianOperator
from ess_monitor.exporters.terminal.inspected import reading_table
from ess_monitor.pipeline import readings as averages
from ess_monitor.records import Reading
from tests.ess.test_jacobian import block, full_jacobian

CONFIG = MonitorConfig(positions=2, capture=CaptureConfig(unknown="jacobian", samples=2))


class Net(nn.Module):
    """An LSTM with time first, and a GRU behind it."""

    def __init__(self, width: int = 5, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LSTM(width, width, **options)
        self.second = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.first(x.transpose(0, 1))[0].transpose(0, 1)
        output: Tensor = self.second(middle)[0]
        return output


def counts(function: Any, u: Tensor, positions: tuple[int, ...]) -> list[float]:
    """The mean rank at each position, from the full Jacobian."""
    J = full_jacobian(function, u)
    return [float((torch.linalg.svdvals(block(J, i, u.shape[1])) > 1e-3).sum(-1).double().mean()) for i in positions]


def test_a_profile_has_the_ranks_of_the_full_jacobians_and_says_what_they_are() -> None:
    model, x = Net(), torch.randn(3, 12, 5)
    first, second = profile(model, x, config=CONFIG).readings
    exact = Net().double()
    middle = exact.first(x.double().transpose(0, 1))[0].transpose(0, 1).detach()
    lstm = lambda u: exact.first(u.transpose(0, 1))[0].transpose(0, 1)  # noqa: E731
    assert first.per_position == pytest.approx(counts(lstm, x[:2].double(), (4, 8)))
    assert second.per_position == pytest.approx(counts(lambda u: exact.second(u)[0], middle[:2], (4, 8)))
    for reading in (first, second):
        assert reading.basis == "jacobian"
        assert reading.is_lower_bound is False
        assert reading.products
        assert reading.utilization_ratio is reading.state_capacity is reading.entropy_size is None
        assert "linearized at this input" in reading.message
    assert "linearized at this input, all channels together; " in str(reading_table("", [first]).caption)
    assert not any(p.requires_grad is False or p.dtype != torch.float32 for p in model.parameters())


def test_they_are_measured_only_where_it_is_asked_for() -> None:
    assert [layer.reason[:22] for layer in describe(Net()).layers] == ["a nonlinear recurrence"] * 2
    with pytest.raises(NoLayersError):
        profile(Net(), torch.randn(2, 12, 5))
    assert [layer.spec for layer in find_layers(Net(), unknown="jacobian")] == [LINEARIZED] * 2


def _train(monitored: bool) -> tuple[list[float], list[Reading]]:
    torch.manual_seed(1)
    model = nn.Sequential(Net(num_layers=2, dropout=0.5), nn.Dropout(0.2))
    optimizer = torch.optim.Adam(model.parameters())
    losses, readings = [], []
    monitor = Monitor(model, CONFIG.model_copy(update={"every_n_steps": 2, "overhead_budget_ratio": None}))
    with monitor if monitored else torch.enable_grad():
        for _ in range(5):
            loss = model(torch.randn(2, 9, 5)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if monitored:
                monitor.step()
        if monitored:
            readings = list(monitor.flush())
    return losses, readings


def test_a_training_is_the_same_bit_by_bit_while_its_layers_are_linearized() -> None:
    plain, _ = _train(False)
    watched, readings = _train(True)
    assert watched == plain
    assert [reading.status for reading in readings] == ["ok"] * 2
    assert {reading.basis for reading in readings} == {"jacobian"}


class Decaying(nn.Module):
    """A class of one's own, named like a mixer; keeps what it has seen, and has a weight with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = weight_norm(nn.Linear(5, 5))
        self.last: Tensor | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            state = torch.tanh(0.9 * state + self.inner(token))
            states.append(state if scale is None else state * scale)
        self.last = torch.stack(states, 1)
        return self.last


class RandomDecaying(Decaying):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x + 0.0 * torch.rand(()), scale)


def _operator(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    lazy = linearized(Call(module, module, "", args, kwargs))
    return lazy.select(samples=slice(0, 1), heads=(0,), length=8)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_of_ones_own_keeps_its_other_arguments(scaled: bool) -> None:
    layer, u = Decaying(), torch.randn(2, 10, 5)
    kwargs = {"scale": torch.full((2, 5), 0.01)} if scaled else {}
    layer(u, **kwargs)  # what it keeps has a graph now
    operator = _operator(layer, u, **kwargs)
    seen = u.double() if scaled else u[:1, :8].double()  # with other tensors it is not cut
    assert torch.equal(operator.inputs[:, 0], seen)
    values = operator.singular_values([4])
    exact = Decaying().double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    J = full_jacobian(lambda v: exact(v, *(each[:1].double() for each in kwargs.values())), seen)
    expected = torch.linalg.svdvals(block(J, 4, seen.shape[1]))
    torch.testing.assert_close(values[:, 0, 0, :5], expected[:, :5], rtol=1e-6, atol=1e-8)


class Masked(nn.Module):
    """Attention of one's own with a mask of padding, which is one more tensor of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() | (attention_mask[:, None] == 0)
        return (self.inner(x) @ x.mT).masked_fill(hidden, -1e4).softmax(-1) @ torch.tanh(x)


@pytest.mark.parametrize(
    "real", [((0, 9), (0, 9)), ((3, 12), (3, 12)), ((0, 12), (4, 12))], ids=["after", "before", "one"]
)
def test_padded_rows_have_the_rank_of_the_block_of_their_real_tokens(real: tuple[tuple[int, int], ...]) -> None:
    torch.manual_seed(0)
    layer, u, mask = Masked(), torch.randn(2, 12, 5), torch.zeros(2, 12)
    for row, (start, stop) in enumerate(real):
        mask[row, start:stop] = 1
    [reading] = profile(
        layer, u, attention_mask=mask, config=CONFIG.model_copy(update={"positions": "midpoint"})
    ).readings
    assert reading.status == "ok", reading.message
    exact, ranks = layer.double(), []
    for row, (start, stop) in enumerate(real):
        J = full_jacobian(lambda v, row=row: exact(v, mask[row : row + 1]), u[row : row + 1].double())[0]
        J, middle = J.reshape(12, 5, 12, 5), start + (stop - start) // 2
        block_of_real = J[middle:stop, :, start:middle].reshape((stop - middle) * 5, -1)
        ranks.append(int((torch.linalg.svdvals(block_of_real) > 1e-3).sum()))
    assert reading.effective_size == pytest.approx(sum(ranks) / 2)


class Products(nn.Module):
    """Attention of one's own, called with the same tensor three times."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1) @ value


def test_a_tensor_that_is_several_arguments_varies_in_all_of_them() -> None:
    layer, u = Products(), torch.randn(2, 8, 3)
    operator = _operator(layer, u, u, value=u)
    exact = u[:1].double()
    assert torch.equal(operator.inputs[:, 0], exact)
    expected = torch.linalg.svdvals(block(full_jacobian(lambda v: layer(v, v, v), exact), 4, 8))
    torch.testing.assert_close(operator.singular_values([4])[:, 0, 0, :12], expected[:, :12], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [TTTLinear, NeuralMemory])
def test_weights_that_are_trained_on_the_tokens_have_the_rank_of_the_full_jacobian(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer, u = kind(), torch.randn(1, 8, 16)
    [reading] = profile(layer, u, config=CONFIG.model_copy(update={"positions": "midpoint"})).readings
    assert reading.status == "ok"
    assert reading.is_lower_bound is False
    assert reading.effective_size == counts(layer.double(), u.double(), (4,))[0]


def test_more_singular_values_than_are_looked_for_are_called_a_lower_bound() -> None:
    layer = nn.GRU(24, 24, batch_first=True)
    [named] = find_layers(nn.Sequential(layer), unknown="jacobian")
    operator = JacobianOperator(torch.randn(1, 1, 12, 24).double(), lambda u: u.cumsum(1), largest=16)
    captured = Captured(named, operator, (0,), 1)
    found = averages.reading(0, captured, 1e-3, averages.compute(captured, (6,), 1e-3))
    assert found.is_lower_bound
    assert 16 <= found.effective_size < 24
    assert "a lower bound: " in found.message


class Once(torch.autograd.Function):
    """A running sum with a backward pass that has no derivative, as kernels have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(1).cumsum(1).flip(1)


class Kernel(nn.Module):
    def __init__(self, dtypes: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.inner, self.dtypes = nn.Linear(5, 3), dtypes

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in self.dtypes:
            raise RuntimeError("the kernel has no float64")
        return torch.tanh(Once.apply(self.inner(x)))


def test_a_function_that_can_be_differentiated_once_is_found_and_read_or_says_why_not() -> None:
    u = torch.randn(1, 8, 5)
    [info] = describe(Kernel((torch.float32,))).layers
    assert "its code has a scan" in info.reason
    assert "capture.unknown: jacobian" in info.reason
    layer = Kernel((torch.float32, torch.float64))
    [found] = profile(layer, u, config=CONFIG).readings
    assert found.per_position == pytest.approx(counts(lambda v: layer.double()(v), u.double(), (3, 5)))
    [refused] = profile(Kernel((torch.float32,)), u, config=CONFIG).readings
    assert refused.status == "failed"
    for reason in ("it does not run in float64", "forward mode: ", "its backward pass has no derivative"):
        assert reason in refused.message


@pytest.mark.parametrize("shape", [(8, 5), (8, 2, 5)])
def test_a_recurrent_layer_without_a_batch_and_with_a_first_state(shape: tuple[int, ...]) -> None:
    layer = nn.GRU(5, 5)
    state = torch.randn(1, *shape[1:])
    operator = _operator(layer, torch.randn(shape), state)
    assert operator.inputs.shape == (1 if len(shape) == 2 else 2, 1, 8, 5)
    assert operator.singular_values([4]).gt(1e-3).sum(-1).unique().item() == 5


@pytest.mark.parametrize(
    ("module", "args", "reason"),
    [
        (RandomDecaying(), (torch.randn(2, 8, 5),), "draws random numbers in eval mode"),
        (Decaying(), (torch.randn(2, 3, 8, 5),), "its first input has shape"),
        (nn.Embedding(4, 4), (torch.zeros(2, 8, dtype=torch.long),), "without a floating tensor"),
        (
            nn.GRU(5, 5),
            (nn.utils.rnn.pack_padded_sequence(torch.randn(8, 2, 5), torch.tensor([8, 8])),),
            "packed sequence; pass it padded",
        ),
        (Decaying(), (torch.randn(2, 8, 4),), "does not run alone: RuntimeError"),
    ],
)
def test_what_cannot_be_called_alone_says_why(module: nn.Module, args: Any, reason: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=reason):
        _operator(module, *args)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("module", [nn.LSTM(4, 3, 2), nn.GRU(4, 3, bidirectional=True)])
def test_a_layer_runs_alone_on_other_tensors_that_take_the_place_of_its_own(module: nn.Module) -> None:
    x = torch.randn(2, 6, 4)
    alone, expected = (LayerAlone(module, (x.transpose(0, 1),), {}, torch.float64) for _ in range(2))
    # Zeros, but for the moment of the comparison: what were kept of the old tensors would show.
    new = {id(tensor): torch.zeros_like(tensor) for tensor in alone.tensors}
    moved = alone.with_tensors(new)
    assert not torch.equal(moved(x.double()), alone(x.double()))
    for tensor in alone.tensors:
        new[id(tensor)].copy_(tensor)
        tensor.data = torch.zeros_like(tensor)
    assert torch.equal(moved(x.double()), expected(x.double()))
