"""Writes the figures of a page as SVG, for documents: `python .ci/pictures.py PAGE FOLDER`. Needs Chromium.

They are the same figures, drawn by the same script, in the light theme; each is named after its place on the page.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

DRAW = """<script>
addEventListener("load", async () => {
  dispatchEvent(new Event("beforeprint"));
  const drawn = [...document.querySelectorAll(".plot")].filter((plot) => plot.querySelector(".main-svg"));
  const size = (plot) => ({ format: "svg", width: 800, height: plot.offsetHeight });
  const pictures = await Promise.all(drawn.map((plot) => Plotly.toImage(plot, size(plot))));
  document.documentElement.dataset.pictures = JSON.stringify(pictures);
});
</script>"""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def write(page: Path, folder: Path) -> list[Path]:
    """Write every figure of a page that is not folded away; return the files."""
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        sys.exit("pictures: Chromium is not on PATH")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: DRAW, page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "page.html")
        copy.write_text(text, encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={temporary}/profile"]
        options += ["--blink-settings=preferredColorScheme=1", "--virtual-time-budget=20000", "--dump-dom"]
        answer = subprocess.run([browser, *options, copy.as_uri()], capture_output=True, text=True, check=True)
    found = re.search(r'data-pictures="([^"]*)"', answer.stdout)
    assert found is not None, answer.stderr
    folder.mkdir(parents=True, exist_ok=True)
    pictures = re.findall(r'"data:image/svg\+xml,(.*?)"', html.unescape(found[1]))
    paths = [folder / f"{page.stem}-{number}.svg" for number in range(1, len(pictures) + 1)]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_text(urllib.parse.unquote(picture), encoding="utf-8")
    return paths


if __name__ == "__main__":
    print(*write(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
