"""Which forward pass is measured: the one whose output gets a gradient that goes on to parameters."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor.capture import Captured, CaptureFailure, Sampler, find_layers
from ess_monitor.capture.capture_pass import EVERYTHING
from ess_monitor.capture.rotation import rotate_rows
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.featurizers import GLA

TRAINING = EVERYTHING.model_copy(update={"source": "train"})
X, OTHER = torch.randn(4, 12, 16), torch.randn(4, 12, 16)


class Block(nn.Module):
    """A layer and what comes after it, called whole or through a checkpoint."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.head = GLA(16, 2), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.1)

    def whole(self, x: Tensor) -> Tensor:
        return x + self.head(self.drop(self.mixer(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.whole(x)
        return checkpoint(self.whole, x, use_reentrant=self.reentrant)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), Block(), Block())


def operators_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The T of each layer in the pass of `train`, in float64, from q, k and log decay as a hook sees them."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, GLA):

            def keep(core: nn.Module, args: Any, name: str = name) -> None:
                q, k, _, log_decay = (t.detach().double() for t in args[:4])
                total = log_decay.cumsum(-2)
                decay = (total[..., :, None, :] - total[..., None, :, :]).exp()
                seen[name] = torch.einsum("bhin,bhijn,bhjn->bhij", q, decay, k).tril()

            hooks.append(module.core.register_forward_pre_hook(keep))
    torch.manual_seed(0)
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return seen


def measured(net: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Captured | CaptureFailure]:
    sampler = Sampler(find_layers(net), TRAINING, model=net)
    sampler.arm()
    run(net)
    return {item.layer.name: item for item in sampler.collect()}


def train(net: nn.Module, x: Tensor = X) -> None:
    torch.manual_seed(0)
    net(x).square().mean().backward()


def check(found: dict[str, Captured | CaptureFailure], net: nn.Module, x: Tensor = X) -> None:
    expected = operators_of(net, x)
    assert found.keys() == expected.keys()
    for name, item in found.items():
        assert isinstance(item, Captured), item
        torch.testing.assert_close(item.operator.materialize().double(), expected[name], atol=1e-5, rtol=1e-4)


def rollout(net: nn.Module) -> None:
    with torch.no_grad():
        for length in (3, 4, 5):
            net(OTHER[:, :length])


def inference(net: nn.Module) -> None:
    with torch.inference_mode():
        net(OTHER)


def evaluation_with_gradients(net: nn.Module) -> None:
    losses = [net(OTHER).mean() for _ in range(2)]
    assert all(loss.requires_grad for loss in losses)
    losses.clear()


def evaluation_in_eval_mode(net: nn.Module) -> None:
    net.eval()
    _ = net(OTHER)
    net.train()


def forces(net: nn.Module) -> None:
    """A gradient with respect to the input, as an attack or a potential takes it."""
    x = OTHER.clone().requires_grad_()
    torch.autograd.grad(net(x).sum(), x)


def penalty_of_inputs(net: nn.Module) -> None:
    x = OTHER.clone().requires_grad_()
    net(x).sum().backward(inputs=[x])


def detached_target(net: nn.Module) -> None:
    F.mse_loss(torch.zeros(4, 12, 16, requires_grad=True), net(OTHER).detach()).backward()


def teacher_that_shares(net: nn.Module) -> None:
    """An average of the weights in which the mixers are those of the student."""
    teacher = copy.copy(net)
    teacher._modules = {**net._modules, "0": copy.deepcopy(net[0])}
    with torch.no_grad():
        teacher(OTHER)


BEFORE = [
    rollout,
    inference,
    evaluation_with_gradients,
    evaluation_in_eval_mode,
    forces,
    penalty_of_inputs,
    detached_target,
    teacher_that_shares,
]


@pytest.mark.parametrize(
    ("before", "reentrant"),
    [
        (before, reentrant)
        for before in BEFORE
        for reentrant in (None, False, True)
        if not reentrant or before not in (forces, penalty_of_inputs)  # reentrant checkpoints cannot compute them
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant, without gradients
def test_the_pass_that_trains_is_measured_and_not_what_comes_before(
    before: Callable[[nn.Module], None], reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "reentrant", reentrant)
    net = network()
    check(measured(net, lambda net: (before(net), train(net))), net)


@pytest.mark.parametrize("before", BEFORE, ids=lambda f: f.__name__)
def test_without_a_training_pass_nothing_is_measured(before: Callable[[nn.Module], None]) -> None:
    assert measured(network(), before) == {}


def test_eval_mode_is_no_obstacle_where_a_pass_trains() -> None:
    net = network().eval()
    check(measured(net, train), net)


def test_gradients_by_torch_autograd_grad_of_parameters_train() -> None:
    net = network().eval()
    check(measured(net, lambda net: torch.autograd.grad(net(X).mean(), list(net.parameters()))), net)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["whole", "checkpoint", "reentrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_of_two_passes_that_train_together_the_first_is_measured(
    reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "reentrant", reentrant)
    net = network().eval()
    check(measured(net, lambda net: (net(X) - net(OTHER)).square().mean().backward()), net)


def test_of_two_passes_of_which_the_second_trains_that_is_measured() -> None:
    """Even where the first is kept alive."""
    net = network().eval()

    def contrast(net: nn.Module) -> Tensor:
        kept = net(OTHER)
        F.mse_loss(net(X), kept.detach()).backward()
        return kept

    check(measured(net, contrast), net)


def test_of_accumulated_gradients_the_first_batch_is_measured() -> None:
    net = network().eval()
    check(measured(net, lambda net: [net(x).mean().backward() for x in (X, OTHER, OTHER)]), net)


def test_a_layer_below_the_trained_part_is_measured_in_the_pass_that_trains() -> None:
    net = network().eval()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)

    def run(net: nn.Module) -> None:
        net(OTHER)
        train(net)

    check(measured(net, run), net)


def test_a_frozen_teacher_inside_the_model_is_not_measured() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = network(), network().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(x)
            return F.mse_loss(self.student(x), target)

    net = Pair()
    assert {name.partition(".")[0] for name in measured(net, lambda net: net(X).backward())} == {"student"}


class Scaled(nn.Module):
    """Writes to the output of its layer in place, which is a view of what the layer's last product gave."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y, _ = self.mixer(x, x, x, attn_mask=mask, need_weights=False)
        y += x
        return y


def test_an_output_that_is_written_to_in_place_still_gets_its_gradient() -> None:
    assert isinstance(measured(Scaled(), lambda net: net(X).sum().backward())["mixer"], Captured)


def test_a_second_call_of_an_op_is_seen_in_a_pass_that_trains() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return sum(F.scaled_dot_product_attention(q, k, each, is_causal=True) for each in (v, v.flip(2)))

    [item] = measured(Twice(), lambda net: net(X).sum().backward()).values()
    assert isinstance(item, CaptureFailure)
    assert "more than once" in item.error


def test_an_evaluation_leaves_no_copies_behind() -> None:
    net, held = network(), []
    sampler = Sampler(
        find_layers(net), TRAINING, model=net, on_operator=lambda item: held.append(weakref.ref(item.operator))
    )
    sampler.arm()
    net(OTHER).mean()
    gc.collect()
    assert len(held) == 2
    assert all(reference() is None for reference in held)
    sampler.remove()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["whole", "checkpoint", "reentrant"])
def test_gradients_are_bitwise_those_of_a_step_that_is_not_sampled(
    reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "reentrant", reentrant)
    net = network()
    gradients = []
    for sampled in (False, True):
        net.zero_grad()
        measured(net, train) if sampled else train(net)
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())


def test_saved_tensors_that_are_moved_away_change_nothing() -> None:
    net = network()

    def offloaded(net: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu():
            train(net)

    check(measured(net, offloaded), net)


def test_a_loss_under_autocast_trains() -> None:
    net = network().eval()

    def run(net: nn.Module) -> None:
        with torch.no_grad():
            net(OTHER)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(X).float().mean()
        loss.backward()

    for item in measured(net, run).values():
        assert isinstance(item, Captured)
        assert isinstance(item.operator, DiagonalRecurrence)
        assert item.operator.batch == 4


@pytest.mark.parametrize("total", [1, 3, 4, 5, 7, 8, 10])
@pytest.mark.parametrize("take", [1, 2, 4])
def test_rows_rotate_so_that_all_are_seen(total: int, take: int) -> None:
    rows = [list(range(total))[rotate_rows(total, take, turn)] for turn in range(2 * total)]
    assert {row for each in rows for row in each} == set(range(total))
    assert {len(each) for each in rows} == {min(take, total)}
    assert all(a != b for a, b in pairwise(rows)) or take >= total


def test_each_sample_reads_other_rows_and_a_resumed_one_the_same() -> None:
    """Rows 0-3 are constant, as a batch that is sorted by difficulty is: the first four say nothing of the others."""
    net = network().eval()
    x = torch.cat([X[:, :1].expand(4, 12, 16), X])
    settings = TRAINING.model_copy(update={"samples": 4})
    expected = operators_of(net, x)["1.mixer"]
    seen = []
    for turn in (0, 1, 2, 1):
        sampler = Sampler(find_layers(net), settings, model=net)
        sampler.turn = turn
        sampler.arm()
        train(net, x)
        T = sampler.collect()[0].operator.materialize().double()
        seen.append([next(i for i in range(8) if torch.allclose(row, expected[i], atol=1e-5)) for row in T])
    assert seen[0] != seen[1] == seen[3]
    assert sum(row > 3 for row in seen[0]) == 2
