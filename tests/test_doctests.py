"""The examples in docstrings and in the documentation do what they say, and the glossary is complete."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from ess_monitor.exporters.prometheus.collector import SnapshotCollector
from ess_monitor.exporters.scalars import LAYER_QUANTITIES
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import ACTION_OUTCOMES, ACTIONS, CONDITIONS, Reading, RunInfo, Status

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FENCE = re.compile(r"^```python\n(# runs\n.*?)^```", re.MULTILINE | re.DOTALL)
"""A fence that starts with this comment is a whole program; the others are fragments."""


def _modules() -> list[str]:
    """Every module of the package under the name it is installed as."""
    names = []
    for folder in ("ess_monitor", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("ess_monitor", "integrations") or parts[-1] == "__main__":
                continue
            parts = parts if parts[0] == "ess_monitor" else ("ess_monitor", *parts)
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def _programs() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        (f"{page.relative_to(ROOT).as_posix()}-{number}", program)
        for page in pages
        if page.exists()
        for number, program in enumerate(FENCE.findall(page.read_text()), start=1)
    ]


@pytest.mark.parametrize("name", _modules())
def test_module_imports_and_its_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the captured output"


@pytest.mark.parametrize("name", [name for name in _modules() if "alerts" not in name])
def test_examples_do_not_depend_on_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor's kernels round otherwise: here by a few units in the last place, of the largest value."""
    generator = torch.Generator().manual_seed(0)

    def noisy(values: torch.Tensor) -> torch.Tensor:
        scale = 8 * torch.finfo(values.dtype).eps * values.abs().amax() if values.numel() else 0.0
        return values + scale * torch.randn(values.shape, generator=generator, dtype=values.dtype)

    svdvals, eigvalsh, qr = torch.linalg.svdvals, torch.linalg.eigvalsh, torch.linalg.qr
    exp = torch.Tensor.exp
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *a, **k: noisy(svdvals(*a, **k)).abs())
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda *a, **k: noisy(eigvalsh(*a, **k)))
    monkeypatch.setattr(torch.linalg, "qr", lambda *a, **k: torch.return_types.linalg_qr(map(noisy, qr(*a, **k))))
    monkeypatch.setattr(torch.Tensor, "exp", lambda *a: exp(*a) * (1 + torch.finfo(a[0].dtype).eps))
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} examples print what rounding decides: round it, see the output"


@pytest.mark.parametrize("program", [pytest.param(text, id=name) for name, text in _programs()])
def test_program_of_the_documentation_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "<documentation>", "exec"), {"__name__": "__main__"})


def _glossary(section: str) -> list[str]:
    """The names in the first column of the tables under one heading of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_glossary_has_exactly_the_metrics_of_the_prometheus_endpoint() -> None:
    registry = CollectorRegistry()
    run = RunInfo(run_name="run", model="Model", layers=())
    registry.register(SnapshotCollector(run, RunCounters(()).snapshot))
    lines = generate_latest(registry).decode().splitlines()
    exported = [line.split()[2].removeprefix("ess_monitor_") for line in lines if line.startswith("# TYPE")]
    assert sorted(_glossary("Prometheus")) == sorted(exported)


def test_glossary_explains_every_number_of_a_reading() -> None:
    explained = {*_glossary("Sizes of a layer"), *_glossary("Ratios of a layer")}
    assert explained <= set(Reading.model_fields)
    assert {*LAYER_QUANTITIES, "per_head", "per_position", "attainable_size"} <= explained


def test_glossary_explains_every_status_and_condition() -> None:
    assert sorted(_glossary("Statuses of a reading")) == sorted(get_args(Status))
    assert sorted(_glossary("Conditions of a layer")) == sorted(CONDITIONS)


def test_glossary_explains_every_action_and_outcome() -> None:
    assert sorted(_glossary("Actions of the autopilot")) == sorted(ACTIONS)
    assert sorted(_glossary("Outcomes of an action")) == sorted(ACTION_OUTCOMES)
