"""The prose of the tree uses the words of docs/glossary.md, and US spelling."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROSE = ("ess_monitor", "integrations", "alerts", "docs", "examples", "benchmarks", "README.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".md", ".html", ".j2", ".yml", ".yaml", ".json", ".toml"}
BANNED = {
    r"\bmend(s|ed|ing)\b": "fix",
    r"utilis": "utiliz",
    r"regularis": "regulariz",
    r"normalis": "normaliz",
    r"initialis": "initializ",
    r"colour": "color",
    r"behaviour": "behavior",
    r"a person must look": "say what to check",
}
"""Pattern -> what to write instead. Case does not matter."""


def _files() -> list[Path]:
    """Every text file of `PROSE` once: links inside the package lead to folders that are listed themselves."""
    files = []
    for name in PROSE:
        root = ROOT / name
        files += [root] if root.is_file() else [path for path in root.rglob("*") if path.suffix in SUFFIXES]
    return sorted({path.resolve() for path in files})


def _glossary() -> dict[str, list[str]]:
    """Heading -> terms, in the order of the page."""
    sections = re.split(r"^## (.+)\n", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)[1:]
    rows = {
        heading: re.findall(r"^\| (.+?) \|", text, re.MULTILINE)
        for heading, text in zip(sections[::2], sections[1::2], strict=True)
    }
    return {
        heading: [term for cell in cells if cell != "term" for term in cell.split(", ")]
        for heading, cells in rows.items()
    }


@pytest.mark.parametrize("pattern", BANNED)
def test_no_banned_word_is_in_the_prose(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip():.120}"
        for path in _files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert not found, f"write {BANNED[pattern]!r} instead:\n" + "\n".join(found)


def test_the_glossary_defines_each_term_once() -> None:
    terms = [term for section in _glossary().values() for term in section]
    assert len(terms) > 40
    assert [term for term, count in Counter(map(str.lower, terms)).items() if count > 1] == []


def test_the_glossary_has_the_words_of_the_metric() -> None:
    terms = {term for section in _glossary().values() for term in section}
    assert terms >= {"operator T", "H_i", "TSS", "tolerance-ESS", "entropy-ESS", "utilization", "retention", "collapse"}
