"""What is pinned is all that is required, and the audit of it says what it found and what it could not look up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.scripts import load_script

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LINES = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
PINS = [Requirement(line) for line in LINES if line]


def required() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    here = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [each for each in here if each.name != "ess-monitor"]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    return load_script(ROOT / ".ci" / "audit.py")


def fake_pip_audit(folder: Path, vulnerable: tuple[str, ...]) -> str:
    """A program that answers as pip-audit does: it knows these names to be vulnerable, and `torch` not at all."""
    program = folder / "pip-audit"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "arguments = dict(zip(sys.argv, sys.argv[1:]))\n"
        "found = []\n"
        "for line in open(arguments['--requirement']):\n"
        "    name, _, version = line.strip().partition('==')\n"
        "    item = {'name': name, 'version': version, 'vulns': []}\n"
        f"    if name in {vulnerable!r}:\n"
        "        item['vulns'] = [{'id': 'CVE-1', 'fix_versions': ['9.9']}]\n"
        "    found.append({'name': name, 'skip_reason': 'not found'} if name == 'torch' else item)\n"
        "open(arguments['--output'], 'w').write(json.dumps({'dependencies': found}))\n"
    )
    program.chmod(0o755)
    return str(program)


def test_every_requirement_is_pinned_and_every_pin_is_exact() -> None:
    pinned = {canonicalize_name(each.name) for each in PINS}
    assert {each.name for each in required() if canonicalize_name(each.name) not in pinned} == set()
    assert [str(each) for each in PINS if [one.operator for one in each.specifier] != ["=="]] == []


def test_every_pin_is_within_the_range_that_users_are_given() -> None:
    pins = {canonicalize_name(each.name): next(iter(each.specifier)).version for each in PINS}
    outside = [str(each) for each in required() if not each.specifier.contains(pins[canonicalize_name(each.name)])]
    assert outside == []


def test_the_audit_reads_the_pins_of_this_machine(audit: ModuleType) -> None:
    pins = audit.pins()
    assert pins["torch"]
    assert set(pins) <= {canonicalize_name(each.name) for each in PINS}
    assert audit.installed().keys() >= {"torch", "pydantic"}
    assert not any("+" in version for version in audit.installed().values())


def run(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(audit, "withdrawn", list)
    monkeypatch.setattr(audit, "installed", audit.pins)
    monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
    code: int = audit.main()
    return code


def test_a_known_vulnerability_fails_the_audit(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = fake_pip_audit(tmp_path, ("jinja2", "rich"))
    assert run(audit, monkeypatch, "--pip-audit", program, "--offline-is-fine") == 1
    said = capsys.readouterr().out
    assert f"WRONG: vulnerable: rich=={audit.pins()['rich']}: CVE-1, fixed in 9.9" in said
    assert "NOT CHECKED: vulnerabilities of torch" in said


def test_a_service_that_finds_the_canary_harmless_is_not_believed(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = fake_pip_audit(tmp_path, ())
    assert run(audit, monkeypatch, "--pip-audit", program) == 2
    assert "NOT CHECKED: vulnerabilities" in capsys.readouterr().out
    assert run(audit, monkeypatch, "--pip-audit", program, "--offline-is-fine") == 0


def test_without_pip_audit_it_is_said_that_nothing_was_looked_up(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(audit, monkeypatch, "--pip-audit", str(tmp_path / "none"), "--offline-is-fine") == 0
    assert "NOT CHECKED: vulnerabilities" in capsys.readouterr().out


def test_a_pin_that_was_yanked_or_is_not_installed_fails_the_audit(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "installed", lambda: {**audit.pins(), "rich": "0.1"})
    monkeypatch.setattr(audit, "withdrawn", lambda: ["rich==15.0.0"])
    monkeypatch.setattr(sys, "argv", ["audit.py", "--pip-audit", "none", "--offline-is-fine"])
    assert audit.main() == 1
    said = capsys.readouterr().out
    assert "rich 0.1, not" in said
    assert "yanked by its authors: rich==15.0.0" in said


def test_what_the_index_has_yanked_is_read_from_pips_report(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"metadata": {"name": name, "version": "1"}, "is_yanked": name == "b"} for name in "ab"]

    def pip(command: list[str]) -> int:
        Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": items}))
        return 0

    monkeypatch.setattr(audit, "_run", pip)
    assert audit.withdrawn() == ["b==1"]
    monkeypatch.setattr(audit, "_run", lambda command: 1)
    assert audit.withdrawn() is None
