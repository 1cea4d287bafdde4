"""One mistake in a setting is one kind of error, whatever the door, and says what to do."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

import ess_monitor
from ess_monitor import AutopilotConfig, CaptureConfig, ConfigError, LayerFilter, MonitorConfig, describe
from ess_monitor.alerts import AlertsConfig
from ess_monitor.alerts import export as export_alerts
from ess_monitor.exporters import PrometheusConfig
from ess_monitor.exporters.prometheus.auth import AuthConfig
from ess_monitor.featurizers import BackboneConfig
from ess_monitor.integrations.common import CallbackBase
from ess_monitor.validation.settings import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("ESS_MONITOR_"):
            monkeypatch.delenv(name)


class Mistake(NamedTuple):
    settings: dict[str, Any]
    message: str


MISTAKES = [
    Mistake({"every_n_steps": 0}, r"^every_n_steps: must be greater than 0 \(got 0\)$"),
    Mistake({"every_n_steps": "often"}, r"^every_n_steps: must be a valid integer \(got 'often'\)$"),
    Mistake({"positions": "middle"}, r"^positions: must be 'midpoint' or 'all', or a valid integer \(got 'middle'\)$"),
    Mistake({"strict": "perhaps"}, r"^strict: must be true or false \(got 'perhaps'\)$"),
    Mistake({"capture": 5}, r"^capture: must be a mapping of settings \(got 5\)$"),
    Mistake({"layers": 5}, r"^layers: must be a pattern, a list of patterns, or include and exclude \(got 5\)$"),
    Mistake({"every_n_steps": 10**5000}, r"^every_n_steps: a whole number of more than 64 bits"),
    # misspelt, or in another place
    Mistake({"every_n_step": 5}, r"^every_n_step: unknown setting; did you mean every_n_steps\?$"),
    Mistake({"overhead_budget": 0.1}, r"did you mean overhead_budget_ratio\?$"),
    Mistake({"capture": {"sample": 3}}, r"^capture\.sample: unknown setting; did you mean capture\.samples\?$"),
    Mistake({"samples": 3}, r"^samples: unknown setting; did you mean capture\.samples\?$"),
    Mistake({"lag_step": 3}, r"did you mean autopilot\.lag_steps\?$"),
    Mistake({"autopilot_mode": "auto"}, r"did you mean autopilot\.mode\?$"),
    Mistake({"autopilot": {"probation": {"harm": 1}}}, r"^autopilot\.probation\.harm: .*see ProbationConfig"),
    Mistake({"capture": {"every_n_steps": 3}}, r"did you mean every_n_steps at the top level\?$"),
    Mistake({"capture.samples": 3}, r'nest it: \{"capture": \{"samples": \.\.\.\}\}$'),
    Mistake({"port": 3}, r'did you mean \{"kind": "prometheus", "port": \.\.\.\} in exporters\?$'),
    Mistake({"exporters": [{"kind": "event_log", "pth": "x"}]}, r"^exporters\.0\.pth: .*you mean exporters\.0\.path"),
    Mistake({"nothing_like_it": 1}, r"^nothing_like_it: unknown setting; see MonitorConfig for the names$"),
    # what depends on each other
    Mistake(
        {"every_n_steps": 5, "autopilot": "auto"},
        r"^every_n_steps=5 must be above autopilot\.lag_steps=10 \(the default\): in mode auto .*"
        r"set every_n_steps=11 or more, or set autopilot\.lag_steps=4$",
    ),
    Mistake(
        {"autopilot": {"mode": "auto", "lag_steps": 500}},
        r"^autopilot\.lag_steps=500 must be below every_n_steps=100 \(the default\): .*lag_steps=99$",
    ),
    Mistake({"every_n_steps": 1, "distributed": {"ranks": 2}}, r"with distributed\.ranks=2 .*steps=11 or more$"),
    # modes and kinds
    Mistake({"autopilot": True}, r"^autopilot: must be 'off', 'advise' or 'auto', or a mapping .*\(got True\)$"),
    Mistake({"autopilot": None}, r"^autopilot: must be 'off', 'advise' or 'auto', or a mapping .*\(got None\)$"),
    Mistake({"autopilot": "on"}, r"^autopilot\.mode: must be 'off', 'advise' or 'auto' \(got 'on'\)$"),
    Mistake({"autopilot": {"mode": True}}, r"^autopilot\.mode: must be 'off', 'advise' or 'auto' \(got True\)$"),
    Mistake({"exporters": ["wandb"]}, r"^exporters\.0: wandb .*trainer's own logger.*report_to.*log_with.*prometheus"),
    Mistake({"exporters": ["terminal", "mlflow"]}, r"^exporters\.1: mlflow .*trainer's own logger"),
    Mistake({"exporters": ["promethus"]}, r"'promethus'; did you mean prometheus\? the kinds are prometheus, push"),
    Mistake({"exporters": [{"port": 1}]}, r"^exporters\.0: a kind must be given"),
    Mistake({"exporters": [object()]}, r"^exporters\.0: must be a kind, .*a object; the kinds are"),
]  # fmt: skip


def doors(settings: dict[str, Any]) -> Iterator[Any]:
    yield lambda: MonitorConfig(**settings)
    yield lambda: MonitorConfig.load(**settings)
    yield lambda: MonitorConfig.model_validate(settings)
    yield lambda: CallbackBase(config=settings)
    if "exporters" not in settings:  # the callback takes objects too, and counts them apart
        yield lambda: CallbackBase(**settings)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.message)
def test_a_mistake_is_the_same_error_at_every_door(mistake: Mistake) -> None:
    for door in doors(mistake.settings):
        with pytest.raises(ConfigError, match=mistake.message) as refused:
            door()
        assert refused.value.__cause__ is None
        assert "pydantic" not in str(refused.value)


def test_json_and_positional_settings_are_refused_in_the_same_way() -> None:
    with pytest.raises(ConfigError, match=r"^every_n_steps: must be greater than 0"):
        MonitorConfig.model_validate_json('{"every_n_steps": 0}')
    with pytest.raises(ConfigError, match=r"^Invalid JSON.*column \d+$") as refused:
        MonitorConfig.model_validate_json('{"password": hunter2}')
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"MonitorConfig takes its settings by name: MonitorConfig\(name=value\)"):
        MonitorConfig({"every_n_steps": 5})  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CaptureConfig(sample=3), r"^sample: unknown setting; did you mean samples\?$"),
        (lambda: CaptureConfig(samples=0), r"^samples: must be greater than or equal to 1 \(got 0\)$"),
        (lambda: LayerFilter(included=["a"]), r"did you mean include\?$"),
        (lambda: LayerFilter.model_validate(3), r"^must be a pattern"),
        (lambda: AutopilotConfig(strengths=()), r"^strengths: must have at least 1 item, not 0"),
        (lambda: AutopilotConfig(strengths=(0,)), r"^strengths=\(0\.0,\): every lambda must be above 0$"),
        (lambda: BackboneConfig(), r"^vocab_size: must be given$"),
        (
            lambda: BackboneConfig(vocab_size=3, mixer_options={"beta": "x"}),
            r"^mixer_options\.beta: must be a valid",
        ),
        (lambda: PrometheusConfig(prt=1), r"did you mean port\?$"),
        (lambda: AlertsConfig(stalled_second=1), r"did you mean stalled_seconds\?$"),
        (lambda: export_alerts("/nowhere", stalled_second=1), r"did you mean stalled_seconds\?$"),
    ],
)
def test_settings_of_a_part_are_refused_in_the_same_way(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_no_error_shows_what_may_be_a_secret() -> None:
    for settings in ({"username": "a:hunter2", "secret_env": "X"}, {"username": ["hunter2"]}, {"password": "hunter2"}):
        with pytest.raises(ConfigError) as refused:
            AuthConfig(**settings)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"^run_name: must be a valid string \(got a dict\)$"):
        MonitorConfig(run_name={"password": "hunter2"})
    with pytest.raises(ConfigError) as refused:
        MonitorConfig(exporters=["http://user:hunter2@gateway:9091"])
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EVERY_N_STEP", "did you mean ESS_MONITOR_EVERY_N_STEPS"),
        ("SAMPLES", "did you mean ESS_MONITOR_CAPTURE__SAMPLES"),
        ("PORT", "comes one of autopilot, capture"),
        ("CAPTURE__SAMPLE", "did you mean capture.samples"),
        ("NOTHING_LIKE_IT", "comes one of autopilot, capture"),
    ],
)
def test_a_misspelt_variable_is_told_its_name(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ESS_MONITOR_{name}", "3")
    with pytest.raises(ConfigError, match=meant):
        MonitorConfig.load()


def test_a_bare_off_of_yaml_is_the_mode(tmp_path: Path) -> None:
    for text in ("autopilot: off", "autopilot: {mode: off}", "autopilot: 'off'"):
        path = tmp_path / "ess.yaml"
        path.write_text(text)
        assert MonitorConfig.load(path).autopilot == AutopilotConfig(mode="off")


def test_all_settings_are_of_the_one_class() -> None:
    others = []
    for module in pkgutil.walk_packages(ess_monitor.__path__, "ess_monitor."):
        if module.name.endswith("__main__"):
            continue
        for name, each in vars(importlib.import_module(module.name)).items():
            if isinstance(each, type) and issubclass(each, BaseModel) and name.endswith(("Config", "Filter")):
                others += [] if issubclass(each, Settings) else [f"{module.name}.{name}"]
    assert others == []


def test_the_filter_of_describe_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="layers"):
        describe(ess_monitor.featurizers.GLA(16, 2), layers=LayerFilter(include=("nothing",)))


def test_one_exporter_that_is_no_list_is_told_how_to_write_one() -> None:
    with pytest.raises(ConfigError, match=r"^exporters: must be a list: put it into brackets, \[\.\.\.\]"):
        MonitorConfig(exporters="prometheus")  # type: ignore[arg-type]
