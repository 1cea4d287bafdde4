from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ess_monitor import CaptureConfig, CaptureError, OperatorError, capture_operators
from ess_monitor.capture import Captured, CaptureFailure, CaptureSpec, Sampler, find_layers
from ess_monitor.capture.registry import add_spec
from ess_monitor.capture.rotation import rotate_heads
from ess_monitor.featurizers import FEATURIZERS, GLA, build_mixer


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(GLA(16, 4), GLA(16, 4))


def sampler(net: nn.Module, **settings: object) -> Sampler:
    return Sampler(find_layers(net), CaptureConfig(**{"source": "validation", **settings}))


@pytest.mark.parametrize("name", sorted(FEATURIZERS))
def test_the_operator_is_the_one_the_layer_applied(name: str) -> None:
    """T u = y, with u and y seen at the layer's core by a hook of the test's own."""
    mixer = build_mixer(name, 16, 2, 8)
    seen = {}
    mixer.core.register_forward_hook(lambda m, args, out: seen.update(v=args[2], y=out))
    x = torch.randn(3, 37, 16)
    (operator,) = capture_operators(mixer, x).values()
    T = operator.materialize().double()
    y = T @ seen["v"].double()
    torch.testing.assert_close(y, seen["y"].double(), atol=1e-5 * float(seen["y"].abs().max()), rtol=0)


def test_a_small_slice_is_taken(net: nn.Sequential) -> None:
    s = sampler(net, samples=2, heads=2, max_length=10)
    s.arm()
    net(torch.randn(8, 32, 16))
    first, second = s.collect()
    for item in (first, second):
        assert isinstance(item, Captured)
        assert (item.operator.batch, item.operator.heads, item.operator.length) == (2, 2, 10)
        assert item.channels == 4


def test_the_slice_is_the_head_of_the_whole_operator(net: nn.Sequential) -> None:
    x = torch.randn(3, 32, 16)
    whole = capture_operators(net, x)["0"].materialize()
    s = sampler(net, samples=2, heads=2, max_length=20, source="validation")
    s.arm()
    with torch.no_grad():
        net(x)
    item = s.collect()[0]
    torch.testing.assert_close(item.operator.materialize(), whole[:2, list(item.heads), :20, :20])


def test_the_copies_are_detached_and_shared_with_nobody(net: nn.Sequential) -> None:
    s = sampler(net)
    s.arm()
    net(torch.randn(2, 16, 16))
    for item in s.collect():
        for tensor in item.operator.tensors:
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()


def test_heads_rotate_so_that_all_are_seen() -> None:
    seen = {h for turn in range(8) for h in rotate_heads(8, 3, turn)}
    assert seen == set(range(8))
    assert all(len(rotate_heads(8, 3, turn)) == 3 for turn in range(20))


def test_hooks_are_there_only_while_armed(net: nn.Sequential) -> None:
    s = sampler(net)
    assert hooks_of(net) == 0
    s.arm()
    armed = hooks_of(net)
    s.arm()
    assert hooks_of(net) == armed > 0
    s.collect()
    assert hooks_of(net) == 0


def test_an_exception_in_the_forward_pass_leaves_no_hook_after_collect(net: nn.Sequential) -> None:
    s = sampler(net)
    s.arm()
    with pytest.raises(OperatorError):
        net(torch.randn(2, 16, 7))
    assert s.collect() == ()
    assert hooks_of(net) == 0


def test_only_the_first_forward_pass_is_taken(net: nn.Sequential) -> None:
    s = sampler(net, heads=None)
    s.arm()
    first, second = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    net(first)
    net(second)
    taken = s.collect()[0].operator
    expected = capture_operators(net, first)["0"]
    torch.testing.assert_close(taken.materialize(), expected.materialize())


def test_a_validation_pass_is_not_taken_for_a_training_batch(net: nn.Sequential) -> None:
    s = sampler(net, source="train")
    s.arm()
    net.eval()
    with torch.no_grad():
        net(torch.randn(2, 8, 16))
    assert s.collect() == ()


def test_a_layer_that_cannot_be_read_is_reported_and_the_others_are_taken() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def broken(call):
        raise ValueError("not today")

    add_spec(Odd, CaptureSpec("custom", broken))
    net = nn.Sequential(Odd(), GLA(16, 2))
    s = sampler(net)
    s.arm()
    y = net(torch.randn(2, 8, 16))
    assert y.shape == (2, 8, 16)
    odd, gla = s.collect()
    assert isinstance(odd, CaptureFailure)
    assert odd.error == "ValueError: not today"
    assert isinstance(gla, Captured)


def test_a_failure_says_what_was_raised_and_keeps_no_frame_of_the_forward_pass(
    net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "_take", lambda *args: 1 / 0)
    s = sampler(net)
    s.arm()
    net(torch.randn(2, 8, 16))
    failure = s.collect()[0]
    assert isinstance(failure, CaptureFailure)
    assert isinstance(failure.cause, ZeroDivisionError)
    assert failure.cause.__traceback__ is None


def test_a_layer_that_is_off_is_left_alone_from_the_next_sample_on(net: nn.Sequential) -> None:
    off: set[str] = set()
    s = Sampler(find_layers(net), CaptureConfig(source="validation"), off=off)
    for expected in (("0", "1"), ("1",), ()):
        s.arm()
        assert s.armed
        net(torch.randn(2, 8, 16))
        assert tuple(item.layer.name for item in s.collect()) == s.asked == expected
        off.add(str(len(off)))
    assert hooks_of(net) == 0


@pytest.mark.parametrize(
    ("share", "samples", "heads"), [(1.0, 4, 3), (0.5, 2, 1), (0.0, 1, 1)], ids=["whole", "half", "one of each"]
)
@pytest.mark.parametrize("batch", [4, 16])
def test_a_share_of_what_there_is_is_taken(
    net: nn.Sequential, batch: int, share: float, samples: int, heads: int
) -> None:
    s = Sampler(find_layers(net), CaptureConfig(samples=4, heads=3, source="validation"), share=lambda: share)
    s.arm()
    net(torch.randn(batch, 8, 16))
    for item in s.collect():
        assert isinstance(item, Captured)
        assert (item.operator.batch, item.operator.heads) == (samples, heads)
        assert len(item.heads) == heads


def test_in_a_pause_nothing_is_attached_and_the_sample_is_armed_all_the_same(net: nn.Sequential) -> None:
    s = Sampler(find_layers(net), CaptureConfig(), share=lambda: None)
    s.arm()
    assert s.armed
    assert s.asked == ()
    assert hooks_of(net) == 0
    assert s.collect() == ()
    assert not s.armed


def test_capture_operators_leaves_modes_and_parameters_as_they_were(net: nn.Sequential) -> None:
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    generator = torch.get_rng_state()
    capture_operators(net, torch.ones(2, 8, 16))
    assert [m.training for m in net] == [True, False]
    assert hooks_of(net) == 0
    assert torch.equal(generator, torch.get_rng_state())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_that_was_not_called_is_named() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = GLA(16, 2), GLA(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(CaptureError, match="unused: its forward was not called"):
        capture_operators(Skips(), torch.randn(1, 8, 16))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch: RMSNorm under autocast
def test_features_under_autocast_are_taken_as_they_were_used() -> None:
    mixer = GLA(16, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (operator,) = capture_operators(mixer, torch.randn(2, 16, 16)).values()
    assert torch.isfinite(operator.singular_values((8,))).all()
