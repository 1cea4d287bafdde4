"""The pictures of the documentation: each is shown, small, and made by the script that says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.gallery import IMAGES, PICTURES, ROOT

GALLERY = ROOT / "docs" / "gallery.md"


def test_the_gallery_shows_every_picture_with_a_command() -> None:
    text = GALLERY.read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(images/([\w-]+)\.png", text)
    assert sorted(shown) == sorted(path.stem for path in IMAGES.iterdir())
    made = {name: [each for each in shown if each.startswith(name)] for name in PICTURES}
    assert all(made.values()), "the script makes nothing that is not shown"
    assert {each for several in made.values() for each in several} == {*shown}, "and all that is"
    for section in text.split("\n## ")[1:]:
        assert re.search(r"\n    \S|```python", section), "each with a command"


@pytest.mark.parametrize("path", sorted(IMAGES.iterdir()), ids=lambda path: path.name)
def test_a_picture_is_a_small_file(path: Path) -> None:
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size < 150_000
