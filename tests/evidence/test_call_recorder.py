"""Which calls of a model are noted, and that they can be made again."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ess_monitor.errors import CaptureError, ConfigError
from ess_monitor.evidence.call_recorder import CallRecorder, RecordedCall
from ess_monitor.evidence.undisturbed import Undisturbed
from tests.evidence.dump import differences
from tests.evidence.models import KINDS, WIDTH, Around
from tests.evidence.training import STEPS, Raised, Recorded, trained, vectors


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


class Taking(nn.Module):
    """Takes arguments in every form, and some of them out of what holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, pair: Pair, items: list[Any], *, batch: dict[str, Any], scale: float = 1.0) -> Tensor:
        targets = batch.pop("targets")
        x = items.pop()[0]
        return (pair.one + pair.other + x) * self.weight * scale - targets


def taken(model: nn.Module, act: Callable[[], object]) -> RecordedCall | None:
    recorder = CallRecorder(model)
    recorder.attach()
    try:
        act()
    finally:
        recorder.detach()
    return recorder.take()


def test_arguments_of_every_form_are_given_again() -> None:
    model = Taking()
    x = vectors(0)

    def act() -> None:
        outputs.append(model(Pair(x, 2 * x), [(3 * x,)], batch={"targets": x, "more": {}}, scale=2.0))

    outputs: list[Tensor] = []
    call = taken(model, act)
    assert call is not None
    for _ in range(2):
        assert torch.equal(call.run(), outputs[0])
    assert call.args[0].one is x, "not a copy"


def test_an_input_that_requires_a_gradient_is_noted_without_its_graph() -> None:
    model = KINDS["dropout"]()
    weights = nn.Linear(WIDTH, WIDTH)
    graph = weights(vectors(0))
    call = taken(model, lambda: model(graph))
    assert call is not None
    assert not call.args[0].requires_grad
    assert torch.equal(call.args[0], graph)
    assert call.args[0].data_ptr() == graph.data_ptr()


def test_only_calls_of_the_training_count_and_the_last_of_them() -> None:
    model = KINDS["dropout"]()
    recorder = CallRecorder(model)
    model(vectors(9))
    recorder.attach()
    recorder.attach()
    assert recorder.recorded is None
    model.eval()
    model(vectors(1))
    model.train()
    with torch.no_grad():
        model(vectors(2))
    assert recorder.recorded is None
    model(vectors(3))
    model(vectors(4))
    model.eval()(vectors(5))
    recorder.detach()
    recorder.detach()
    model.train()(vectors(6))
    assert recorder.recorded is not None
    call = recorder.take()
    assert call is not None
    assert torch.equal(call.args[0], vectors(4))
    assert recorder.take() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called


def test_a_call_that_raised_is_not_noted_and_the_next_one_is() -> None:
    model = KINDS["dropout"]()
    recorder = CallRecorder(model)
    recorder.attach()
    model(vectors(0))
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 2))
    assert recorder.recorded is not None
    assert torch.equal(recorder.recorded.args[0], vectors(0))
    model(vectors(1))
    assert torch.equal(recorder.recorded.args[0], vectors(1))
    assert recorder._running == []


class Recursive(nn.Module):
    """Calls itself with another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        found: Tensor = self.layer(x)
        return found if depth == 2 else self(found, depth + 1)


def test_the_outermost_call_counts() -> None:
    model = Recursive()
    call = taken(model, lambda: model(vectors(0)))
    assert call is not None
    assert call.kwargs == {}
    assert torch.equal(call.args[0], vectors(0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model(reentrant: bool) -> None:
    model = KINDS["batch norm"]()

    def act() -> None:
        x = vectors(0).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()

    call = taken(model, act)
    assert call is not None
    assert torch.equal(call.args[0], vectors(0))


def test_no_argument_is_kept_longer_than_until_the_next_call() -> None:
    model = KINDS["dropout"]()
    recorder = CallRecorder(model)
    recorder.attach()

    def step(number: int) -> Any:
        batch = vectors(number)
        model(batch).sum().backward()
        return weakref.ref(batch)

    first = step(0)
    assert first() is not None
    second = step(1)
    assert first() is None
    recorder.detach()
    assert second() is not None
    recorder.take()
    assert second() is None


def test_arguments_that_were_written_to_are_not_run() -> None:
    model = KINDS["dropout"]()
    batch = vectors(0)
    call = taken(model, lambda: model(batch))
    assert call is not None
    assert not call.changed
    call.run()
    batch.copy_(vectors(1))  # as a loader does that uses its memory again
    assert call.changed
    with pytest.raises(CaptureError, match="has been written to since"):
        call.run()


def test_a_forward_pass_that_writes_to_its_arguments_is_not_run_again() -> None:
    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = Scaling()
    call = taken(model, lambda: model(vectors(0)))
    assert call is not None
    assert call.changed


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_inference_mode() -> None:
    model = KINDS["dropout"]()
    with torch.inference_mode():
        batch = vectors(0)
    model.first.requires_grad_(False)  # type: ignore[union-attr]
    call = taken(model, lambda: model(batch))
    assert call is not None
    assert not call.changed
    call.run()


class Seeing(nn.Module):
    """Notes what autocast does at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        self.seen.append((found.dtype, torch.is_autocast_cache_enabled()))
        return found


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "settings", [None, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"cache_enabled": False}]
)
def test_autocast_is_as_it_was(settings: dict[str, Any] | None, inside: bool) -> None:
    model = Seeing()

    def act() -> None:
        with torch.autocast("cpu", enabled=settings is not None, **(settings or {})):
            model(vectors(0))

    call = taken(model, act)
    assert call is not None
    with torch.autocast("cpu", enabled=inside):
        call.run()
    assert model.seen[0] == model.seen[1]
    assert torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_block_in_a_region_around_leaves_its_cache_alone() -> None:
    model = Seeing()
    with torch.autocast("cpu"):
        call = taken(model, lambda: model(vectors(0)))
        assert call is not None
        seen = []
        model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
        with Undisturbed(model):
            call.run()
    assert seen == [False]


def test_a_copy_of_the_model_notes_nothing() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    recorder = CallRecorder(model)
    recorder.attach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(vectors(0))
    assert recorder.recorded is None
    replica = model._replicate_for_data_parallel()
    replica(vectors(0))
    assert recorder.recorded is None


def test_the_model_must_be_one() -> None:
    with pytest.raises(ConfigError, match="model is a int"):
        CallRecorder(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dropout", "counting", "batch norm"])
def test_a_training_whose_own_calls_are_run_again_goes_on_bit_by_bit(kind: str) -> None:
    replays = Recorded()
    plain, found = trained(KINDS[kind]), trained(KINDS[kind], replays)
    assert replays.count == STEPS
    assert differences(plain, found) == []


class TestCompiled:
    """Calls of compiled models are seen, and nothing is compiled again."""

    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        import torch._dynamo

        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def build(way: str, backend: Any, root: str) -> tuple[nn.Module, Callable[..., Any]]:
        """The module to watch, and what the training calls."""
        model = Around(nn.ReLU())
        if way == "in place":
            model.compile(backend=backend, fullgraph=True)
            return model, model
        if way == "step":

            def step(x: Tensor) -> Tensor:
                found: Tensor = model(x) * 2
                return found

            return model, torch.compile(step, backend=backend, fullgraph=True)
        wrapper = torch.compile(model, backend=backend, fullgraph=True)
        return (model if root == "inside" else wrapper), wrapper  # type: ignore[return-value]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("compiled_before", [True, False])
    @pytest.mark.parametrize(
        ("way", "root", "seen"),
        [("whole", "", True), ("whole", "inside", True), ("in place", "", True), ("step", "inside", False)],
    )
    def test_calls_are_seen_and_nothing_is_compiled_again(
        self, way: str, root: str, seen: bool, compiled_before: bool
    ) -> None:
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        model, called = self.build(way, counter, root)
        if compiled_before:
            expected = called(vectors(0))
            assert counter.frame_count == 1
        recorder = CallRecorder(model)
        recorder.attach()
        found = [called(vectors(step)) for step in range(3)]
        assert counter.frame_count == 1
        assert counter.op_count == (5 if way == "step" else 4), "something of the recorder"
        if compiled_before:
            assert torch.equal(found[0], expected)
        call = recorder.take()
        recorder.detach()
        called(vectors(0))
        # A step that is traced with the hooks on the model in it is traced once more without them.
        assert counter.frame_count == (2 if way == "step" and not compiled_before else 1)
        assert (call is not None) is seen
        if call is not None:
            assert torch.equal(call.args[0], vectors(2))
            with Undisturbed(model):
                torch.testing.assert_close(call.run(), found[2])
            called(vectors(0))
            assert counter.frame_count == 1

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("way", ["whole", "in place"])
    def test_a_larger_batch_is_compiled_as_without_the_recorder(self, way: str) -> None:
        from torch._dynamo.testing import CompileCounter

        counts = []
        for attached in (False, True):
            torch._dynamo.reset()
            counter = CompileCounter()
            model, called = self.build(way, counter, "inside")
            recorder = CallRecorder(model)
            if attached:
                recorder.attach()
            for size in (2, 3, 4, 5):
                called(torch.ones(size, WIDTH))
            counts.append((counter.frame_count, counter.op_count))
            if attached:
                assert recorder.recorded is not None
        assert counts[0] == counts[1]


def test_an_error_of_the_training_passes_through() -> None:
    model = KINDS["dropout"]()

    def fail(*_: object) -> None:
        raise Raised

    model.register_forward_hook(fail)
    with pytest.raises(Raised):
        taken(model, lambda: model(vectors(0)))
