"""Real layers inside the ways people train: checkpointed, compiled, under DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.capture import Captured, Sampler, find_layers
from tests.capture.adapters.helpers import EVERYTHING, exact
from tests.ranks import saved_by_ranks

pytest.importorskip("transformers")

from tests.capture.adapters.ranks import FACTOR, WAYS, WORLD_SIZE, expected, loss, model, observe

TRAINING = EVERYTHING.model_copy(update={"source": "train"})


def sampled(called: Any, net: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    sampler = Sampler(find_layers(net), TRAINING)
    sampler.arm()
    loss(called, tokens).backward()
    taken = sampler.collect()
    assert all(isinstance(item, Captured) for item in taken), taken
    return {item.layer.name: exact(item.operator) for item in taken}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    net, tokens = model()
    taken = sampled(net, net, tokens)
    assert len(taken) == 2
    return taken


def check(found: dict[str, Tensor], plain: dict[str, Tensor], *, exactly: bool = True) -> None:
    assert list(found) == list(plain)
    for name, operator in plain.items():
        torch.testing.assert_close(found[name], operator, **({"rtol": 0, "atol": 0} if exactly else {}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_seen_once_and_as_it_is(plain: dict[str, Tensor], reentrant: bool) -> None:
    net, tokens = model()
    newer = hasattr(net, "activation_checkpointing_enable")  # the other name is deprecated there
    enable = net.activation_checkpointing_enable if newer else net.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        net.enable_input_require_grads()  # type: ignore[operator]
    check(sampled(net, net, tokens), plain)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("how", ["whole", "in place", "one layer"])
def test_a_compiled_model_is_seen_after_its_first_compiled_step_and_goes_on_compiled(
    plain: dict[str, Tensor], how: str
) -> None:
    import torch._dynamo

    net, tokens = model()
    called: Any = net
    if how == "whole":
        called = torch.compile(net, backend="eager")
    elif how == "in place":
        net.compile(backend="eager")
    else:
        find_layers(net)[0].module.compile(backend="eager")
    loss(called, tokens).backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    net.zero_grad()
    check(sampled(called, net, tokens), plain)
    sampled_gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    loss(called, tokens).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    for name, p in net.named_parameters():
        assert p.grad is None or torch.equal(p.grad, sampled_gradients[name]), name


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return saved_by_ranks(observe, folder, WORLD_SIZE)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return expected()


@pytest.mark.parametrize("how", WAYS)
def test_every_rank_captures_the_operators_of_the_unwrapped_model(
    ranks: list[dict[str, Any]], alone: dict[str, Any], how: str
) -> None:
    for rank in ranks:
        check(rank[how]["operators"], alone["operators"], exactly=False)


@pytest.mark.parametrize("how", WAYS)
def test_the_pull_gives_the_gradients_of_the_added_term_on_every_rank(
    ranks: list[dict[str, Any]], alone: dict[str, Any], how: str
) -> None:
    for rank in ranks:
        found = {name.removeprefix("module."): value for name, value in rank[how]["gradients"].items()}
        assert found.keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-8), name


@pytest.mark.parametrize("how", WAYS)
def test_alpha_is_rescaled_and_its_moments_are_forgotten_on_every_shard(ranks: list[dict[str, Any]], how: str) -> None:
    net, _ = model()
    before = find_layers(net)[-1].module.get_parameter("A_log")
    for rank in ranks:
        torch.testing.assert_close(rank[how]["A_log"].exp() * FACTOR, before.exp().detach(), rtol=1e-5, atol=1e-7)
        assert rank[how]["moments"].abs().max() == 0
