"""State modulation of readings: against an SVD of every H_i, in padded rows, over ranks, and where it is not known."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor import CaptureConfig, ConfigError, Monitor, MonitorConfig, capture_operators, profile
from ess_monitor.capture import ModulationConfig
from ess_monitor.distributed.reduction import RankReduction
from ess_monitor.exporters.prometheus.collector import SnapshotCollector
from ess_monitor.exporters.scalars import scalars
from ess_monitor.exporters.tensorboard.layout import custom_scalars_layout
from ess_monitor.featurizers import build_mixer
from ess_monitor.pipeline.checkpoint import result_from_state, result_state
from ess_monitor.pipeline.readings import compute
from ess_monitor.records import Reading, SampleResult
from tests.ess.kinds import KINDS

TAUS = (0.003, 0.1, 0.5)
EVERYTHING = CaptureConfig(samples=8, heads=None)


class Model(nn.Module):
    """An embedding and a mixer; token 0 is far from the others, so that gates see it."""

    def __init__(self, name: str = "gla", vocabulary: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, 16)
        self.mixer = build_mixer(name, 16, 2, 8)
        with torch.no_grad():
            self.embedding.weight[0] *= 4

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return self.mixer(self.embedding(tokens))


def settings(**modulation: Any) -> MonitorConfig:
    given = {"separators": [0, 5], "tolerances": TAUS, "tokens": 64, **modulation}
    return MonitorConfig(tolerance=1e-3, modulation=given, capture=EVERYTHING)


def text(rows: int = 3, length: int = 48) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(1, 12, (rows, length)).masked_fill(torch.rand(rows, length) < 0.1, 0)
    return tokens.masked_fill(tokens == 5, 6).index_fill(1, torch.tensor([20]), 5)


def expected(T: torch.Tensor, tokens: torch.Tensor, scale: str = "absolute") -> tuple[list[float], int]:
    """The ratio by its definition, at every token that counts, from T (rows, heads, L, L) in float64."""
    T = T.double()
    if scale == "output":
        T = T / T.norm(dim=-1, keepdim=True)
    length = T.shape[-1]
    sums = torch.zeros(2, 2, len(TAUS), dtype=torch.float64)
    count = 0
    for row, ids in enumerate(tokens.tolist()):
        is_separator = [token in (0, 5) for token in ids]
        for e in range(length):
            inside = max(4, length // 8) <= e < length - max(4, length // 8)
            if not inside or any(is_separator[e - 3 : e]) or (is_separator[e + 1] and not is_separator[e]):
                continue
            kind = 0 if is_separator[e] else 1
            count += kind == 0
            for head in range(T.shape[1]):
                sizes = [torch.linalg.svdvals(T[row, head, i:, :i]) for i in range(e - 3, e + 2)]
                counts = torch.tensor([[int((values > tau).sum()) for tau in TAUS] for values in sizes]).double()
                sums[kind, 0] += counts[-1]
                sums[kind, 1] += counts[:-1].mean(0)
    dips = 1 - sums[:, 0] / sums[:, 1]
    return (dips[0] - dips[1]).tolist(), count


@pytest.mark.parametrize("scale", ["absolute", "output"])
@pytest.mark.parametrize("name", ["gla", "sa"])
def test_the_ratio_is_that_of_an_svd_of_every_block(name: str, scale: str) -> None:
    model, tokens = Model(name), text()
    config = settings().model_copy(update={"tolerance_scale": scale})
    (found,) = profile(model, tokens, config=config).readings
    ratios, count = expected(capture_operators(model, tokens)["mixer"].materialize(), tokens, scale)
    assert found.modulation_separators == count > 4
    assert dict(found.modulation_ratio) == pytest.approx(dict(zip(TAUS, ratios, strict=True)), abs=1e-9)
    assert max(map(abs, ratios)) > 0.02


def test_a_training_gives_the_ratio_of_the_rows_it_samples_and_is_not_changed() -> None:
    weights, found = [], []
    for modulation in (None, {"separators": [0, 5], "tolerances": TAUS, "tokens": 64}):
        model, tokens = Model(), text(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        operator = capture_operators(model, tokens)["mixer"]
        config = MonitorConfig(every_n_steps=1, modulation=modulation, capture=EVERYTHING)
        with Monitor(model, config) as monitor:
            for step in range(3):
                model(tokens).square().mean().backward()
                optimizer.step()
                monitor.step()
                if step == 0:
                    found = list(monitor.flush())
        weights.append(model.mixer.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in weights), strict=True))
    ratios, _ = expected(operator.materialize(), tokens)
    assert [ratio for _, ratio in found[0].modulation_ratio] == pytest.approx(ratios, abs=1e-9)


def test_it_costs_nothing_unless_it_is_asked_for() -> None:
    (found,) = profile(Model(), text(), config=MonitorConfig(capture=EVERYTHING)).readings
    assert (found.modulation_ratio, found.modulation_separators, found.modulation_message) == ((), 0, "")


class Masked(Model):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.mixer(self.embedding(input_ids))


def test_padding_is_cut_off_before_tokens_are_looked_for() -> None:
    model, tokens = Masked(), text(2, 40)
    padded = torch.cat([torch.zeros(2, 24, dtype=torch.long), tokens], dim=1)  # padding that looks like a separator
    mask = (torch.arange(64) >= 24).expand(2, -1)
    crop = EVERYTHING.model_copy(update={"max_length": 40})
    for capture in (EVERYTHING, crop):
        config = settings().model_copy(update={"capture": capture})
        (found,) = profile(model, input_ids=padded, attention_mask=mask, config=config).readings
        T = capture_operators(model, input_ids=padded, attention_mask=torch.ones(2, 64))["mixer"].materialize()
        ratios, count = expected(T[..., 24:, 24:], tokens)
        assert (found.length, found.modulation_separators) == (40, count)
        assert [ratio for _, ratio in found.modulation_ratio] == pytest.approx(ratios, abs=1e-9)


class OfABatch(Model):
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return self.mixer(self.embedding(batch["input_ids"]))


class OfVectors(Model):
    """The embedding is part of the model, and is called before it."""

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.mixer(inputs_embeds)


class TimeFirst(Model):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.mixer(self.embedding(tokens).transpose(0, 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda ids: (Model(), (ids, ids.flip(1))),
        lambda ids: (OfABatch(), ({"labels": ids.flip(1), "input_ids": ids.to(torch.uint8)},)),
        lambda ids: (TimeFirst(), (ids.T,)),
        lambda ids: (nn.Sequential(Model()), (ids.int(),)),
    ],
    ids=["beside targets", "in a batch", "time first", "of a module inside"],
)
def test_ids_are_found_where_models_take_them(call: Callable[[torch.Tensor], tuple[nn.Module, Any]]) -> None:
    model, arguments = call(text())
    if not isinstance(model, (Model, nn.Sequential)) or isinstance(model, (OfABatch, nn.Sequential)):
        arguments = ({**arguments[0], "input_ids": text().int()},) if isinstance(model, OfABatch) else arguments
    (found,) = profile(model, *arguments, config=settings(separators=[0, 5, 300])).readings
    (reference,) = profile(Model(), text(), config=settings()).readings
    assert found.status == "ok"
    assert found.modulation_ratio == reference.modulation_ratio != ()


def test_ids_that_an_embedding_was_given_before_the_model_count_where_the_model_has_none() -> None:
    model = OfVectors()
    with Monitor(model, settings()) as monitor, monitor.sample():
        model(model.embedding(text()))
    (found,) = monitor.readings or monitor.flush()
    (reference,) = profile(Model(), text(), config=settings()).readings
    assert found.modulation_ratio == reference.modulation_ratio != ()


def test_a_run_without_ids_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    mixer = build_mixer("gla", 16, 2, 8)
    seen: list[str] = []
    sink = SimpleNamespace(
        name="kept",
        inline=True,
        start=lambda run, snapshot: None,
        export=lambda measurement: seen.extend(measurement.warnings),
        close=lambda status: None,
    )
    with caplog.at_level(logging.WARNING), Monitor(mixer, settings(), exporters=[sink]) as monitor:
        for _ in range(3):
            with monitor.sample():
                mixer(torch.randn(2, 32, 16))
            (found,) = monitor.flush()
    assert (found.status, found.modulation_ratio) == ("ok", ())
    assert "no module around it was given token ids" in found.modulation_message
    assert seen == [f"modulation: model has no modulation_ratio: {found.modulation_message}"]


def test_curves_and_gauges_have_a_value_for_each_tolerance() -> None:
    model, seen = Model(), []
    sink = SimpleNamespace(
        name="kept",
        inline=True,
        start=lambda run, snapshot: seen.append(run),
        export=seen.append,
        close=lambda status: None,
    )
    with Monitor(model, settings(), exporters=[sink]) as monitor, monitor.sample():
        model(text())
    run, measurement = seen
    ratios = dict(measurement.readings[0].modulation_ratio)
    assert len(ratios) == len(TAUS)
    curves = scalars(measurement)
    assert {tau: curves[f"ess_modulation_ratio_tau_{tau:g}/mixer"] for tau in TAUS} == ratios
    families = {family.name: family for family in SnapshotCollector(run, monitor.snapshot).collect()}
    found = {each.labels["tolerance"]: each for each in families["ess_monitor_state_modulation_ratio"].samples}
    assert {tau: found[f"{tau:g}"].value for tau in TAUS} == ratios
    assert {each.labels["layer"] for each in found.values()} == {"mixer"}
    [kind, (pattern,)] = custom_scalars_layout(["mixer"], modulation=True)["ESS overview"][
        "State modulation of every layer, by tau"
    ]
    assert kind == "Multiline"
    assert all(re.match(pattern, tag) for tag in curves if "modulation" in tag)
    assert not any("modulation" in title for title in custom_scalars_layout(["mixer"])["ESS overview"])


def test_data_without_a_separator_are_told_of_once() -> None:
    model, seen = Model(), []
    sink = SimpleNamespace(
        name="kept",
        inline=True,
        start=lambda run, snapshot: seen.append(run.modulation_separators),
        export=lambda measurement: seen.extend(measurement.warnings),
        close=lambda status: None,
    )
    with Monitor(model, settings(separators=[11, 7]), exporters=[sink]) as monitor:
        for _ in range(22):
            with monitor.sample():
                model(torch.full((2, 32), 3))
            monitor.flush()
    assert seen[0] == (7, 11)
    (said,) = seen[1:]
    assert said.startswith("modulation: no sequence of 20 samples held a separator (7, 11)")


class Filter(nn.Module):
    """A depthwise causal filter, the same for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.conv = nn.Conv1d(4, 4, 6, groups=4, padding=5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.conv(self.embedding(tokens).mT)[..., : tokens.shape[1]].mT


def test_an_operator_that_is_the_same_for_all_tokens_has_no_modulation() -> None:
    captured = SimpleNamespace(
        operator=KINDS["recurrence"](),
        claims=(),
        window=None,
        separators=None,
        no_separators="same",
        with_retention=True,
    )
    results = compute(captured, (3,), 1e-3, "absolute", ModulationConfig(separators=[0]))  # type: ignore[arg-type]
    assert "modulation_sizes" not in results
    found = [each for each in profile(Filter(), text(), config=settings()).readings if each.status == "ok"]
    assert all("same whatever the tokens are" in each.modulation_message for each in found)


def test_it_is_left_out_before_there_are_fewer_tokens() -> None:
    model = Model("sa", 12)
    tokens = text(2, 256)
    config = settings().model_copy(update={"runtime": MonitorConfig(runtime={"sample_seconds": 0.005}).runtime})
    with Monitor(model, config) as monitor, monitor.sample():
        model(tokens)
    (found,) = monitor.readings or monitor.flush()
    assert found.status == "ok"
    assert found.modulation_ratio == ()
    assert "sample_seconds" in found.modulation_message


def test_ranks_agree_on_the_mean_of_those_that_have_the_ratio() -> None:
    def sample(*ratios: tuple[float, float]) -> SampleResult:
        one = Reading(step=7, layer="a", status="ok", effective_size=4, modulation_ratio=ratios)
        return SampleResult(7, (one,), slowness={"a": 1.5})

    reduction = RankReduction(["a", "b"], ["loss"], ranks=(0, 1, 2), tolerances=(0.1, 1.0))
    samples = [sample((0.1, 0.5), (1.0, 0.25)), sample((0.1, 0.25)), sample()]
    values = reduction.reduce([reduction.encode(each, 10) for each in samples])
    for each in samples:
        agreed, interval = reduction.decode(each, values)
        assert interval == 10
        assert agreed.readings[0].modulation_ratio == ((0.1, 0.375), (1.0, 0.25))
        assert (agreed.readings[0].ranks, agreed.slowness) == (3, {"a": 1.5})


def test_a_checkpoint_holds_the_ratio_of_the_sample_under_way() -> None:
    one = Reading(step=7, layer="a", status="ok", modulation_ratio=((0.1, 0.5),), modulation_separators=3)
    state = result_state(SampleResult(7, (one,)))
    assert result_from_state(state).readings == (one,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "modulation.separators: must be given"),
        ({"separators": []}, r"modulation.separators: must be 1 to 16 different numbers$"),
        ({"separators": [-1]}, r"modulation.separators.0: must be .*equal to 0 \(got -1\)$"),
        ({"separators": ["."]}, r"modulation.separators.0: must be a valid integer \(got '\.'\)$"),
        ({"separators": [0], "tolerances": [0.0]}, r"modulation.tolerances.0: must be greater than 0 \(got 0.0\)$"),
        ({"separators": [0], "tokens": 0}, "modulation.tokens: must be"),
        ({"separator": [0]}, "did you mean modulation.separators"),
        ([0], "modulation"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MonitorConfig(modulation=given)


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_MODULATION__SEPARATORS", "[2, 0, 2]")
    modulation = MonitorConfig.load().modulation
    assert modulation is not None
    assert modulation.separators == (0, 2)
