"""State modulation on a text: the ratio, the curves and substitutions against an SVD of every H_i."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ess_monitor import CaptureConfig, ConfigError, MonitorConfig, capture_operators
from ess_monitor.analysis import state_modulation
from ess_monitor.analysis.modulation_results import OFFSETS
from tests.pipeline.test_modulation import TAUS, Masked, Model, expected, text

CONFIG = MonitorConfig(capture=CaptureConfig(samples=8, heads=None, max_length=64))


def _analyzed(model: torch.nn.Module, tokens: torch.Tensor, **given: Any) -> Any:
    settings = {"separators": [0, 5], "tolerances": TAUS, "config": CONFIG, **given}
    return state_modulation(model, tokens, **settings)


@pytest.mark.parametrize("name", ["gla", "sa"])
def test_ratios_and_curves_are_those_of_an_svd_of_every_block(name: str) -> None:
    model, tokens = Model(name), text()
    T = capture_operators(model, tokens)["mixer"].materialize().double()
    result = _analyzed(model, tokens)
    [layer] = result.layers
    ratios, count = expected(T, tokens)
    assert (layer.status, layer.separators, layer.operators) == ("ok", count, 6)
    *at_tau, entropy = layer.modulation
    assert [each.ratio for each in at_tau] == pytest.approx(ratios, abs=1e-9)
    for each in at_tau:
        assert each.ratio == pytest.approx(each.at_separators - each.elsewhere)
    sizes = torch.zeros(3, 48)
    spectra = torch.zeros(3, 48)
    for row in range(3):
        for i in range(1, 48):
            values = torch.linalg.svdvals(T[row, :, i:, :i])
            sizes[row, i] = (values > TAUS[1]).sum(-1).double().mean()
            share = values / values.sum(-1, keepdim=True)
            spectra[row, i] = (-torch.xlogy(share, share).sum(-1)).exp().mean()
    assert at_tau[1].along == pytest.approx(sizes[0, 1:].tolist())
    assert entropy.tolerance is None
    assert entropy.along == pytest.approx(spectra[0, 1:].tolist(), rel=1e-4)
    is_separator = (tokens == 0) | (tokens == 5)
    places = [
        (row, e) for row, e in is_separator.nonzero().tolist() if 6 <= e < 42 and not is_separator[row, e - 3 : e].any()
    ]
    assert len(places) == count
    for k, offset in enumerate(OFFSETS):
        there = [sizes[row, e + offset] for row, e in places if 1 <= e + offset < 48]
        assert at_tau[1].around[k] == pytest.approx(float(torch.stack(there).mean()))
    assert result.places == tuple(is_separator[0].nonzero().flatten().tolist())


def test_a_substitute_is_measured_where_the_separators_were() -> None:
    model, tokens = Model(), text()
    result = _analyzed(model, tokens, substitutes={7: "seven"})
    [substitution] = result.substitutions
    assert (substitution.token, substitution.label) == (7, "seven")
    replaced = tokens.masked_fill((tokens == 0) | (tokens == 5), 7)
    ratios, count = expected(capture_operators(model, replaced)["mixer"].materialize(), tokens)
    [layer] = substitution.layers
    assert layer.separators == count
    assert [each.ratio for each in layer.modulation[:-1]] == pytest.approx(ratios, abs=1e-9)
    assert layer.modulation != result.layers[0].modulation
    rows = result.rows()
    assert [(row["substitute"], row["tolerance"]) for row in rows] == [
        (label, tau) for label in ("", "seven") for tau in (*TAUS, None)
    ]
    assert result.to_dataframe()["ratio"].tolist() == [row["ratio"] for row in rows]


def test_padding_is_no_text() -> None:
    model, tokens = Masked(), text(2, 40)
    padded = torch.cat([torch.zeros(2, 24, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(64) >= 24).expand(2, -1)
    [layer] = _analyzed(model, padded, attention_mask=mask).layers
    T = capture_operators(model, input_ids=padded, attention_mask=torch.ones(2, 64))["mixer"].materialize()
    ratios, count = expected(T[..., 24:, 24:], tokens)
    assert layer.separators == count
    assert [each.ratio for each in layer.modulation[:-1]] == pytest.approx(ratios, abs=1e-9)


def test_the_bootstrap_error_is_the_spread_of_the_ratio_over_texts() -> None:
    torch.manual_seed(3)
    model = Model()
    ratios, errors = [], []
    for _ in range(16):
        tokens = torch.randint(1, 12, (4, 48)).masked_fill(torch.rand(4, 48) < 0.08, 0)
        [layer] = _analyzed(model, tokens, separators=[0], tolerances=[0.1]).layers
        ratios.append(layer.modulation[0].ratio)
        errors.append(layer.modulation[0].standard_error)
    spread = float(torch.tensor(ratios).std())
    assert 0.5 * spread < sum(errors) / 16 < 2 * spread


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": torch.rand(2, 48)}, r"tokens is a torch.float32 tensor.*pass ids"),
        ({"separators": [40, 41]}, "separators: none of 40, 41 is among the tokens"),
        ({"separators": list(range(12))}, "separators: 144 of the tokens are, but each is in the first or last eighth"),
        ({"separators": ["."]}, "separators='.' must be a whole number"),
        ({"substitutes": [-1]}, "substitutes=-1 must be a whole number"),
        ({"tolerances": [0.0]}, "tolerances.0: must be greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    tokens = given.pop("tokens", text())
    with pytest.raises(ConfigError, match=message):
        _analyzed(Model(), tokens, **given)


def test_layers_without_a_result_say_why() -> None:
    model, tokens = Model(), text()
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    [layer] = _analyzed(model, tokens).layers
    assert (layer.status, layer.message) == ("nonfinite", "an input of its operator is NaN or infinite")
    cropped = CONFIG.model_copy(update={"capture": CaptureConfig(samples=2, heads=None, max_length=64)})
    [layer] = _analyzed(Model(), tokens, config=cropped).layers
    assert layer.status == "ok"
