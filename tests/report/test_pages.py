"""The pages: complete, well formed, escaped, and in need of nothing but themselves."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ess_monitor.cli import main as cli
from ess_monitor.records import CONDITIONS, PHASES, HistogramData
from ess_monitor.report import load_history, page, render_comparison, render_report
from tests.exporters.helpers import evidence
from tests.report.helpers import (
    HOSTILE,
    LAYERS,
    TEMPLATES,
    Page,
    action,
    figures_of,
    finding,
    measurement,
    rescued_run,
    run_info,
    unwanted_scripts,
    write_log,
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rescued(tmp_path: Path) -> Path:
    return write_log(tmp_path / "rescued.jsonl", rescued_run())


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    measurements = [measurement(step, metrics={"loss": 3.0}) for step in range(0, 1500, 150)]
    return write_log(tmp_path / "alone.jsonl", measurements, finished=None)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Every text of the run is an attack."""
    texts = iter([*HOSTILE] * 8)
    layers = HOSTILE
    found = tuple(
        finding(layer, 100).model_copy(update={"reason": next(texts), "advice": next(texts)}) for layer in layers
    )
    done = tuple(action(layer, 100, message=next(texts)) for layer in layers)
    info = run_info(
        layers, run_name=HOSTILE[0], model=HOSTILE[1], strategy=HOSTILE[2], versions={HOSTILE[0]: HOSTILE[1]}
    )
    measured = [
        measurement(0, layers, metrics=dict.fromkeys(HOSTILE, 1.0)),
        measurement(100, layers, findings=found, actions=done, conditions=dict.fromkeys(layers, "collapsed")),
    ]
    final = {"export_errors_total": dict.fromkeys(HOSTILE, 1)}
    return write_log(tmp_path / "hostile.jsonl", measured, info, **final)


@pytest.fixture(params=["real", "rescued", "alone", "hostile", "compared", "hostile compared"])
def html(request: pytest.FixtureRequest, real_log: Path, rescued: Path, alone: Path, hostile: Path) -> str:
    logs = {"real": real_log, "rescued": rescued, "alone": alone, "hostile": hostile}
    if request.param in logs:
        return render_report(load_history(logs[request.param]))
    second = hostile if "hostile" in request.param else alone
    return render_comparison(load_history(hostile if "hostile" in request.param else rescued), load_history(second))


def test_every_element_is_closed_and_every_id_is_used_once(html: str) -> None:
    parsed = Page(html)
    assert parsed.unclosed == []
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_link_leads_to_a_place_on_the_page(html: str) -> None:
    parsed = Page(html)
    ids = {f"#{attributes['id']}" for _, attributes in parsed.elements if "id" in attributes}
    assert {attributes["href"] for attributes in parsed.of("a")} <= ids


def test_nothing_is_fetched_and_nothing_runs_but_our_scripts(html: str) -> None:
    parsed = Page(html)
    assert not {"img", "link", "iframe", "object", "embed", "image", "use", "form", "base"} & {
        name for name, _ in parsed.elements
    }
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert not re.search(r"url\(|@import|expression|https?:", style)
    (policy,) = [meta["content"] for meta in parsed.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    run = [text for attributes, text in parsed.scripts if attributes.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert re.findall(r"'sha256-(.*?)'", policy) == hashes
    assert unwanted_scripts(html) == []
    assert len(run) == 2
    assert figures_of(html)


def test_every_chart_and_every_table_is_reached_by_the_keyboard_and_has_a_name(html: str) -> None:
    parsed = Page(html)
    charts = [attributes for attributes in parsed.of("div") if attributes.get("class") == "plot"]
    assert len(charts) == len(figures_of(html))
    assert {attributes["role"] for attributes in charts} == {"img"}
    for attributes in [*charts, *(each for each in parsed.of("div") if each.get("class") == "scroll")]:
        assert attributes["tabindex"] == "0"
        assert attributes["aria-label"].strip()


def test_names_and_texts_of_a_run_are_shown_as_they_are(hostile: Path) -> None:
    for html in (render_report(load_history(hostile)), render_comparison(load_history(hostile), load_history(hostile))):
        assert unwanted_scripts(html) == []
        assert "\x1b" not in html
        text = Page(html).text
        for name in HOSTILE:
            assert "".join(char if char.isprintable() else "�" for char in name) in text
        assert "49" not in re.findall(r"\b\d+\b", text), "a name is never a template"


def test_the_script_of_the_pages_is_whole_and_of_the_major_version_that_plotly_brings() -> None:
    script = (TEMPLATES / "plotly.min.js").read_text()
    assert "</script" not in script.lower()
    assert "<!--" not in script
    (major,) = re.findall(r"plotly\.js \(cartesian - minified\) v(\d+)\.", script[:500])
    assert "Permission is hereby granted" in (TEMPLATES / "plotly.LICENSE").read_text()
    offline = pytest.importorskip("plotly.offline")
    assert offline.get_plotlyjs_version().split(".")[0] == major, "notebooks and pages draw alike"


def test_no_template_turns_escaping_off() -> None:
    for path in TEMPLATES.glob("*.html"):
        assert not re.search(r"\|\s*safe|autoescape|Markup", path.read_text()), path.name


def test_the_page_describes_a_rescue(rescued: Path) -> None:
    text = Page(render_report(load_history(rescued))).text
    assert "1 of 2 layers recovered after being collapsed or saturated: blocks.1.mixer." in text
    for part in (
        "Step 400",
        "healthy → collapsed: seen so",
        "pull_to_identity at 0.5, applied: regularizer",
        "pull A towards I",
    ):
        assert part in text
    for term in ("Net", "demo", "0 to 900", "finished", "2023-11-14 22:13:20 UTC", "1 h 00 min", "0.40%", "1.00%"):
        assert term in text
    for phase in PHASES:
        assert re.search(rf"{phase} 4 0\.50 s 125\.00 ms", text)


def _evidence_tables(html: str) -> list[str]:
    return [each["aria-label"] for each in Page(html).of("div") if each.get("aria-label", "").startswith("Evidence on")]


def test_a_finding_shows_the_evidence_that_it_rests_on(rescued: Path) -> None:
    html = render_report(load_history(rescued))
    assert _evidence_tables(html) == ["Evidence on blocks.1.mixer, from batches up to step 400"]
    table = Page(html).text.partition("up to step 400 ")[2]
    assert table.startswith(
        "evidence value outcome collapse: the loss needs the past, and remembering more costs it nothing "
        "compared the loss, on 8 batches that were run again loss as it is 8 "
        "change with half the decay (m50) +0.008 ± 0.004, +0.10% of the loss "
        "change with a tenth of the decay (m90) +2, +25.00% of the loss "
        "change without the past (cut) +4, +50.00% of the loss m50 / cut 0.2% "
        "share of the output that comes from afar 12.5% "
    )
    assert len(_evidence_tables(render_comparison(load_history(rescued), load_history(rescued)))) == 2


def test_a_layer_that_forgets_by_choice_is_shown_so_with_the_evidence_of_its_outputs(tmp_path: Path) -> None:
    by_outputs = evidence(HOSTILE[0], 100, basis="kl", base=None, m50=0.5, cut=0.0, m50_error=0.0, far_share_ratio=None)
    found = (
        finding(HOSTILE[0], 100, "forgets_by_choice", "unknown", evidence=by_outputs),
        finding("plain", 100, "collapsed"),
    )
    layers, conditions = (HOSTILE[0], "plain"), {HOSTILE[0]: "forgets_by_choice", "plain": "collapsed"}
    log = write_log(
        tmp_path / "log.jsonl", [measurement(100, layers, findings=found, conditions=conditions)], run_info(layers)
    )
    html = render_report(load_history(log))
    text = Page(html).text
    assert _evidence_tables(html) == [f"Evidence on {HOSTILE[0]}, from batches up to step 100"], "one finding has none"
    assert unwanted_scripts(html) == []
    for part in (
        "outcome by choice: the outputs depend on the forgetting",
        "compared the outputs (KL, in nats), on 8 batches that were run again change with half the decay (m50) 0.5 ",
        "m50 / cut – share of the output that comes from afar –",
        "unknown → forgets by choice: seen so",
        f"1 of 2 layers ended forgetting by choice: {HOSTILE[0]}.",
    ):
        assert part in text
    assert "forgets_by_choice" not in text
    assert 'class="pill forgets_by_choice">forgets by choice<' in html


def test_the_events_are_marks_on_the_loss_and_lead_to_the_list(rescued: Path) -> None:
    html = render_report(load_history(rescued))
    (metrics,) = [each for each in figures_of(html) if "yaxis4" in each["layout"]]
    targets = {target for trace in metrics["data"] for target in trace.get("customdata", ()) if target}
    assert targets == {"event-1", "event-2", "event-3"}
    assert targets <= {attributes.get("id") for attributes in Page(html).of("li")}


def test_epoch_and_learning_rate_are_no_metrics_to_plot(tmp_path: Path) -> None:
    given = {"epoch": 0.5, "loss": 2.0, "lr-AdamW": 1e-3, "train/learning_rate": 1e-3, "train/epoch": 0.5, "lrx": 1.0}
    log = write_log(tmp_path / "log.jsonl", [measurement(step, metrics=given) for step in (0, 100)])
    for html in (render_report(load_history(log)), render_comparison(load_history(log), load_history(log))):
        titles = {axis["title"]["text"] for each in figures_of(html) for name, axis in each["layout"].items()
                  if name.startswith("yaxis") and "title" in axis}  # fmt: skip
        assert {"loss", "lrx"} <= titles
        assert not titles & {"epoch", "lr-AdamW", "train/learning_rate", "train/epoch"}
        assert "learning_rate" not in Page(html).text


def test_the_page_says_nothing_of_what_the_log_does_not_hold(alone: Path) -> None:
    text = Page(render_report(load_history(alone))).text
    assert "The log has no end" in text
    assert "Time of the monitor by phase" not in text
    assert "spectr" not in text.lower()


def test_a_run_without_a_single_measurement_is_a_page(tmp_path: Path) -> None:
    empty = load_history(write_log(tmp_path / "empty.jsonl", []))
    parsed = Page(render_report(empty))
    assert parsed.unclosed == []
    assert "Nothing was measured" in parsed.text
    assert "nothing can be compared" in Page(render_comparison(empty, empty)).text


def test_a_comparison_sets_layers_side_by_side_at_equal_steps(rescued: Path, alone: Path) -> None:
    text = Page(render_comparison(load_history(rescued), load_history(alone))).text
    assert "At step 900, the last that both runs reached:" in text
    assert "blocks.1.mixer: utilization 60 % in A and 25 % in B." in text
    assert "loss is 2.1 in A and 3 in B." in text
    assert "step 0 step 225 step 450 step 675 step 900" in text
    assert "blocks.1.mixer 60 % / 25 % 60 % / 25 % 10 % / 25 % 10 % / 25 % 60 % / 25 %" in text


def test_a_comparison_names_layers_that_one_run_lacks(tmp_path: Path, rescued: Path) -> None:
    other = write_log(
        tmp_path / "other.jsonl", [measurement(0, ("blocks.0.mixer", "new"))], run_info(("blocks.0.mixer", "new"))
    )
    text = Page(render_comparison(load_history(rescued), load_history(other))).text
    assert "Only in A: blocks.1.mixer." in text
    assert "Only in B: new." in text


def _luminance(color: str) -> float:
    channels = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "style.css").read_text(), re.DOTALL)
    colors = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})\b", blocks[theme]))
    for ground in ("paper", "card"):
        for ink in ("ink", "soft", "a", *CONDITIONS):
            assert _contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
        assert _contrast(colors["focus"], colors[ground]) >= 3.0, ground
    for mark in ("action", *CONDITIONS):
        assert _contrast(colors["on"], colors[mark]) >= 4.5, mark


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ess-monitor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return command


def test_the_command_writes_beside_the_log_or_where_it_is_told(run: Run, rescued: Path) -> None:
    beside = rescued.with_name("ess_report.html")
    assert run("report", rescued) == (0, f"{beside}\n", "")
    assert "recovered after being collapsed or saturated" in beside.read_text()
    elsewhere = rescued.parent / "new" / "page.html"
    assert run("report", rescued, "-o", elsewhere)[0] == 0
    assert elsewhere.read_text() == beside.read_text()
    assert run("report", rescued, "-o", "-")[1] == beside.read_text()


def test_the_command_compares_two_runs(run: Run, rescued: Path, alone: Path) -> None:
    assert run("compare", rescued, alone) == (0, "ess_compare.html\n", "")
    assert "two runs compared" in Path("ess_compare.html").read_text()


def test_the_command_takes_a_run_of_a_log(run: Run, rescued: Path) -> None:
    write_log(rescued, rescued_run()[:3], run_info(run_name="again", start_timestamp_seconds=1.0))
    assert "again: memory report" in run("report", rescued, "-o", "-")[1]
    assert "demo: memory report" in run("report", rescued, "--run", "demo", "-o", "-")[1]
    assert "demo and again: two runs compared" in run("compare", rescued, rescued, "--run-a", "1", "-o", "-")[1]
    assert run("report", rescued, "--run", "other")[0] == 2


def test_the_command_explains_what_it_cannot_do(run: Run, rescued: Path, tmp_path: Path) -> None:
    status, out, err = run("report", tmp_path / "nothing")
    assert (status, out) == (2, "")
    assert err.startswith("error: RUN_DIR:")
    (tmp_path / "file").touch()
    status, _, err = run("report", rescued, "-o", tmp_path / "file" / "page.html")
    assert status == 2
    assert err.startswith("error: --output:")


def test_the_room_knows_no_tensor() -> None:
    code = (
        "import sys, types; package = types.ModuleType('ess_monitor'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['ess_monitor'] = package; import ess_monitor.report; print('torch' in sys.modules)"
    )
    root = Path(page.__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, text=True)
    assert answer.stdout == "False\n"


def test_the_names_of_0_1_still_work(rescued: Path) -> None:
    from ess_monitor.report import RunStory, load_story

    history = load_story(rescued)
    assert isinstance(history, RunStory)
    assert render_report(story=history) == render_report(history)


def test_histograms_without_an_observation_are_left_out(tmp_path: Path) -> None:
    empty = HistogramData(bounds=(1.0,), counts=(0,))
    log = write_log(tmp_path / "log.jsonl", [measurement(0)], step_seconds=empty, overhead_seconds={"capture": empty})
    text = Page(render_report(load_history(log))).text
    assert "Mean time of a training step" not in text
    assert "Time of the monitor by phase" not in text
    assert LAYERS[0] in text
