"""Compiled models under replays: the same training, and nothing is compiled again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.evidence.undisturbed import Undisturbed
from tests.evidence.dump import differences
from tests.evidence.models import WIDTH, Around
from tests.evidence.training import called_as_it_is, left_by_an_error, replayed, trained, vectors

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Steady(nn.Module):
    """Dropout, batch norm and an attribute that is tensor, so that compiled code has something to guard."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.total = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), torch.zeros(WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.detach().mean(0)
        self.average = self.average * 0.9 + self.total * 0.1
        return self.dropout(self.norm(x)) - 0.1 * self.average


def build() -> nn.Module:
    return Around(Steady())


def whole(backend: Any) -> Callable[[nn.Module], Any]:
    return lambda model: torch.compile(model, backend=backend)


def in_place(backend: Any) -> Callable[[nn.Module], Any]:
    def compiled(model: nn.Module) -> nn.Module:
        model.compile(backend=backend)
        return model

    return compiled


def inside(backend: Any) -> Callable[[nn.Module], Any]:
    def compiled(model: nn.Module) -> nn.Module:
        model.inner.compile(backend=backend)  # type: ignore[union-attr, operator]
        return model

    return compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", [whole, in_place, inside])
def test_a_compiled_training_goes_on_bit_by_bit(way: Callable[[Any], Any], backend: str) -> None:
    plain = trained(build, wrap=way(backend))
    assert differences(plain, trained(build, replayed, wrap=way(backend))) == []
    assert differences(plain, trained(build, left_by_an_error, wrap=way(backend))) == []
    assert differences(plain, trained(build, called_as_it_is, wrap=way(backend))) != []


def compilations(way: Callable[[Any], Any], between: Callable[[Any, Tensor], None] | None) -> tuple[int, int]:
    """How often a training compiles in its first step, and in all of them."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, first = CompileCounter(), []

    def count(model: Any, batch: Tensor) -> None:
        first.append(counter.frame_count)
        if between is not None and len(first) > 1:
            between(model, batch)

    trained(build, count, wrap=way(counter))
    return first[1], counter.frame_count


@pytest.mark.parametrize("way", [whole, in_place, inside])
def test_nothing_is_compiled_again(way: Callable[[Any], Any]) -> None:
    first, last = compilations(way, replayed)
    assert first == last > 0
    first, last = compilations(way, called_as_it_is)
    assert first < last, "without the block the same calls are compiled"


def test_hooks_see_the_calls_of_a_compiled_model_in_the_block() -> None:
    model = build()
    called = torch.compile(model, backend="eager")
    called(vectors(0))
    seen: list[str] = []
    handle = model.inner.register_forward_hook(lambda *_: seen.append("call"))  # type: ignore[union-attr]
    called(vectors(0))
    assert seen == []
    with Undisturbed(called):
        called(vectors(0))
    assert seen == ["call"]
    handle.remove()
