"""What is printed, and shown in notebooks, of a monitor, a profile and a description."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from ess_monitor import Monitor, MonitorConfig, describe, profile
from ess_monitor.exporters import TerminalConfig, TerminalExporter
from ess_monitor.exporters.terminal.shown import Shown
from ess_monitor.featurizers import GLA, LA
from ess_monitor.records import Measurement
from tests.browser import Browser
from tests.devtools import page_in

NAME = "[bold]<i>"
"""A layer's name that is neither markup nor HTML."""


class Odd(nn.Module):
    """Mixes tokens, and is read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict([(NAME, GLA(16, 2)), ("plain", LA(16, 2)), ("odd", Odd())]))


def as_printed_by_rich(item: Shown) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def check_forms(item: Shown, texts: list[str]) -> None:
    html = item._repr_html_()
    assert "<i>" not in html
    assert "&lt;i&gt;" in html
    assert html.startswith("<pre")
    for text in texts:
        assert text in str(item)
        assert text in as_printed_by_rich(item)
        assert text.replace("<", "&lt;").replace(">", "&gt;") in html
    assert "\x1b" not in str(item)


def test_a_profile_is_a_table_of_its_layers() -> None:
    result = profile(model(), torch.randn(2, 32, 16))
    numbers = [f"{value:.2f}" for r in result.readings for value in (r.effective_size, r.state_capacity) if value]
    assert len(numbers) == 4
    check_forms(result, [NAME, "plain", "odd.lstm", "skipped", "Sequential: 2 of 3 layers measured", *numbers])


def test_a_description_keeps_its_text_and_has_a_table() -> None:
    found = describe(model())
    assert str(found).splitlines()[0] == "Sequential: 2 of 3 sequence mixers can be measured"
    check_forms(found, [NAME, "plain", "odd.lstm", "Sequential: 2 of 3 sequence mixers can be measured"])


def test_a_monitor_shows_its_run_at_every_moment() -> None:
    net = model()
    monitor = Monitor(net, MonitorConfig(every_n_steps=1, evidence={"enabled": False}))
    assert repr(monitor) == "<Monitor of Sequential: not started, step 0, 2 layers>"
    check_forms(monitor, [NAME, "plain", "not measured"])
    with monitor:
        net(torch.randn(2, 32, 16)).square().mean().backward()
        monitor.step({"loss": 1.0})
        readings = monitor.flush()
        assert [reading.status for reading in readings] == ["ok", "ok"]
        sizes = [f"{reading.effective_size:.1f}" for reading in readings]
        check_forms(monitor, [NAME, "plain", "running", "step 1", *sizes])
    assert repr(monitor) == "<Monitor of Sequential: finished, step 1, 2 layers>"
    check_forms(monitor, ["finished", *sizes])


@pytest.mark.parametrize("columns", ["20", "300"])
def test_a_narrow_terminal_loses_no_number(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = profile(model(), torch.randn(2, 32, 16))
    assert f"{result.readings[0].effective_size:.2f}" in str(result)


def test_in_a_notebook_nothing_is_displayed_beside_what_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *args: pytest.fail("displayed by itself"))
    found = describe(model())
    assert "GLA" in str(found)
    assert "GLA" in found._repr_html_()
    texts: list[str] = []
    exporter = TerminalExporter(TerminalConfig(), write=texts.append)
    exporter.export(Measurement(step=7, timestamp_seconds=0.0, readings=(), conditions={}))
    assert "step 7" in texts[0]


@pytest.mark.servers
def test_columns_line_up_where_outputs_have_a_proportional_font(tmp_path: Path) -> None:
    class Columns(Shown):
        def __rich__(self) -> str:
            return "iiii|\nMMMM|"

    page = tmp_path / "output.html"
    page.write_text(f"<style>div pre {{ font-family: serif }}</style><div>{Columns()._repr_html_()}</div>")
    left = """(() => {
      const text = document.querySelector("pre").firstChild;
      const range = document.createRange();
      return [text.data.indexOf("|"), text.data.lastIndexOf("|")].map(place => {
        range.setStart(text, place);
        range.setEnd(text, place + 1);
        return range.getBoundingClientRect().left;
      });
    })()"""
    with page_in(Browser(tmp_path / "browser")) as opened:
        opened.open(page.as_uri())
        opened.ask_until_true("document.readyState === 'complete' && !!document.querySelector('pre')")
        first, second = opened.ask(left)
    assert first == second > 0
