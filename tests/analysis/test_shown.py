"""What is printed, and shown in notebooks, of the result of an analysis."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ess_monitor.analysis import (
    HybridAdvice,
    LayerAdvice,
    LayerReduction,
    Reduction,
    compressibility,
    hybrid_advice,
    length_profile,
    minimal_state,
    reduce,
    shots_profile,
    state_modulation,
)
from ess_monitor.analysis.results import AnalysisResult
from ess_monitor.featurizers import GLA
from ess_monitor.report import load_study
from tests.report.helpers import rescued_run, write_log
from tests.test_shown import NAME, Odd, check_forms


class Net(nn.Sequential):
    """Tokens, a layer whose name is neither markup nor HTML, and one that nobody reads."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = {"embedding": nn.Embedding(7, 16), NAME: GLA(16, 2), "odd": Odd()}
        super().__init__(OrderedDict(layers))


def tokens(length: int = 32) -> torch.Tensor:
    return torch.randint(1, 7, (2, length), generator=torch.Generator().manual_seed(0))


def measured(what: str) -> tuple[AnalysisResult, list[Any]]:
    """Return a result, and what its table has to show of the first layer."""
    net, inputs = Net(), tokens()
    inputs[:, 16] = 0
    if what == "minimal_state":
        smallest = minimal_state(net, inputs, relative_errors=[0.2])
        layer = smallest.layers[0]
        return smallest, ["Net: smallest states", layer.rank, f"{layer.states[0].size} ({layer.states[0].at_least})"]
    if what == "compressibility":
        students = compressibility(net, inputs, student_states=[4])
        return students, ["state 4", students.layers[0].students[0].summary]
    if what == "reduce":
        _, numbers = reduce(net, inputs, state=4)
        loss = numbers.layers[0].operator_loss
        assert loss
        return numbers, ["Net: states of 4", "8 → 4", f"{100 * loss:.2g} %"]
    if what == "hybrid_advice":
        advice = hybrid_advice(net, inputs)
        used = advice.layers[0].used_ratio
        assert used is not None
        return advice, ["Net: advice", f"{used:.2f}"]
    if what == "length_profile":
        over = length_profile(net, inputs, lengths=[8, 32])
        sizes = [at.effective_size for at in over.layers[0].lengths]
        assert None not in sizes
        return over, ["Net, tau 0.001", *(f"{size:.3g}" for size in sizes)]
    if what == "shots_profile":
        shots = shots_profile(net, [inputs[0, -8:], inputs[0]], question=8)
        return shots, ["a question of 8 tokens", *(f"{at.effective_size:.3g}" for at in shots.layers[0].at)]
    at = state_modulation(net, inputs, separators=[0], tolerances=[0.1])
    ratio = at.layers[0].modulation[0].ratio
    assert ratio is not None
    return at, ["Net: state modulation at 0", "tau 0.1", f"{ratio:.2f}"]


@pytest.mark.parametrize(
    "what",
    [
        "minimal_state", "compressibility", "reduce", "hybrid_advice", "length_profile", "shots_profile",
        "state_modulation",
    ],
)  # fmt: skip
def test_a_result_is_a_table_with_its_numbers(what: str) -> None:
    result, shown = measured(what)
    check_forms(result, [NAME, "odd.lstm", "skipped", *map(str, shown)])
    assert repr(result).startswith(f"{type(result).__name__}(model='Net'")


def test_a_study_is_a_table_of_its_correlations(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_log(tmp_path / name / "events.jsonl", rescued_run())
    study = load_study(tmp_path, metric="accuracy", resamples=10)
    lines = str(study).splitlines()
    assert lines[0].strip() == "3 runs"
    assert all(name in str(study) for name in ("r with accuracy", *(each.quantity for each in study.correlations)))
    assert all(line in " ".join(str(study).split()) for line in study.notes)
    assert study._repr_html_().startswith("<pre")


def test_a_model_of_which_nothing_became_smaller_needs_no_other_arguments() -> None:
    kept = LayerReduction(layer="a", status="skipped", message="is attention")
    shown = str(Reduction(model="<b>", state=4, layers=(kept,)))
    assert "<b>: states of 4" in shown
    assert "is attention" in shown
    assert "build the model" not in shown


def test_a_number_that_is_not_known_is_a_dash() -> None:
    advice = HybridAdvice(
        model="Net", tolerance=0.1, tolerance_scale="output", layers=(LayerAdvice(layer="a", status="ok"),)
    )
    row = next(line for line in str(advice).splitlines() if line.split()[:1] == ["a"])
    assert row.split() == ["a", "other", *6 * ["-"]]


def test_a_layer_without_a_result_has_its_reason() -> None:
    failed = LayerAdvice(layer=NAME, status="failed", message="singular [/bold] values")
    advice = HybridAdvice(model="Net", tolerance=0.1, tolerance_scale="output", layers=(failed,))
    check_forms(advice, [NAME, "failed", "[/bold]"])
