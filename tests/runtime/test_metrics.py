"""Numbers of every kind are read; what is none is named once and costs nothing else."""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ess_monitor.runtime import MetricReader


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        Fraction(1, 2),
        Decimal("0.5"),
        np.float16(0.5),
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        np.array([[0.5]], dtype=np.float32),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'shape', '')}",
)
def test_numbers_of_every_kind_are_read(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert MetricReader().read({"accuracy": value, "steps": np.int64(3), "done": np.True_}) == (
        {"accuracy": 0.5, "steps": 3.0, "done": 1.0},
        {},
    )
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensors_of_one_element_are_copied_without_their_graph(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    given = tensor.requires_grad_() * 1 if dtype.is_floating_point else tensor
    numbers, tensors = MetricReader().read({"loss": given})
    read = tensors[torch.device("cpu")]["loss"]
    assert (numbers, read.shape, read.requires_grad, float(read)) == ({}, (), False, 1.0)
    assert read.data_ptr() != given.data_ptr()


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"f1": 1j}, "metric f1 is left out: a complex"),
        ({"f1": "high"}, "metric f1 is left out: a str"),
        ({"f1": 10**400}, "metric f1 is left out: int too large"),
        ({"f1": np.ones(3)}, "metric f1 is left out: a ndarray"),
        ({"f1": np.array(1j)}, "metric f1 is left out: a complex"),
        ({"f1": torch.ones(3)}, r"shape \(3,\)"),
        ({"f1": torch.eye(1).to_sparse()}, "sparse"),
        ({"f1": torch.tensor(1j)}, "complex64"),
        ({"f1": torch.ones((), device="meta")}, "meta"),
        ({"f1": object()}, "metric f1 is left out: a object"),
        ({3: 0.5}, "metric 3 is left out: its name is a int; names are text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_number_is_named_once_and_costs_nothing_else(
    metrics: dict[Any, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = MetricReader()
    for _ in range(3):
        assert reader.read({**metrics, "loss": 2.0}) == ({"loss": 2.0}, {})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(named, record.getMessage())
    reader.read({f"other {k}": "x" for k in range(1000)})
    assert len(caplog.records) == 100, "as many are named and no more"


@pytest.mark.parametrize("metrics", [torch.tensor(1.0), [1.0], 0.5], ids=["tensor", "list", "number"])
def test_what_is_no_mapping_is_said_once(metrics: Any, caplog: pytest.LogCaptureFixture) -> None:
    reader = MetricReader()
    assert reader.read(metrics) == reader.read(metrics) == ({}, {})
    assert [record.getMessage() for record in caplog.records if "no mapping of names to numbers" in record.getMessage()]
    assert len(caplog.records) == 1


def test_a_value_that_is_not_known_yet_is_left_out_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert MetricReader().read({"validation_loss": None, "loss": 1.0}) == ({"loss": 1.0}, {})
    assert MetricReader().read(None) == ({}, {})
    assert caplog.text == ""
