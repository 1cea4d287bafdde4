"""The commands that analyze a model: table, JSON, page, and one line for a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ess_monitor import CaptureConfig, LayerFilter, MonitorConfig
from ess_monitor.analysis import StudentTraining, compressibility, hybrid_advice, length_profile, minimal_state
from ess_monitor.cli.tables import print_table
from ess_monitor.exporters.terminal.inspected import plain_table
from tests.cli.test_main import Run
from tests.report.helpers import unwanted_scripts

NET = ("cli_models:Net", "--input", "tokens", "--length", "24")


def test_minimal_state_gives_what_it_gives_in_python(run: Run) -> None:
    answer = run("minimal-state", "cli_models:mixer", "--width", "16", "--length", "24", "--json", "--error", "0.2")
    assert answer.status == 0

    import cli_models  # type: ignore[import-not-found]

    torch.manual_seed(0)
    inputs = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    config = MonitorConfig(capture=CaptureConfig(samples=2, heads=16, max_length=24))
    expected = minimal_state(cli_models.mixer(), inputs, relative_errors=[0.2], config=config)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}


def test_minimal_state_shows_a_table_and_writes_a_page(run: Run, tmp_path: Path) -> None:
    answer = run("minimal-state", *NET, "--html", "page.html")
    assert answer.status == 0
    assert re.search(r"layer +operator +TSS +rank +mean rank +causal rank +for 10 % +error", answer.out)
    assert re.search(r"mixer +DiagonalRecurrence +4 +4 +[\d.]+ +4 +\d \(\d\)", answer.out)
    assert re.search(r"attention +SoftmaxAttention +12 \(grows\) +\d+", answer.out)
    assert re.search(r"lstm +skipped: ", answer.out)
    assert "page.html" in answer.err
    page = (tmp_path / "page.html").read_text()
    assert "Net: smallest states" in page
    assert unwanted_scripts(page) == []
    to_output = run("minimal-state", *NET, "--html", "-")
    assert to_output.out.startswith("<!doctype html>")


def test_distill_check_gives_what_it_gives_in_python_and_shows_a_table(run: Run, tmp_path: Path) -> None:
    answer = run("distill-check", *NET, "--layer", "mixer", "--json", "--student-states", "2,3")
    [layer] = answer.json["layers"]
    assert [student["state_size"] for student in layer["students"]] == [2, 3]

    import cli_models

    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
    config = MonitorConfig(layers=LayerFilter(include=("mixer",)), capture=CaptureConfig(samples=2, heads=16))
    expected = compressibility(cli_models.Net(), tokens, student_states=[2, 3], config=config)
    assert layer == expected.model_dump(mode="json")["layers"][0]
    shown = run("distill-check", *NET, "--student-states", "2,3", "--html", "page.html")
    assert re.search(r"layer +operator +TSS +state 2 +state 3", shown.out)
    assert re.search(r"mixer +DiagonalRecurrence +4 +[\d.e-]+ % \([\d.e-]+ %\)", shown.out)
    assert re.search(r"lstm +skipped: ", shown.out)
    assert "what a smaller state must lose" in (tmp_path / "page.html").read_text()


def test_distill_check_trains_students_where_it_is_asked_to(run: Run) -> None:
    steps = ("--operator-steps", "3", "--activation-steps", "4")
    only = ("distill-check", *NET, "--student-states", "2")
    answer = run(*only, "--trial", *steps, "--json")

    import cli_models

    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
    config = MonitorConfig(capture=CaptureConfig(samples=2, heads=16))
    trial = StudentTraining(operator_steps=3, activation_steps=4)
    expected = compressibility(cli_models.Net(), tokens, student_states=[2], config=config, trial=trial)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}
    shown = run(*only, "--trial", *steps)
    assert re.search(r"mixer +DiagonalRecurrence +4 +\S+ % \(\S+ %\) → \S+ %, \S+ %", shown.out)
    assert "after 3 steps on the operator" in shown.out
    assert "attention: no student was trained" in shown.out
    assert "→" not in run(*only).out
    refused = run(*only, *steps)
    assert (refused.status, refused.out) == (2, "")
    assert "operator_steps: students are trained with --trial only" in refused.err


def test_hybrid_advice_gives_what_it_gives_in_python_and_shows_a_table(run: Run, tmp_path: Path) -> None:
    answer = run("hybrid-advice", *NET, "--json", "--batch", "2", "--tolerance", "0.2")

    import cli_models

    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
    capture = CaptureConfig(samples=2, heads=None, max_length=24)
    config = MonitorConfig(tolerance=0.2, tolerance_scale="output", positions=8, capture=capture)
    expected = hybrid_advice(cli_models.Net(), tokens, config=config)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}
    shown = run("hybrid-advice", *NET, "--html", "page.html")
    assert re.search(r"layer +mixer +rank +ESS +TSS +used +retention +far share +advice", shown.out)
    assert re.search(r"attention +attention +\d +[\d.]+ +\d+ \(grows\) +[\d.]+ +- ", shown.out)
    assert "Advice, not proof" in shown.out
    assert "Net: advice for its layers" in (tmp_path / "page.html").read_text()


def test_profile_over_lengths_gives_what_it_gives_in_python_and_shows_a_table(run: Run, tmp_path: Path) -> None:
    over = ("profile", "cli_models:mixer", "--width", "16", "--batch", "2", "--lengths", "8,24")
    answer = run(*over, "--json")

    import cli_models

    torch.manual_seed(0)
    inputs = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    config = MonitorConfig(capture=CaptureConfig(samples=2, heads=None))
    expected = length_profile(cli_models.mixer(), inputs, lengths=[8, 24], config=config)
    assert answer.json == {"schema_version": 1, **expected.model_dump(mode="json")}
    shown = run(*over, "--html", "page.html")
    assert re.search(r"layer +length +ESS +TSS +ESS without decay +norm of A's product +entropy", shown.out)
    assert re.search(r"model +24 +[\d.]+ +4 +[\d.]+ +[\d.e-]+ +[\d.]+", shown.out)
    assert "ESS over the length" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("minimal-state", "cli_models:plain", "--width", "4"), "no sequence mixer that can be measured"),
        (("minimal-state", "cli_models:mixer"), "--width N"),
        (("minimal-state", "cli_models:mixer", "--width", "16", "--error", "2"), "relative_errors=2"),
        (("minimal-state", "cli_models:mixer", "--width", "16", "--checkpoint", "none.pt"), "none.pt is not a file"),
        (("distill-check", "cli_models:mixer", "--width", "16", "--student-states", "four"), "'four' is not a list"),
        (("distill-check", "cli_models:mixer", "--width", "16", "--student-states", "-4"), "'-4' is not a list"),
        (("profile", "cli_models:mixer", "--width", "16", "--lengths", "1,8"), "'1,8' is not a list of whole numbers"),
        (("profile", "cli_models:mixer", "--width", "16", "--html", "x.html"), "--lengths"),
        (("hybrid-advice", "cli_models:mixer", "--width", "16", "--tolerance", "-1"), "tolerance"),
        (("minimal-state", "cli_models:Net", "--width", "17"), "does not run on torch.float32"),
        (
            ("minimal-state", *NET, "--layer", "mixer", "--html", "cli_models.py/x.html"),
            "--html: cli_models.py/x.html cannot",
        ),
        (("minimal-state", *NET, "--layer", "mixer", "--html", "-", "--json"), "standard output"),
    ],
)
def test_a_mistake_gives_one_line_that_names_it_and_status_2(run: Run, arguments: tuple[str, ...], says: str) -> None:
    answer = run(*arguments)
    assert answer.status == 2
    assert answer.out == ""
    [line] = [line for line in answer.err.splitlines() if line != "building"]
    assert line.startswith("error: ")
    assert says in line


def test_brackets_in_a_table_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = plain_table("[b]", "layer", numbers=())
    table.add_row("blocks.[bold]0")
    table.caption = "its [i] heads"
    print_table(table)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[b]", "blocks.[bold]0", "its [i] heads"))
