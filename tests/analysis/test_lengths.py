"""ESS and decay over the length, against the operators that the model applies to shorter inputs."""

from __future__ import annotations

import math

import pytest
import torch

from ess_monitor import CaptureConfig, MonitorConfig, capture_operators
from ess_monitor.analysis import LayerLengths, length_profile
from ess_monitor.errors import EssMonitorError
from ess_monitor.ess import DiagonalRecurrence
from ess_monitor.featurizers import build_mixer
from ess_monitor.report import render_length_profile
from tests.analysis.models import WIDTH, inputs, mixed, of_transformers, tokens
from tests.report.helpers import unwanted_scripts

LENGTHS = (8, 16, 24)


def test_every_length_is_that_of_the_model_on_so_many_tokens() -> None:
    model, u = mixed(), inputs()
    result = length_profile(model, u, lengths=(24, 8, 16, 8))
    assert result.lengths == LENGTHS
    for layer in result.layers:
        assert [at.length for at in layer.lengths] == list(LENGTHS)
        for at in layer.lengths:
            operator = capture_operators(model, u[:, : at.length])[layer.layer]
            T, middle = operator.materialize(), at.length // 2
            values = torch.linalg.svdvals(T[:, :, middle:, :middle])
            assert at.operators == 4
            assert at.effective_size == pytest.approx(float((values > 1e-3).sum(-1).double().mean()))
            assert at.state_capacity == (middle if layer.layer == "attention" else 4)
            if isinstance(operator, DiagonalRecurrence):
                log_decay = operator.log_decay.expand(-1, -1, at.length, 4).sum(2)
                norm = log_decay.exp().square().sum(-1).sqrt().mean()
                assert at.decay_product_norm == pytest.approx(float(norm), rel=1e-6)
            else:
                assert (at.decay_product_norm, at.undecayed_size) == (None, None)


def test_linear_attention_stays_full_and_a_strong_decay_forgets() -> None:
    torch.manual_seed(0)
    forgetful = build_mixer("wla", WIDTH, 2, 8, beta=1.0)
    keeps = build_mixer("la", WIDTH, 2, 8)
    result = length_profile(torch.nn.Sequential(keeps, forgetful), inputs(256).float(), lengths=[32, 256])
    la, wla = result.layers
    assert [at.effective_size for at in la.lengths] == [8, 8]
    assert [at.decay_product_norm for at in la.lengths] == pytest.approx([math.sqrt(8)] * 2)
    assert wla.lengths[1].decay_product_norm < 1e-30 < wla.lengths[0].decay_product_norm
    assert all(at.undecayed_size == 8 for at in wla.lengths)


def test_a_length_that_no_sequence_has_is_left_out_with_the_reason() -> None:
    [gla, _] = length_profile(mixed(), inputs(), lengths=[8, 64]).layers
    assert [at.length for at in gla.lengths] == [8]
    assert gla.message == "no sequence has 64 tokens"
    layers = length_profile(mixed(), inputs(), lengths=[64]).layers
    assert {(layer.status, layer.message) for layer in layers} == {
        ("too_short", "the longest sequence has 24 tokens; give lengths up to that")
    }
    broken = inputs()
    broken[0, 5] = math.nan
    assert {layer.status for layer in length_profile(mixed(), broken, lengths=[8]).layers} == {"nonfinite"}
    linearized = MonitorConfig(capture=CaptureConfig(unknown="jacobian"))
    assert length_profile(mixed(), inputs(), lengths=[8], config=linearized).layers[2].status == "skipped"


@pytest.mark.parametrize("name", ["mamba2", "llama", "bamba"])
def test_real_models_are_measured_at_every_length(name: str) -> None:
    result = length_profile(of_transformers(name), tokens(), lengths=LENGTHS)
    assert [len(layer.lengths) for layer in result.layers] == [3, 3]
    for layer in result.layers:
        has_decay = layer.operator == "DiagonalRecurrence"
        assert all((at.decay_product_norm is not None) == has_decay for at in layer.lengths)


def test_rows_and_page_show_every_layer() -> None:
    result = length_profile(mixed(), inputs(), lengths=LENGTHS)
    hostile = LayerLengths(layer="<script>", status="failed", message="<b>why</b>")
    result = result.model_copy(update={"layers": (*result.layers, hostile)})
    rows = result.rows()
    assert [(row["layer"], row["length"]) for row in rows[:3]] == [("gla", length) for length in LENGTHS]
    assert (rows[-1]["layer"], rows[-1]["length"]) == ("<script>", None)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    page = render_length_profile(result)
    assert page.count("<figure") == 3
    assert unwanted_scripts(page) == []
    for text in ("&lt;b&gt;why", "norm of the product of A", "ESS without decay", "lstm"):
        assert text in page


@pytest.mark.parametrize("lengths", [[], [1], [8.5], "8", 8, None])
def test_lengths_out_of_range_are_refused(lengths: object) -> None:
    with pytest.raises(EssMonitorError, match="lengths"):
        length_profile(mixed(), inputs(), lengths=lengths)  # type: ignore[arg-type]
