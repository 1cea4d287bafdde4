"""The examples of docs/extending.md are complete and short. tests/test_doctests.py runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.test_doctests import FENCE

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
LINES_OF_AN_EXAMPLE = 40
SECTIONS = ["A layer of your own", "A library's layer", "An exporter", "A rule", "A remedy", "An alert"]


def examples() -> dict[str, str]:
    """Section -> its program, without the comment that says that it runs."""
    sections = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    return {title: "\n".join(FENCE.findall(text)[0].splitlines()[1:]) for title, text in found.items()}


def test_there_is_one_program_for_everything_that_is_extended() -> None:
    assert list(examples()) == SECTIONS
    assert len(FENCE.findall(PAGE)) == len(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_is_short(title: str) -> None:
    assert len(examples()[title].splitlines()) <= LINES_OF_AN_EXAMPLE


@pytest.mark.servers
def test_prometheus_accepts_the_alert_of_the_example(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    assert promtool is not None
    scope: dict[str, str] = {}
    exec(compile(examples()["An alert"], "<documentation>", "exec"), scope)
    path = tmp_path / "rules.yml"
    path.write_text(scope["rules"], encoding="utf-8")
    assert yaml.safe_load(scope["rules"])["groups"][0]["rules"][0]["alert"] == "EssMonitorBudgetSpent"
    subprocess.run([promtool, "check", "rules", str(path)], check=True, capture_output=True)
