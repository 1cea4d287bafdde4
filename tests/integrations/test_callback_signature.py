"""What an editor, `help()` and configuration files know of the callbacks' settings."""

from __future__ import annotations

import inspect
import pydoc
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from ess_monitor import ConfigError, MonitorConfig
from ess_monitor.exporters import LogConfig
from ess_monitor.integrations.common import CallbackBase
from ess_monitor.integrations.monitor_settings import MonitorSettings
from ess_monitor.validation.settings import Settings
from tests.programs import run_program

CALLBACKS = [
    import_module(f"ess_monitor.integrations.{name}").ESSMonitorCallback
    for name in ("accelerate", "fabric", "lightning", "transformers")
]
TYPES = get_type_hints(MonitorSettings)


def members(annotation: Any) -> set[Any]:
    """Return the members of a union, without what pydantic adds to a type."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {member for each in get_args(annotation) for member in members(each)}
    return {annotation}


def test_the_keywords_are_the_fields_of_the_settings() -> None:
    assert set(TYPES) == set(MonitorConfig.model_fields) - {"exporters"}, "which takes objects too"
    assert list(TYPES) == [name for name in MonitorConfig.model_fields if name != "exporters"]
    for name, annotation in TYPES.items():
        of_model = members(MonitorConfig.model_fields[name].annotation)
        assert of_model <= members(annotation), name
        if not any(isinstance(each, type) and issubclass(each, Settings) for each in of_model):
            assert of_model == members(annotation), name
        assert f" {name}: " in (MonitorSettings.__doc__ or ""), name


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: callback.__module__.rpartition(".")[2])
def test_the_signature_lists_every_setting_with_its_default(callback: type[CallbackBase]) -> None:
    parameters = inspect.signature(callback).parameters
    assert list(parameters) == ["config", "exporters", "table", "event_log", *TYPES]
    assert {name: parameters[name].default for name in TYPES} == {
        name: getattr(MonitorConfig(), name) for name in TYPES
    }
    assert callback(**{name: each.default for name, each in parameters.items()}).config == MonitorConfig()
    text = pydoc.render_doc(callback, renderer=pydoc.plaintext)
    assert "every_n_steps: int = 100" in text
    assert "every_n_steps: Optimizer steps between two samples." in text
    assert len(max(text.splitlines(), key=len)) < 2500, "defaults of nested settings are not spelt out"


def test_what_load_takes_besides_settings_is_no_setting_of_a_callback(tmp_path: Path) -> None:
    for name in ("path", "environment"):
        with pytest.raises(ConfigError, match=f"^{name}: unknown setting"):
            CallbackBase({name: str(tmp_path)})
    with pytest.raises(ConfigError, match=r"MonitorConfig\.load\(path\)"):
        CallbackBase("ess.yaml")  # type: ignore[arg-type]


def test_keywords_lie_on_top_of_the_configuration_and_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESS_MONITOR_CAPTURE__HEADS", "2")
    config = CallbackBase({"every_n_steps": 7, "tolerance": 0.5}, every_n_steps=9, exporters=["log"]).config
    assert (config.every_n_steps, config.tolerance, config.capture.heads) == (9, 0.5, 2)
    assert config.exporters == (LogConfig(),)


FLAT = """
        every_n_steps: 7
        layers: ['blocks.*']
        positions: midpoint
        autopilot: off
        overhead_budget_ratio: null
        diagnosis: {patience: 9}
        capture: {heads: null, samples: 2}
        exporters: [log, {kind: event_log, path: x.jsonl}]
        table: false
"""
NESTED = """
        config:
          every_n_steps: 7
          layers: ['blocks.*']
          positions: midpoint
          autopilot: off
          overhead_budget_ratio: null
          diagnosis: {patience: 9}
          capture: {heads: null, samples: 2}
          exporters: [log, {kind: event_log, path: x.jsonl}]
        table: false
"""
FILTERED = """
        layers: {include: ['blocks.*'], exclude: ['*.1']}
        autopilot: {mode: auto, lag_steps: 5}
        config: {every_n_steps: 50}
"""
SCRIPT = """
import sys, warnings; warnings.simplefilter('ignore')
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
for name in sys.argv[1:]:
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=['--config', name])
    (ess,) = [c for c in cli.trainer.callbacks if type(c).__name__ == 'ESSMonitorCallback']
    print('CONFIG', ess.table, ess.config)
"""


def test_lightning_cli_takes_flat_and_nested_settings(tmp_path: Path) -> None:
    names = []
    for name, text in (("flat", FLAT), ("nested", NESTED), ("filtered", FILTERED)):
        (tmp_path / f"{name}.yaml").write_text(
            "trainer:\n  logger: false\n  callbacks:\n"
            "    - class_path: ess_monitor.integrations.lightning.ESSMonitorCallback\n"
            f"      init_args:{text}"
        )
        names.append(f"{name}.yaml")
    (tmp_path / "train.py").write_text(SCRIPT)
    out = run_program([tmp_path / "train.py", *names], tmp_path, imports=["pytorch_lightning"], cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    same = MonitorConfig(
        every_n_steps=7,
        layers=["blocks.*"],
        positions="midpoint",
        autopilot="off",
        overhead_budget_ratio=None,
        diagnosis={"patience": 9},
        capture={"heads": None, "samples": 2},
        exporters=["log", {"kind": "event_log", "path": "x.jsonl"}],
    )
    filtered = MonitorConfig(
        every_n_steps=50,
        layers={"include": ["blocks.*"], "exclude": ["*.1"]},
        autopilot={"mode": "auto", "lag_steps": 5},
    )
    seen = [line for line in out.stdout.splitlines() if line.startswith("CONFIG")]
    assert seen == [f"CONFIG False {same}", f"CONFIG False {same}", f"CONFIG True {filtered}"]
