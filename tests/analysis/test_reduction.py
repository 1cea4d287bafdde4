"""Smaller states: the copy loads into the same class, and applies the operator that was announced."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ess_monitor import LayerFilter, MonitorConfig, capture_operators
from ess_monitor.analysis import Reduction, StudentTraining, compressibility, reduce
from ess_monitor.errors import CaptureError, ConfigError, EssMonitorError, NoLayersError
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.featurizers import Backbone, BackboneConfig, build_mixer
from ess_monitor.report import render_reduction
from tests.analysis.models import WIDTH, inputs, mixed, of_transformers, tokens

STATE, LENGTH = 8, 12


def mixer(name: str, state: int = STATE, seed: int = 0) -> nn.Module:
    """In float64, with every weight random: also those that start at 0."""
    torch.manual_seed(seed)
    made = build_mixer(name, WIDTH, 2, state).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def share(T: Tensor, smaller: Tensor) -> float:
    return float((T - smaller).square().sum() / T.square().sum())


@pytest.mark.parametrize("name", ["wla", "gla", "gla_s6", "s6"])
@pytest.mark.parametrize("state", [1, 4])
def test_the_smaller_layer_loads_into_its_class_and_loses_what_is_announced(name: str, state: int) -> None:
    model, u = mixer(name), inputs()
    before = deepcopy(model.state_dict())
    smaller, result = reduce(model, u, state=state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    built = build_mixer(name, WIDTH, 2, state).double()
    built.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(built(u), smaller(u))
    assert type(smaller) is type(model)
    assert (smaller.state_capacity, model.state_capacity) == (state, STATE)
    [T] = capture_operators(model, u).values()
    [small] = capture_operators(built, u).values()
    assert isinstance(small, DiagonalRecurrence)
    assert small.state_size == state
    [layer] = result.layers
    assert (layer.status, layer.state_before, layer.state_after) == ("ok", STATE, state)
    assert layer.operator_loss == pytest.approx(share(T.materialize(), small.materialize()), rel=1e-6)
    assert layer.floor is not None
    assert layer.truncation is not None
    assert layer.floor <= layer.operator_loss < 1
    predicted = compressibility(model, u, student_states=[state]).layers[0].students[0]
    assert (layer.floor, layer.truncation) == pytest.approx((predicted.floor, predicted.truncation))


@pytest.mark.parametrize("name", ["wla", "gla", "s6"])
def test_the_dimensions_that_matter_are_kept_wherever_they_are(name: str) -> None:
    model, u = mixer(name), inputs()
    used = [1, 4, 6]
    with torch.no_grad():
        b = model.b.weight if name == "s6" else model.features.k.weight  # type: ignore[union-attr]
        rows = b.unflatten(0, (-1, STATE))
        rows[:, [n for n in range(STATE) if n not in used]] = 0.0
        if name != "s6":
            model.features.k.bias.unflatten(0, (2, STATE))[:, [0, 2, 3, 5, 7]] = 0.0  # type: ignore[union-attr]
    smaller, result = reduce(model, u, state=3)
    assert result.layers[0].operator_loss == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(smaller(u), model(u), rtol=1e-7, atol=1e-9)


def test_no_choice_of_two_dimensions_with_scaled_reads_does_better() -> None:
    model, u = mixer("wla", 4), inputs()
    _, result = reduce(model, u, state=3)
    [operator] = capture_operators(model, u).values()
    assert isinstance(operator, DiagonalRecurrence)
    parts = [
        DiagonalRecurrence(operator.log_decay[..., n : n + 1], operator.b[..., n : n + 1], operator.c[..., n : n + 1])
        for n in range(4)
    ]
    T = torch.stack([part.materialize() for part in parts], -1)  # (B, H, L, L, n)
    lost = 0.0
    for head in range(2):
        columns, whole = T[:, head].reshape(-1, 4), T[:, head].sum(-1).flatten()
        best = []
        for left_out in range(4):
            kept = columns[:, [n for n in range(4) if n != left_out]]
            best.append(float((whole - kept @ torch.linalg.lstsq(kept, whole[:, None]).solution[:, 0]).square().sum()))
        lost += min(best)
    assert result.layers[0].operator_loss == pytest.approx(lost / float(T.sum(-1).square().sum()), rel=1e-6)


def test_all_layers_of_a_backbone_are_made_smaller_and_measured() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(vocab_size=12, width=WIDTH, featurizer="gla", state_size=8)
    model, x = Backbone(config), torch.randint(12, (4, 16))

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"mean": float(model(x).square().mean()), "nothing": float("nan")}

    smaller, result = reduce(model.train(), x, state=4, evaluate=evaluate)
    assert smaller.training
    fresh = Backbone(config.model_copy(update={"state_size": 4}))
    fresh.load_state_dict(smaller.state_dict())
    assert smaller.config.state_size == 4  # type: ignore[union-attr]
    assert model.config.state_size == 8
    with torch.no_grad():
        expected = [float(each(x).square().mean()) for each in (model, fresh)]
    assert [result.before, result.after] == [
        {"mean": pytest.approx(each, rel=1e-5), "nothing": None} for each in expected
    ]
    assert [layer.layer for layer in result.layers] == ["blocks.0.mixer", "blocks.1.mixer"]
    assert result.layers[0].settings["state_size"] == 4


MAMBA2 = {"mamba2": "state_size", "bamba": "mamba_d_state"}


@pytest.mark.parametrize("name", MAMBA2)
def test_mamba2_of_transformers_keeps_channels_of_its_convolution(name: str) -> None:
    model, x = of_transformers(name), tokens()
    smaller, result = reduce(model, x, state=4)
    config = deepcopy(model.config)
    setattr(config, MAMBA2[name], 4)
    fresh = type(model)(config).eval()
    fresh.load_state_dict(smaller.state_dict())
    assert getattr(smaller.config, MAMBA2[name]) == 4
    assert getattr(model.config, MAMBA2[name]) == 8
    with torch.no_grad():
        torch.testing.assert_close(fresh(x).logits, smaller(x).logits)
    reduced = [layer for layer in result.layers if layer.status == "ok"]
    others = [layer for layer in result.layers if layer.status != "ok"]
    assert len(reduced) == (2 if name == "mamba2" else 1)
    assert all("attention keeps every token" in layer.message for layer in others)
    first = reduced[0]
    T, small = (capture_operators(each, x)[first.layer].materialize() for each in (model, fresh))
    assert first.operator_loss == pytest.approx(share(T, small), rel=1e-3)  # its inputs are those of the whole model
    assert first.floor is not None
    assert 0 < first.floor <= first.operator_loss < 1
    operator = capture_operators(model, x)[first.layer]
    assert isinstance(operator, DiagonalRecurrence)
    kept = {
        tuple(sorted(n for n in range(8) if (small_b == operator.b[..., n]).all()))
        for small_b in capture_operators(fresh, x)[first.layer].b.unbind(-1)  # type: ignore[attr-defined]
    }
    assert len(kept) == 4, "each channel that is kept is one of those before, unchanged"


def test_mamba_of_transformers_keeps_rows_of_its_projection_and_of_the_rates() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=8)
    model, x = transformers.MambaForCausalLM(config).eval(), tokens()
    smaller, result = reduce(model, x, state=3)
    config.state_size = 3
    fresh = transformers.MambaForCausalLM(config).eval()
    fresh.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(x).logits, smaller(x).logits)
    T, small = (next(iter(capture_operators(each, x).values())).materialize() for each in (model, fresh))
    assert result.layers[0].operator_loss == pytest.approx(share(T[:, :16], small[:, :16]), rel=1e-3)


@pytest.fixture
def fla() -> Any:
    import warnings

    from benchmarks.layers.fla import layer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library: no accelerator, old option names
        pytest.importorskip("fla")
        yield layer


def test_directions_are_folded_into_q_and_k_of_simple_gla(fla: Any) -> None:
    torch.manual_seed(0)
    settings = {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": False}
    model, (x,), _ = fla("simple_gla.SimpleGatedLinearAttention", LENGTH, width=32, **settings)
    smaller, result = reduce(model, x, state=3)
    assert result.layers[0].method.startswith("balanced truncation")
    assert result.layers[0].settings == {"expand_k": 3 * 4 / 32}
    fresh, _, _ = fla("simple_gla.SimpleGatedLinearAttention", 1, width=32, expand_k=3 * 4 / 32, **settings)
    fresh.load_state_dict(smaller.state_dict())
    [T], [small] = (capture_operators(each, x).values() for each in (model, fresh))
    assert isinstance(T, DiagonalRecurrence)
    assert small.state_capacity([5]).item() == 3  # type: ignore[union-attr]
    # The truncated operator, from the definition: Gramians of all tokens, summed over samples and heads of a group.
    a, b, c = T.log_decay[..., 0].double().exp(), T.b.double(), T.c.double()
    logs = a.log().cumsum(2)
    decay = (logs[..., :, None] - logs[..., None, :]).exp().tril()
    expected = torch.zeros_like(decay)
    for group in range(2):
        heads = [2 * group, 2 * group + 1]
        P = torch.einsum("bhij,bhjn,bhjm->nm", decay[:, heads] ** 2, b[:, heads], b[:, heads])
        Q = torch.einsum("bhij,bhin,bhim->nm", decay[:, heads] ** 2, c[:, heads], c[:, heads])
        values, vectors = torch.linalg.eig(P @ Q)
        order = values.real.argsort(descending=True)[:3]
        V = vectors.real[:, order]
        W = torch.linalg.inv(vectors.real)[order]
        for head in heads:
            expected[:, head] = decay[:, head] * (c[:, head] @ V @ W @ b[:, head].mT)
    torch.testing.assert_close(small.materialize().double(), expected, rtol=1e-3, atol=1e-5)
    assert result.layers[0].operator_loss == pytest.approx(share(T.materialize(), small.materialize()), rel=1e-3)
    plain, _ = reduce(model, x, state=7)
    with torch.no_grad():
        assert share(model(x)[0], plain(x)[0]) < share(model(x)[0], smaller(x)[0])


def test_gla_of_fla_keeps_dimensions_with_their_decays_also_behind_a_convolution(fla: Any) -> None:
    for convolution in (False, True):
        torch.manual_seed(0)
        settings = {"num_heads": 2, "use_short_conv": convolution, "conv_bias": convolution}
        model, (x,), _ = fla("gla.GatedLinearAttention", 8, width=16, expand_k=1.0, **settings)
        smaller, result = reduce(model, x, state=4)
        fresh, _, _ = fla("gla.GatedLinearAttention", 8, width=16, expand_k=0.5, **settings)
        fresh.load_state_dict(smaller.state_dict())
        [T], [small] = (capture_operators(each, x).values() for each in (model, fresh))
        factor = 0.5**0.5 if convolution else 1.0
        lost = share(T.materialize(), factor * small.materialize())
        assert result.layers[0].operator_loss == pytest.approx(lost, rel=1e-3)
        assert ("scales by state" in result.layers[0].message) is convolution
        assert result.layers[0].method.endswith("scaled") is not convolution


def test_layers_that_cannot_be_made_smaller_stay_and_say_why() -> None:
    model, u = mixed(), inputs()
    smaller, result = reduce(model, u, state=2)
    gla, attention = result.layers
    assert (gla.state_after, attention.status) == (2, "skipped")
    assert "attention keeps every token" in attention.message
    assert [info.name for info in result.skipped] == ["lstm"]
    torch.testing.assert_close(smaller.attention(u), model.attention(u))  # type: ignore[operator]
    for layer, why in ((build_mixer("la", WIDTH, 2, 8), "rotary"), (build_mixer("sa", WIDTH, 2, 8), "every token")):
        with pytest.raises(CaptureError, match=why):
            reduce(layer, u.float(), state=2)
    with pytest.raises(NoLayersError):
        reduce(nn.Linear(WIDTH, WIDTH), u.float(), state=2)
    small_and_large = nn.Sequential(mixer("gla", 4), mixer("gla", 8))
    stays, becomes = reduce(small_and_large, u, state=5)[1].layers
    assert (stays.status, becomes.state_after) == ("skipped", 5)
    assert stays.message == "its state has 4 dimensions, and stays as it is"


def test_only_chosen_layers_are_made_smaller() -> None:
    model = nn.Sequential(mixer("gla"), mixer("wla"))
    smaller, result = reduce(model, inputs(), state=4, config=MonitorConfig(layers=LayerFilter(include=("1",))))
    assert [layer.layer for layer in result.layers] == ["1"]
    assert [each.state_capacity for each in smaller] == [8, 4]  # type: ignore[union-attr]
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(vocab_size=12, width=WIDTH, featurizer="gla", state_size=8))
    first = MonitorConfig(layers=LayerFilter(include=("blocks.0.*",)))
    partly, _ = reduce(backbone, torch.randint(12, (2, 16)), state=4, config=first)
    assert [block.mixer.state_capacity for block in partly.blocks] == [4, 8]  # type: ignore[union-attr]
    assert partly.config.state_size == 8, "no one size is that of all layers"  # type: ignore[union-attr]


@pytest.mark.parametrize("state", [0, -1, 8, 9, 2.5, True, None])
def test_a_state_that_is_not_smaller_is_refused(state: object) -> None:
    with pytest.raises(ConfigError, match="state"):
        reduce(mixer("gla"), inputs(), state=state)  # type: ignore[arg-type]


def test_weights_that_are_not_plain_and_code_that_needs_the_size_are_refused() -> None:
    model = mixer("gla")
    model.features.k.weight.requires_grad_(False)  # type: ignore[union-attr]
    smaller, _ = reduce(model, inputs(), state=4)
    assert not smaller.features.k.weight.requires_grad  # type: ignore[union-attr]
    assert smaller.features.q.weight.requires_grad  # type: ignore[union-attr]
    sharded = mixer("gla")
    sharded.features.k.weight = Sharded(sharded.features.k.weight.detach())  # type: ignore[union-attr]
    with pytest.raises(
        CaptureError, match=r"features.k.weight is a Sharded of torch.float64; give the model with plain"
    ):
        reduce(sharded, inputs(), state=4)
    broken = mixer("gla")
    broken.register_forward_pre_hook(_needs_eight)
    with pytest.raises(CaptureError, match="does not run with smaller states"):
        reduce(broken, inputs(), state=4)
    with pytest.raises(EssMonitorError, match="evaluate returned"):
        reduce(mixer("gla"), inputs(), state=4, evaluate=lambda model: 3.0)  # type: ignore[arg-type, return-value]


class Sharded(nn.Parameter):
    """Not a plain parameter."""


def _needs_eight(module: nn.Module, arguments: object) -> None:
    assert module.state_capacity == STATE, "a size that the code knows"


def test_weights_that_are_tied_stay_as_they_are() -> None:
    def tied(*states: int) -> nn.Sequential:
        model = nn.Sequential(*(mixer("gla", state, seed) for seed, state in enumerate(states)))
        model[1].features.k.weight = model[0].features.k.weight  # type: ignore[union-attr]
        return model

    smaller, result = reduce(tied(8, 8, 8), inputs(), state=4)
    assert [layer.status for layer in result.layers] == ["skipped", "skipped", "ok"]
    assert "features.k.weight is tied to another weight" in result.layers[1].message
    loaded = tied(8, 8, 4)
    loaded.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(loaded(inputs()), smaller(inputs()))
    one = mixer("gla")
    one.features.q = one.features.k  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"features.k.bias is tied to another weight"):
        reduce(one, inputs(), state=4)
    trial = StudentTraining(operator_steps=0, activation_steps=0)
    [layer] = compressibility(one, inputs(), student_states=[4], trial=trial).layers
    assert "no student was trained: its features.k.bias is tied" in layer.message


@dataclass(frozen=True)
class Frozen:
    """A configuration that takes no assignment."""

    state_size: int = STATE
    layers: int = 1


def test_a_frozen_configuration_is_replaced() -> None:
    model = mixer("gla")
    model.config = Frozen()  # type: ignore[assignment]
    smaller, result = reduce(model, inputs(), state=4)
    assert (smaller.config, model.config) == (Frozen(state_size=4), Frozen())
    assert result.layers[0].settings == {"state_size": 4}


def test_numbers_that_are_not_finite_are_unknown_and_not_left_out() -> None:
    model = mixer("gla")

    def evaluate(given: nn.Module) -> dict[str, float]:
        return {"loss": 1.0 if given is model else math.inf, "accuracy": math.nan}

    _, result = reduce(model, inputs(), state=4, evaluate=evaluate)
    assert (result.before, result.after) == ({"loss": 1.0, "accuracy": None}, {"loss": None, "accuracy": None})
    assert "loss 1 → -; accuracy - → -" in str(result)
    assert "accuracy" in render_reduction(result)
    assert Reduction.model_validate_json(json.dumps(result.model_dump(mode="json"), allow_nan=False)) == result
    with pytest.raises(ConfigError, match="evaluate must return numbers by name"):
        reduce(model, inputs(), state=4, evaluate=lambda model: {"loss": "low"})  # type: ignore[dict-item]


def test_what_an_evaluation_raises_is_not_said_of_the_model() -> None:
    model = mixer("gla")

    def evaluate(given: nn.Module) -> dict[str, float]:
        if given is not model:
            raise OSError("no such file")
        return {}

    with pytest.raises(OSError, match="no such file"):
        reduce(model, inputs(), state=4, evaluate=evaluate)


def test_a_state_that_is_empty_or_reads_nothing_loses_nothing() -> None:
    model = mixer("gla")
    with torch.no_grad():
        model.features.q.weight.zero_()  # type: ignore[union-attr]
        model.features.q.bias.zero_()  # type: ignore[union-attr]
    smaller, result = reduce(model, inputs(), state=4)
    assert result.layers[0].operator_loss == 0
    assert torch.isfinite(smaller(inputs())).all()


def test_rows_have_a_line_for_each_layer_with_the_numbers_before_and_after() -> None:
    model, u = mixed(), inputs()
    _, result = reduce(model, u, state=2, evaluate=lambda model: {"loss": float(model(u).square().mean())})
    rows = result.rows()
    assert [row["layer"] for row in rows] == ["gla", "attention"]
    assert rows[0]["loss_before"] == result.before["loss"]
    assert rows[0]["loss_after"] == result.after["loss"]
    assert Reduction.model_validate(result.model_dump(mode="json")) == result
