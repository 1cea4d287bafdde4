"""`ess-monitor alerts export`, as a user's shell sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ess_monitor.alerts import AlertsConfig, render
from ess_monitor.cli import main as cli

Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def alerts_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """Exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ess-monitor", "alerts", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return code if isinstance(code, int) else 0, *capsys.readouterr()

    return run


def test_the_files_are_written_and_listed(alerts_export: Export, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    status, output, errors = alerts_export(target)
    assert (status, errors) == (0, "")
    expected = render(AlertsConfig())
    assert output.splitlines() == [str(target / name) for name in sorted(expected)]
    assert {name: (target / name).read_text(encoding="utf-8") for name in expected} == expected


def test_job_and_thresholds_are_those_of_the_command_line(alerts_export: Export, tmp_path: Path) -> None:
    status, _, errors = alerts_export(
        tmp_path, "--job", "llm", "--set", "stalled_seconds=3600", "--set", "overhead_ratio=0.02"
    )
    assert (status, errors) == (0, "")
    text = (tmp_path / "prometheus/ess_monitor.rules.yml").read_text()
    rules = {rule.get("alert"): rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]}
    assert 'ess_monitor_last_step_timestamp_seconds{job="llm"} > 3600' in rules["EssMonitorRunStalled"]["expr"]
    assert "} > 0.02 and on (" in rules["EssMonitorOverheadHigh"]["expr"]
    assert 'job="ess_monitor"' not in text


def test_a_file_that_differs_stays_unless_overwriting_is_asked_for(alerts_export: Export, tmp_path: Path) -> None:
    edited = tmp_path / "alertmanager/alertmanager.yml"
    edited.parent.mkdir()
    edited.write_text("route: {receiver: mine}\n")
    status, output, errors = alerts_export(tmp_path)
    assert (status, output) == (2, "")
    assert "alertmanager/alertmanager.yml" in errors
    assert "--overwrite" in errors
    assert list(tmp_path.iterdir()) == [edited.parent]
    assert alerts_export(tmp_path, "--overwrite")[0] == 0
    assert "ess-monitor-page" in edited.read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "stalled_seconds"], "expected NAME=VALUE"),
        (["--set", "=3"], "expected NAME=VALUE"),
        (["--set", "stalled_secs=3"], "stalled_secs: no such setting; did you mean stalled_seconds?"),
        (["--set", "overwrite=true"], "overwrite: no such setting"),
        (["--set", "stalled_seconds=soon"], "got 'soon'"),
        (["--set", "stalled_seconds=1", "--set", "stalled_seconds=2"], "stalled_seconds: given twice"),
        (["--job", "a", "--set", "job=b"], "job: given twice"),
        (["--job", "a b"], "job: "),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_writes_nothing(
    alerts_export: Export, tmp_path: Path, arguments: list[str], named: str
) -> None:
    status, output, errors = alerts_export(tmp_path, *arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert named in errors
    assert list(tmp_path.iterdir()) == []
