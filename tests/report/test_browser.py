"""The pages in a real browser: as wide as the screen, dark in the dark, quiet on the network."""

from __future__ import annotations

import json
import re
import runpy
from html import escape, unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ess_monitor.analysis import LayerMinimalState, MinimalStates, StateError
from ess_monitor.report import load_history, render_comparison, render_minimal_state, render_report
from tests.browser import THEMES, Browser, fresh_picture
from tests.devtools import page_in
from tests.report.helpers import HOSTILE, rescued_run, run_info, write_log

WIDTHS = (400, 1200)

PROBE = """<script>
addEventListener("load", async () => {
  dispatchEvent(new Event("beforeprint"));  // draws what is out of view too
  await new Promise(done => setTimeout(done, 1000));
  const page = document.documentElement;
  const focusable = [...document.querySelectorAll("a[href], summary, [tabindex='0']")].filter(e => e.checkVisibility());
  const reached = focusable.filter(element => { element.focus(); return document.activeElement === element; });
  parent.document.documentElement.dataset.probe = JSON.stringify({
    inner: innerWidth, width: page.scrollWidth, requests: performance.getEntriesByType("resource").length,
    focusable: focusable.length, reached: reached.length, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ground: getComputedStyle(document.body).backgroundColor, title: document.title,
    undrawn: [...document.querySelectorAll(".plot:not(:has(.main-svg))")].filter(e => e.checkVisibility()).length,
    plots: [...document.querySelectorAll(".plot:has(.main-svg)")].map(plot => plot.getBoundingClientRect().width),
    ink: [...document.querySelectorAll(".xtick text")].map(text => text.style.fill),
    traces: document.querySelectorAll(".plot .heatmaplayer image, .plot .scatterlayer .trace").length,
    rows: [...document.querySelectorAll(".scroll tbody th")].filter(e => e.checkVisibility()).map(e => e.clientHeight),
    areas: [...document.querySelectorAll(".nsewdrag")].map(area => area.getBoundingClientRect().width),
  });
});
</script>"""
"""Runs in a copy of the page without its content policy, which would not let any script run."""

CONTROLS = """<script>
addEventListener("load", () => {
  dispatchEvent(new Event("beforeprint"));
  const heat = document.querySelector(".plot"), order = document.querySelector("[data-order]");
  const filter = document.getElementById("filter"), tick = document.querySelector("[data-logarithmic]");
  const seen = () => ({
    rows: heat.data[0].y, values: heat.data[0].z.map(row => row[5]), marked: heat.data[1].y.filter(name => name),
    cards: [...document.querySelectorAll(".card[data-layer]")].filter(card => !card.hidden).length,
    axis: tick.closest("figure").querySelector(".plot").layout.yaxis.type,
  });
  const before = seen();
  order.value = "the model";
  tick.checked = true;
  for (const control of [order, tick]) control.dispatchEvent(new Event("change"));
  const ordered = seen();
  filter.value = " LAYERS.12 ";
  filter.dispatchEvent(new Event("input"));
  parent.document.documentElement.dataset.probe = JSON.stringify({ before, ordered, filtered: seen() });
});
</script>"""
"""Uses the controls of a report one after the other."""

BUTTONS = """(() => {
  const buttons = document.querySelector(".modebar"), legend = document.querySelector(".legend");
  return buttons && legend && JSON.stringify([...[buttons, legend].map(each => each.getBoundingClientRect()),
    getComputedStyle(buttons.querySelector("path")).fill]);
})()"""
"""Where the buttons and the legend of the first figure are, once it is drawn, and the color of the buttons."""

FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe style="border: 0; width: {width}px; height: 1800px" srcdoc="{page}"></iframe>"""
"""A window of the browser is never narrower than 500 pixels; a frame is as wide as a telephone."""

pytestmark = pytest.mark.servers


@pytest.fixture
def chromium(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


@pytest.fixture(params=["report", "compare"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run whose layers have the worst names there are."""
    layers = (*HOSTILE, "model.layers.12.a_very_long_name_of_a_module.without_any_space_to_break_it_at.self_attention")
    log = write_log(tmp_path / "events.jsonl", rescued_run(layers), run_info(layers))
    path = tmp_path / f"{request.param}.html"
    history = load_history(log)
    path.write_text(render_report(history) if request.param == "report" else render_comparison(history, history))
    return path


def _probed(browse: Browser, page: Path, width: int, theme: str, probe: str = PROBE) -> dict[str, Any]:
    html, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: probe, page.read_text())
    assert found == 1
    copy = page.with_name(f"probed-{page.name}")
    copy.write_text(FRAME.format(width=width, page=escape(html)))
    dom = browse(copy.as_uri(), "--dump-dom", "--virtual-time-budget=20000", width=width, theme=theme).stdout
    (answer,) = re.findall(r'data-probe="([^"]*)"', dom)
    return dict(json.loads(unescape(answer)))


@pytest.mark.parametrize("theme", sorted(THEMES))
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_screen_and_follows_its_theme(chromium: Browser, page: Path, width: int, theme: str) -> None:
    probe = _probed(chromium, page, width, theme)
    assert probe["inner"] == width
    assert probe["width"] <= width, "something sticks out to the right"
    assert probe["plots"]
    assert probe["undrawn"] == 0
    assert min(probe["plots"]) > 150, "a figure too narrow to read"
    assert probe["areas"][0] > 0.4 * min(width, 1100), "the heat map has the most of the page"
    assert probe["traces"] > 3
    shade = {int(value) for text in probe["ink"] for value in re.findall(r"\d+", text)[:3]}
    assert min(shade) > 140 if theme == "dark" else max(shade) < 120, "text of figures follows the theme"
    assert max(probe["rows"], default=0) < 120, "a name in a table is not broken letter by letter"
    assert probe["dark"] == (theme == "dark")
    channels = [int(value) for value in re.findall(r"\d+", probe["ground"])]
    assert max(channels) < 60 if theme == "dark" else min(channels) > 200
    assert probe["requests"] == 0
    assert probe["reached"] == probe["focusable"] > 10


@pytest.mark.parametrize("theme", THEMES)
def test_buttons_of_figures_can_be_seen_and_cover_no_legend_on_a_telephone(
    chromium: Browser, tmp_path: Path, theme: str
) -> None:
    errors = tuple(StateError(size=size, floor=0.5**size, error=0.6**size) for size in range(4))
    layer = LayerMinimalState(layer="a", status="ok", rank=3, errors=errors)
    (tmp_path / "page.html").write_text(render_minimal_state(MinimalStates(model="Net", layers=(layer,))))
    with page_in(chromium) as page:
        page.open((tmp_path / "page.html").as_uri(), width=390, theme=theme, touched=True)
        buttons, legend, color = json.loads(page.ask_until_true(BUTTONS))
    assert buttons["bottom"] > buttons["top"]
    assert buttons["bottom"] <= legend["top"] or legend["bottom"] <= buttons["top"]
    assert legend["bottom"] > legend["top"]
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    assert (red + green + blue < 384) == (theme == "light")


@pytest.mark.parametrize("page", ["report"], indirect=True)
def test_order_axis_and_filter_of_a_report(chromium: Browser, page: Path) -> None:
    probe = _probed(chromium, page, 1200, "light", CONTROLS)
    before, ordered, filtered = (probe[name] for name in ("before", "ordered", "filtered"))
    assert len(before["rows"]) == before["cards"] == len(HOSTILE) + 1
    assert before["marked"] == before["rows"][:1] * 2, "the layer that collapsed is on top"
    assert ordered["rows"] == before["rows"][1:] + before["rows"][:1], "the model has it at the end"
    assert ordered["values"] == before["values"][1:] + before["values"][:1], "values go with their rows"
    assert (before["axis"], ordered["axis"]) == ("linear", "log")
    assert filtered["rows"] == filtered["marked"][:1] == before["rows"][:1]
    assert filtered["cards"] == 1


def test_figures_of_a_page_become_pictures(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_report(load_history(write_log(tmp_path / "events.jsonl", rescued_run()))))
    script = Path(__file__).parents[2] / ".ci" / "pictures.py"
    pictures = runpy.run_path(str(script))["write"](page, tmp_path / "pictures")
    texts = [" ".join(ElementTree.parse(path).getroot().itertext()) for path in pictures]
    assert len(texts) == 8
    assert "0.mixer" in texts[0]
    assert "accuracy" in texts[1]


@pytest.mark.parametrize("theme", sorted(THEMES))
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_as_it_is_shown_without_a_complaint_of_the_browser(
    chromium: Browser, page: Path, width: int, theme: str
) -> None:
    from PIL import Image

    picture = fresh_picture(f"{page.stem}-{width}-{theme}.png")
    options = (f"--screenshot={picture}", "--enable-logging=stderr")
    answer = chromium(page.as_uri(), *options, width=width, theme=theme)
    complaints = [line for line in answer.stderr.splitlines() if "CONSOLE" in line or "Refused to" in line]
    assert complaints == [], "the page's own policy forbids nothing that the page does"
    with Image.open(picture) as image:
        pixels = image.convert("RGB")
        assert pixels.size[0] == width
        corner = pixels.getpixel((2, 2))
        assert isinstance(corner, tuple)
        assert max(corner) < 60 if theme == "dark" else min(corner) > 200
        assert len(pixels.getcolors(maxcolors=2**24) or ()) > 50, "an empty page"
