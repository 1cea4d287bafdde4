"""`rescale_alpha` divides log A and nothing else, `restore_alpha` takes it back exactly, and which alpha to take."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor.capture import capture_operators
from ess_monitor.errors import CaptureError, ConfigError
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.featurizers import GLA, GLAS6, LA, S6, SA, WLA
from ess_monitor.interventions import advise_alpha, rescale_alpha, restore_alpha

LAYERS: dict[str, Callable[[], nn.Module]] = {"s6": lambda: S6(16, state_size=8), "gla_s6": lambda: GLAS6(16, 2)}
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    built: nn.Module = LAYERS[request.param]()
    return built


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request: pytest.FixtureRequest) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        layer(torch.randn(2, 12, 16, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def log_decay(layer: nn.Module) -> Tensor:
    [operator] = capture_operators(layer, torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))).values()
    assert isinstance(operator, DiagonalRecurrence)
    return operator.log_decay


def bits(value: Any) -> Any:
    """A copy that `==` compares bit for bit."""
    if isinstance(value, Tensor):
        return value.detach().clone().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    return value


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Any:
    return bits(dict(optimizer.state.get(parameter, {})))


# -- rescaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [100.0, 10.0, 3.0, 0.25])
def test_log_a_is_divided_by_the_factor_at_every_entry(layer: nn.Module, factor: float) -> None:
    before = log_decay(layer)
    rescale_alpha(layer, factor)
    torch.testing.assert_close(log_decay(layer) * factor, before, rtol=1e-6, atol=0)


def test_two_rescalings_multiply(layer: nn.Module) -> None:
    before = log_decay(layer)
    rescale_alpha(layer, 20.0)
    rescale_alpha(layer, 5.0)
    torch.testing.assert_close(log_decay(layer) * 100, before, rtol=1e-6, atol=0)


def test_no_other_parameter_or_buffer_changes(layer: nn.Module) -> None:
    before = bits(dict(layer.state_dict()))
    rescale_alpha(layer, 100.0)
    after = bits(dict(layer.state_dict()))
    assert [name for name in before if before[name] != after[name]] == (
        ["A_log"] if isinstance(layer, S6) else ["log_alpha"]
    )


def test_the_optimizer_forgets_exactly_the_changed_parameter(make_optimizer: Callable[..., Any]) -> None:
    layer = S6(16, state_size=8)
    optimizer = make_optimizer(layer.parameters())
    train(layer, optimizer)
    others = [parameter for parameter in layer.parameters() if parameter is not layer.A_log]
    before = [moments(optimizer, parameter) for parameter in others]
    rescale_alpha(layer, 100.0, optimizer=optimizer)
    assert [moments(optimizer, parameter) for parameter in others] == before
    for value in optimizer.state.get(layer.A_log, {}).values():
        if isinstance(value, Tensor) and value.shape == layer.A_log.shape:
            assert not value.any()


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "sgd", "plain sgd"])
def test_after_the_reset_the_parameter_moves_as_with_a_new_optimizer(name: str) -> None:
    layer = S6(16, state_size=8)
    optimizer = OPTIMIZERS[name](layer.parameters())
    train(layer, optimizer)
    rescale_alpha(layer, 100.0, optimizer=optimizer)
    twin = copy.deepcopy(layer)
    train(layer, optimizer, steps=1)
    train(twin, OPTIMIZERS[name](twin.parameters()), steps=1)
    assert torch.equal(layer.A_log, twin.A_log)


def test_a_step_count_kept_as_a_number_is_reset_and_restored() -> None:
    """Optimizers outside torch count in plain integers and keep tables of their own beside the moments."""
    layer = S6(16, state_size=8)
    optimizer = torch.optim.Adam(layer.parameters())
    table = torch.arange(256.0)
    optimizer.state[layer.A_log] = {"step": 7, "exp_avg": torch.ones(8), "table": table}
    kept = rescale_alpha(layer, 100.0, optimizer=optimizer)
    state = optimizer.state[layer.A_log]
    assert state["step"] == 0
    assert not state["exp_avg"].any()
    assert torch.equal(state["table"], torch.arange(256.0))
    restore_alpha(layer, kept, optimizer=optimizer)
    assert state["step"] == 7
    assert state["exp_avg"].all()


# -- taking it back ---------------------------------------------------------------------------------------------------


def test_restoring_brings_parameter_and_moments_back_bitwise(
    layer: nn.Module, make_optimizer: Callable[..., Any]
) -> None:
    optimizer = make_optimizer(layer.parameters())
    train(layer, optimizer)
    before = bits(dict(layer.state_dict())), [moments(optimizer, parameter) for parameter in layer.parameters()]
    kept = rescale_alpha(layer, 100.0, optimizer=optimizer)
    restore_alpha(layer, kept, optimizer=optimizer)
    assert (
        bits(dict(layer.state_dict())),
        [moments(optimizer, parameter) for parameter in layer.parameters()],
    ) == before


def test_restoring_after_further_training_goes_back_to_the_copy(make_optimizer: Callable[..., Any]) -> None:
    layer = S6(16, state_size=8)
    optimizer = make_optimizer(layer.parameters())
    train(layer, optimizer)
    before = bits(layer.A_log), moments(optimizer, layer.A_log)
    kept = rescale_alpha(layer, 100.0, optimizer=optimizer)
    train(layer, optimizer)
    assert bits(layer.A_log) != before[0]
    restore_alpha(layer, kept, optimizer=optimizer)
    assert (bits(layer.A_log), moments(optimizer, layer.A_log)) == before


def test_the_copy_can_be_restored_twice() -> None:
    layer = S6(16, state_size=8)
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer)
    before = bits(layer.A_log), moments(optimizer, layer.A_log)
    kept = rescale_alpha(layer, 100.0, optimizer=optimizer)
    for _ in range(2):
        restore_alpha(layer, kept, optimizer=optimizer)
        assert (bits(layer.A_log), moments(optimizer, layer.A_log)) == before
        train(layer, optimizer)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "sgd", "plain sgd"])
def test_moments_that_did_not_exist_yet_start_anew_when_it_is_taken_back(name: str) -> None:
    layer = S6(16, state_size=8)
    optimizer = OPTIMIZERS[name](layer.parameters())
    kept = rescale_alpha(layer, 100.0, optimizer=optimizer)
    train(layer, optimizer)
    restore_alpha(layer, kept, optimizer=optimizer)
    twin = copy.deepcopy(layer)
    train(layer, optimizer, steps=1)
    train(twin, OPTIMIZERS[name](twin.parameters()), steps=1)
    assert torch.equal(layer.A_log, twin.A_log)


def test_a_buffer_has_no_moments_to_reset() -> None:
    layer = GLAS6(16, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer)
    before = [moments(optimizer, parameter) for parameter in layer.parameters()]
    kept = rescale_alpha(layer, 100.0, optimizer=optimizer)
    assert kept.moments == {}
    assert [moments(optimizer, parameter) for parameter in layer.parameters()] == before
    assert layer.log_alpha not in optimizer.state


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, -2.0, math.inf, math.nan])
def test_a_factor_that_is_no_positive_number_is_an_error_and_changes_nothing(layer: nn.Module, factor: float) -> None:
    before = bits(dict(layer.state_dict()))
    with pytest.raises(ConfigError, match=r"factor=.* finite number above 0"):
        rescale_alpha(layer, factor)
    assert bits(dict(layer.state_dict())) == before


@pytest.mark.parametrize("other", [LA, WLA, GLA, SA])
def test_a_layer_without_alpha_says_so(other: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match=rf"{other.__name__} has no tensor that scales its decay"):
        rescale_alpha(other(16, 2), 100.0)


def test_a_model_is_no_layer() -> None:
    with pytest.raises(CaptureError, match="Sequential has no tensor"):
        rescale_alpha(nn.Sequential(GLAS6(16, 2)), 100.0)


# -- before training --------------------------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "s6": lambda n: S6(16, state_size=n),
    "gla_s6": lambda n: GLAS6(16, 1, expand_k=n / 16, alpha=1.0),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_initial_ess_is_flat_at_alpha_one_and_rises_at_the_alpha_that_is_advised(name: str) -> None:
    sizes = (4, 8, 16)
    advice = advise_alpha(BUILDERS[name], sizes, width=16)
    rows = dict(zip(advice.factors, advice.table, strict=True))
    assert max(rows[1.0]) < 4  # no more than the smallest state
    assert advice.factor is not None
    assert advice.factor > 1
    assert rows[advice.factor] == pytest.approx(sizes, rel=0.25)


def test_advice_is_the_smallest_factor_that_rises_in_whatever_order_they_are_given() -> None:
    given, ordered = ((1000.0, 1.0, 100.0), (1.0, 100.0, 1000.0))
    advice = advise_alpha(BUILDERS["gla_s6"], (4, 8, 16), given, width=16)
    assert advice.factors == ordered
    assert advice.factor == 100.0


def test_no_factor_is_advised_where_none_lets_the_ess_rise() -> None:
    assert advise_alpha(BUILDERS["s6"], (4, 8, 16), (0.1, 1.0), width=16).factor is None


def test_advice_repeats_itself_and_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    first = advise_alpha(BUILDERS["s6"], (4, 8), width=16, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert advise_alpha(BUILDERS["s6"], (4, 8), width=16, seed=3) == first
    assert advise_alpha(BUILDERS["s6"], (4, 8), width=16, seed=4) != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state_sizes": (8,)}, "state_sizes: .* at least two in ascending order"),
        ({"state_sizes": (8, 8)}, "state_sizes: .* at least two in ascending order"),
        ({"state_sizes": (8, 4)}, "state_sizes: .* at least two in ascending order"),
        ({"factors": ()}, "factors: none given"),
        ({"factors": (0.0,)}, "factors=0.0 must be a finite number above 0"),
        ({"length": 15}, "length: 15 given; at least 16"),
        ({"margin": 0.0}, "margin=0.0 must be a finite number above 0"),
        ({"margin": 1.5}, "margin=1.5 must be a finite number above 0"),
    ],
)
def test_advice_on_impossible_questions_is_an_error(arguments: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"state_sizes": (4, 8), "width": 16, **arguments}
    with pytest.raises(ConfigError, match=message):
        advise_alpha(BUILDERS["s6"], **asked)


def test_advice_for_a_layer_without_alpha_is_an_error() -> None:
    with pytest.raises(CaptureError, match="GLA has no tensor"):
        advise_alpha(lambda n: GLA(16, 1, expand_k=n / 16), (4, 8), width=16)
