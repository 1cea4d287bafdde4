"""`make fuzz` fails when it had fewer inputs than is promised, and says nothing of it when a part was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROFILES = """
import os
import hypothesis
hypothesis.settings.register_profile("local", database=None)
hypothesis.settings.register_profile("long", database=None)
hypothesis.settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])
"""
TEST = """
from hypothesis import given, strategies as st
from fuzz.inputs import RAN, fuzz

RAN["before"] = {ran}

@fuzz(1, 5)
@given(number=st.integers())
def test_nothing(number): pass

def test_other(): pass
"""
TOO_FEW = "fewer than 100,000 inputs"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "fuzz"
    folder.mkdir()
    for name in ("__init__.py", "conftest.py", "inputs.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    (tmp_path / "conftest.py").write_text(PROFILES)
    (folder / "test_a.py").write_text(TEST.format(ran=0))
    (folder / "test_b.py").write_text("def test_nothing(): pass\n")
    return tmp_path


def run(project: Path, *arguments: str, profile: str = "long") -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={project}", *arguments]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": profile, "PYTHONPATH": str(project)}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("fuzz", "--hypothesis-show-statistics"), ()])
def test_too_few_inputs_of_all_tests_are_a_failure(project: Path, arguments: tuple[str, ...]) -> None:
    code, said = run(project, *arguments)
    assert (code, TOO_FEW in said, "3 passed" in said) == (1, True, True), said


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuzz", "-k", "nothing"),
        ("fuzz", "--deselect", "fuzz/test_b.py"),
        ("fuzz", "--ignore", "fuzz/test_b.py"),
        ("fuzz/test_a.py",),
        ("fuzz/test_a.py::test_nothing", "fuzz/test_b.py"),
        ("fuzz", "--collect-only"),
    ],
)
def test_a_part_of_the_tests_may_have_few(project: Path, arguments: tuple[str, ...]) -> None:
    code, said = run(project, *arguments)
    assert (code, TOO_FEW in said) == (0, False), said


def test_the_usual_profile_may_have_few(project: Path) -> None:
    code, said = run(project, "fuzz", profile="local")
    assert (code, TOO_FEW in said) == (0, False), said


@pytest.mark.parametrize(("ran", "failed"), [(99_990, True), (100_000, False)])
def test_it_is_the_number_that_counts(project: Path, ran: int, failed: bool) -> None:
    (project / "fuzz" / "test_a.py").write_text(TEST.format(ran=ran))
    code, said = run(project, "fuzz")
    assert (code, TOO_FEW in said) == (int(failed), failed), said


def test_a_failure_of_another_kind_keeps_its_exit_status(project: Path) -> None:
    (project / "fuzz" / "test_b.py").write_text("import sys\ndef test_nothing(): raise KeyboardInterrupt\n")
    code, _ = run(project, "fuzz")
    assert code == pytest.ExitCode.INTERRUPTED
