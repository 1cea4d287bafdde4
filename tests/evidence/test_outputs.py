"""The loss and the logits in outputs of several forms, and KL against another formula in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ess_monitor.errors import ConfigError
from ess_monitor.evidence import outputs
from ess_monitor.evidence.outputs import kl_divergence, logits_of, loss_of

LOSS, LOGITS = torch.tensor(2.0), torch.ones(2, 3, 4)
HIDDEN = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("output", "loss", "logits"),
    [
        (SimpleNamespace(loss=LOSS, logits=LOGITS), LOSS, LOGITS),
        ({"loss": LOSS, "logits": LOGITS}, LOSS, LOGITS),
        ({"loss": LOSS.reshape(1)}, LOSS, None),
        ({"loss": torch.ones(2)}, None, None),
        ({"loss": torch.tensor(1)}, None, None),
        ({"loss": torch.tensor(1j)}, None, None),
        ({"loss": 2.0}, None, None),
        ({"loss": None, "logits": HIDDEN}, None, None),
        (LOSS, LOSS, None),
        (LOGITS, None, LOGITS),
        (torch.ones(1, 1), None, torch.ones(1, 1)),
        (LOSS.long(), None, None),
        ((LOSS, LOGITS), None, LOGITS),
        ([HIDDEN, LOGITS, LOGITS + 1], None, LOGITS),
        ((), None, None),
        (None, None, None),
        ("loss", None, None),
    ],
)
def test_forms_of_outputs(output: Any, loss: torch.Tensor | None, logits: torch.Tensor | None) -> None:
    for found, expected in ((loss_of(output), loss), (logits_of(output), logits)):
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_the_outputs_of_a_model_of_transformers() -> None:
    pytest.importorskip("transformers")
    from tests.evidence.models import transformers_model
    from tests.evidence.training import tokens

    model = transformers_model("Llama").net
    output = model(tokens(0), labels=tokens(0))
    assert loss_of(output) is output.loss or torch.equal(loss_of(output), output.loss)  # type: ignore[arg-type]
    assert logits_of(output) is output.logits
    assert loss_of(model(tokens(0))) is None
    assert logits_of(model(tokens(0), return_dict=False)).shape == (2, 12, 32)  # type: ignore[union-attr]


def reference(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    classes=st.integers(1, 9),
    elements=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_kl_is_that_of_the_formula_whatever_the_chunks(
    shape: list[int], classes: int, elements: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (3 * torch.randn(*shape, classes, generator=generator) for _ in range(2))
    before = outputs.ELEMENTS_OF_A_CHUNK
    outputs.ELEMENTS_OF_A_CHUNK = elements
    try:
        found = kl_divergence(a, b)
        transposed = kl_divergence(a.mT.contiguous().mT, b) if len(shape) else found
    finally:
        outputs.ELEMENTS_OF_A_CHUNK = before
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(reference(a, b), rel=1e-4, abs=1e-6)
    assert transposed.item() == pytest.approx(found.item(), rel=1e-5, abs=1e-7)
    assert kl_divergence(a, a).item() == 0.0


def test_kl_of_low_precision_logits_is_computed_in_float32() -> None:
    a, b = torch.randn(2, 2, 50, 20, dtype=torch.float64).bfloat16()
    assert kl_divergence(a, b).item() == pytest.approx(reference(a, b), rel=1e-5)


def test_classes_that_are_masked_out_in_both_count_nothing() -> None:
    a, b = torch.randn(2, 5, 4)
    masked_a, masked_b = (torch.cat([x, torch.full((5, 2), -torch.inf)], -1) for x in (a, b))
    assert kl_divergence(masked_a, masked_b).item() == pytest.approx(kl_divergence(a, b).item(), rel=1e-6)
    assert kl_divergence(a, a.masked_fill(a == a.max(), -torch.inf)).item() == torch.inf


def test_no_more_memory_than_some_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = torch.Tensor.log_softmax

    def watched(self: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(self.numel())
        return original(self, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", watched)
    monkeypatch.setattr(outputs, "ELEMENTS_OF_A_CHUNK", 1000)
    kl_divergence(torch.randn(3, 40, 100), torch.randn(3, 41, 100)[:, 1:])
    assert max(sizes) == 1000
    assert sum(sizes) == 2 * 3 * 40 * 100


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "of one shape"),
        (torch.ones(()), torch.ones(()), "of one shape"),
        (torch.ones(0, 3), torch.ones(0, 3), "at least one element"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), "a is a torch.int64"),
        (torch.ones(2, 3), [1.0], "b is a list"),
    ],
)
def test_what_is_not_two_logits_is_refused(a: Any, b: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kl_divergence(a, b)
