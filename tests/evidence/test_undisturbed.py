"""A training in which batches are run again between the steps ends bit by bit as one without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.featurizers import FEATURIZERS
from tests.evidence.dump import differences
from tests.evidence.models import KINDS, Around, Counting, featurizer, transformers_model
from tests.evidence.training import (
    called_as_it_is,
    left_by_an_error,
    replayed,
    tokens,
    trained,
    vectors,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning",
    "ignore:.*weight_norm.*is deprecated:FutureWarning",
)


def compare(build: Callable[[], nn.Module], **options: Any) -> None:
    """Compare trainings without, with, and with replays that fail; and one whose replays do leave traces."""
    plain = trained(build, **options)
    assert differences(plain, trained(build, replayed, **options)) == []
    assert differences(plain, trained(build, left_by_an_error, **options)) == []
    assert differences(plain, trained(build, called_as_it_is, **options)) != []


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_bit_by_bit(kind: str) -> None:
    if kind == "torchmetrics":
        pytest.importorskip("torchmetrics")
    compare(KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("dropout", "losses"),
        ("batch norm", "model._modules['inner']._buffers['running_mean']"),
        ("counting", "model._modules['inner'].in_place"),
        ("counting", "model._modules['inner'].shadow['weights']['mean']"),
        ("moving buffers", "model._modules['inner']._buffers['hidden']"),
        ("cache built late", "losses"),
        ("held generator", "losses"),
    ],
)
def test_without_the_block_the_same_calls_do_disturb(kind: str, path: str) -> None:
    assert path in differences(trained(KINDS[kind]), trained(KINDS[kind], called_as_it_is))


@pytest.mark.parametrize("name", ["Llama", "Mamba"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_with_their_cache(name: str) -> None:
    pytest.importorskip("transformers")
    compare(lambda: transformers_model(name), batch=tokens)


@pytest.mark.parametrize("name", sorted(FEATURIZERS))
def test_our_layers(name: str) -> None:
    compare(lambda: featurizer(name), batch=tokens)


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("around_the_replays", [nullcontext, bfloat16])
def test_under_autocast(around_the_replays: Callable[[], AbstractContextManager[Any]]) -> None:
    def between(model: Any, batch: Tensor) -> None:
        with around_the_replays():
            replayed(model, batch)

    plain = trained(KINDS["dropout"], region=bfloat16)
    assert differences(plain, trained(KINDS["dropout"], between, region=bfloat16)) == []
    assert differences(plain, trained(KINDS["dropout"])) != []


def gradients_in_one_region(between: Callable[[nn.Module, Tensor], None]) -> list[Tensor | None]:
    """The gradients of a step in an autocast region that was open before, from weights that were changed in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with bfloat16():
        between(model, vectors(1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        model(vectors(0)).float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_no_cast_of_a_weight_stays_in_an_autocast_region_around() -> None:
    expected = gradients_in_one_region(lambda model, batch: None)
    stale = gradients_in_one_region(called_as_it_is)
    # The older versions of torch lose the gradient, the newer ones take it at the older weights.
    assert stale[0] is None or not torch.equal(stale[0], expected[0])  # type: ignore[arg-type]
    for found, gradient in zip(gradients_in_one_region(replayed), expected, strict=True):
        assert torch.equal(found, gradient)  # type: ignore[arg-type]
    with bfloat16():
        replayed(nn.Sequential(nn.Linear(6, 6)), vectors(0))
        assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_that_wait_for_the_optimizer_stay(accumulated: int) -> None:
    def gradients(between: Callable[[Any, Tensor], None] | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = KINDS["dropout"]()
        frozen = next(model.parameters()).requires_grad_(False)
        for step in range(accumulated):
            model(vectors(step)).square().mean().backward()
            held = [parameter.grad for parameter in model.parameters()]
            if between is not None:
                between(model, vectors(9))
            assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
        assert frozen.grad is None
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for found, expected in zip(gradients(replayed), gradients(None), strict=True):
        assert torch.equal(found, expected)


def test_each_forward_pass_of_a_block_starts_from_the_same_state() -> None:
    from ess_monitor.evidence.undisturbed import Undisturbed

    torch.manual_seed(0)
    model = Around(Counting(), dropout=0.5)
    model(vectors(0))
    with Undisturbed(model) as block:
        first = model(vectors(1))
        drifted = model(vectors(1))
        block.rewind()
        again = model(vectors(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, drifted)
    assert model.inner.calls == 1
