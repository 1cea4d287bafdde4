"""What reads logs and writes rules, and every help, is there without torch; and a public name is there at its use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ess_monitor
from tests.report.helpers import rescued_run, write_log

PROGRAM = """
import json, sys
from ess_monitor.cli.main import main

seen = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        seen[" ".join(arguments)] = (end.code, "torch" in sys.modules)
print(json.dumps(seen), file=sys.stderr)
"""


def test_commands_that_need_no_model_do_not_load_torch(tmp_path: Path) -> None:
    logs = [write_log(tmp_path / name / "events.jsonl", rescued_run()) for name in ("a", "b")]
    commands = [
        [],
        *(
            [command]
            for command in (
                "describe",
                "profile",
                "minimal-state",
                "distill-check",
                "reduce",
                "study",
                "hybrid-advice",
                "report",
                "compare",
                "alerts",
            )
        ),
    ]
    commands = [[*command, "--help"] for command in [*commands, ["profile", "model"], ["profile", "featurizers"]]]
    commands += [["--version"], ["report", str(logs[0])], ["compare", *map(str, logs), "-o", str(tmp_path / "c.html")]]
    commands += [["study", str(tmp_path), "--metric", "accuracy"]]
    commands += [["alerts", "export", str(tmp_path / "alerts")], ["report", str(tmp_path / "nothing")]]
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    seen = json.loads(answer.stderr.splitlines()[-1])
    assert len(seen) == len(commands)
    assert {name for name, (_, has_torch) in seen.items() if has_torch} == set()
    assert {name.split()[0] for name, (code, _) in seen.items() if code} == {"report"}, "the log that is not there"


def test_every_public_name_and_package_is_there_and_no_other() -> None:
    assert set(ess_monitor.__all__) <= set(dir(ess_monitor))
    for name in ess_monitor.__all__:
        assert getattr(ess_monitor, name).__name__ == name
    for package in ("ess", "exporters", "report", "records", "featurizers"):
        assert getattr(ess_monitor, package).__name__ == f"ess_monitor.{package}"
    for name in ("Monitr", "_private", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(ess_monitor, name)
