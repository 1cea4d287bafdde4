"""The table: what a person sees, and when."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ess_monitor.exporters import TerminalConfig, TerminalExporter, render_table
from ess_monitor.records import ACTION_OUTCOMES, LayerInfo, Measurement, RunInfo
from tests.exporters.helpers import (
    ODD_LAYERS,
    PLAIN_LAYERS,
    action,
    examined,
    finding,
    measurement,
    reading,
    run_info,
    snapshot,
)


def _text(measured: Measurement, layers: tuple[LayerInfo, ...] = ()) -> str:
    console = Console(file=io.StringIO(), width=120, no_color=True)
    console.print(render_table(measured, layers))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class _Screen:
    """Collects what is written, under a clock that the test turns."""

    def __init__(self, **settings: float | bool | int) -> None:
        self.texts: list[str] = []
        self.now_seconds = 1000.0
        self.exporter = TerminalExporter(
            TerminalConfig(**settings), write=self.texts.append, clock=lambda: self.now_seconds
        )
        self.exporter.start(run_info(), lambda: snapshot())

    def export(
        self, step: int, layers: tuple[str, ...] = PLAIN_LAYERS, after_seconds: float = 0.0, **fields: object
    ) -> int:
        """Export, and tell how many tables that printed."""
        self.now_seconds += after_seconds
        before = len(self.texts)
        self.exporter.export(measurement(step, layers, **fields))
        return len(self.texts) - before


def test_a_row_shows_sizes_utilization_retention_and_condition() -> None:
    measured = measurement(100, readings=(reading("mixer"),), conditions={"mixer": "collapsed"})
    (row,) = (line for line in _text(measured).splitlines() if line.startswith("mixer"))
    assert row.split() == ["mixer", "4.0", "16.0", "██▌·······", "25%", "0.50", "collapsed"]


def test_a_reading_that_is_not_ok_shows_its_status_in_place_of_numbers() -> None:
    measured = measurement(100, readings=(reading("mixer", status="nonfinite"),), conditions={})
    (row,) = (line for line in _text(measured).splitlines() if line.startswith("mixer"))
    assert row.split() == ["mixer", "-", "16.0", "nonfinite", "-", "unknown"]


def test_rows_are_in_model_order_and_layers_without_a_reading_are_shown() -> None:
    layers = run_info(("second", "first", "silent")).layers
    text = _text(measurement(1, ("first", "extra", "second")), layers)
    rows = [line.split()[0] for line in text.splitlines()[3:7]]
    assert rows == ["second", "first", "silent", "extra"]
    assert "not measured" in text


def test_names_are_shown_as_they_are_and_cannot_steer_the_terminal() -> None:
    text = _text(measurement(1, ("[red]x[/red]", "\x1b[2Jx", "[/]")))
    assert "[red]x[/red]" in text
    assert "[/]" in text
    assert "\x1b" not in text


def test_a_finding_is_spelled_out_below_the_table() -> None:
    screen = _Screen(width=120)
    screen.export(300, findings=(finding(step=300),))
    *_, last = screen.texts[0].splitlines()
    assert last == "step 300, blocks.0.mixer: healthy -> collapsed. used 2 of 16. Raise alpha."


def test_a_layer_that_forgets_by_choice_is_called_so_in_words() -> None:
    screen = _Screen(width=120)
    screen.export(300, findings=(examined(step=300),), conditions={PLAIN_LAYERS[0]: "forgets_by_choice"})
    (row,) = (line for line in screen.texts[0].splitlines() if line.startswith(PLAIN_LAYERS[0]))
    assert row.endswith("0.50   forgets by choice")
    assert "step 300, blocks.0.mixer: healthy -> forgets by choice. used 2 of 16." in screen.texts[0]
    assert "forgets_by_choice" not in screen.texts[0]


@pytest.mark.parametrize("outcome", ACTION_OUTCOMES)
def test_an_action_is_one_line_below_the_table_however_narrow_the_terminal(outcome: str) -> None:
    screen = _Screen(width=60)
    after = {"outcome": outcome, "utilization_after": 0.5, "message": "a reason that is long enough\nfor two lines"}
    screen.export(300, actions=(action(step=300, **after),))
    *_, last = screen.texts[0].splitlines()
    assert last == (
        f"step 300, blocks.0.mixer: {outcome} pull_to_identity 0.5, utilization 12% -> 50%: "
        "a reason that is long enough for two lines"
    )


def test_an_action_without_numbers_has_none_in_its_line() -> None:
    screen = _Screen()
    bare = {"action": "advise", "outcome": "dry_run", "strength": None, "utilization_before": None}
    screen.export(300, actions=(action(step=300, **bare), action("", 300)))
    *_, first, second = screen.texts[0].splitlines()
    assert first == "step 300, blocks.0.mixer: dry_run advise: regularizer attached"
    assert second.startswith("step 300, root: applied pull_to_identity 0.5, utilization 12%: ")


def test_actions_on_oddly_named_layers_stay_one_line_each_and_cannot_steer_the_terminal() -> None:
    screen = _Screen()
    screen.export(1, ODD_LAYERS, actions=tuple(action(layer, 7) for layer in ODD_LAYERS))
    lines = screen.texts[0].splitlines()[-len(ODD_LAYERS) :]
    assert all(line.startswith("step 7, ") and line.endswith("regularizer attached") for line in lines)
    assert "\x1b" not in screen.texts[0]


def test_a_table_is_printed_first_then_every_ten_seconds_and_with_all_news() -> None:
    screen = _Screen(every_seconds=10)
    assert screen.export(1) == 1, "the first"
    assert screen.export(2, after_seconds=9.9) == 0, "too early"
    assert screen.export(3, after_seconds=0.0, findings=(finding(),)) == 1, "a finding does not wait"
    assert screen.export(4, after_seconds=1.0, actions=(action(),)) == 1, "nor does an action"
    assert screen.export(5, after_seconds=9.9) == 0
    assert screen.export(6, after_seconds=0.2) == 1


def test_closing_prints_the_newest_table_unless_it_was_printed() -> None:
    screen = _Screen()
    screen.export(1)
    screen.export(2)
    screen.export(3)
    screen.exporter.close("finished")
    screen.exporter.close("finished")
    assert [f"step {step}" in text for step, text in zip((1, 3), screen.texts, strict=True)] == [True, True]
    printed = _Screen()
    printed.export(1)
    printed.exporter.close("finished")
    assert len(printed.texts) == 1


@pytest.mark.parametrize("color", [True, False])
def test_escape_codes_are_written_when_asked_for_only(color: bool) -> None:
    screen = _Screen(color=color, width=100)
    screen.export(1)
    assert ("\x1b[" in screen.texts[0]) is color


def test_the_default_is_stderr_without_colours_where_that_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    exporter = TerminalExporter()
    exporter.start(run_info(), lambda: snapshot())
    exporter.export(measurement(100))
    captured = capsys.readouterr()
    assert "step 100" in captured.err
    assert "\x1b" not in captured.err
    assert captured.err.endswith("\n")
    assert captured.out == ""


def test_a_terminal_that_cannot_show_the_bar_gets_the_table_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", ascii_only)
    exporter = TerminalExporter()
    exporter.start(run_info(), lambda: snapshot())
    exporter.export(measurement(100))
    ascii_only.seek(0)
    assert "blocks.1.mixer" in ascii_only.read()


# -- below the table --------------------------------------------------------------------------------------------------


def _below(run: RunInfo, **fields: object) -> list[str]:
    """The lines below the table."""
    texts: list[str] = []
    exporter = TerminalExporter(TerminalConfig(width=120), write=texts.append)
    exporter.start(run, lambda: snapshot())
    exporter.export(measurement(100, **fields))
    lines = texts[-1].splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("next sample"))
    return [line.strip() for line in lines[first:]]


@pytest.mark.parametrize(
    ("every", "budget", "when", "limit"),
    [
        (109, 0.01, "next sample in 109 steps", ", the budget is 1.00%"),
        (20, 0.01, "next sample in 109 steps, not 20, to stay within the budget", ", the budget is 1.00%"),
        (20, 1.0, "next sample in 109 steps", ""),
        (0, 0.0, "next sample in 109 steps", ""),
    ],
)
def test_it_is_said_when_the_next_sample_comes_and_why_not_sooner(
    every: int, budget: float, when: str, limit: str
) -> None:
    run = run_info().model_copy(update={"every_n_steps": every, "overhead_budget_ratio": budget})
    cost = f"cost so far: 0.40% of the training time{limit}"
    assert _below(run, interval_steps=109, overhead_ratio=0.004)[:2] == [when, cost]


def test_it_is_said_why_conditions_are_unknown_once_for_all_layers_alike() -> None:
    same = {"layers.0": "warm-up until step 1000", "layers.1": "warm-up until step 1000", "layers.2": "nonfinite"}
    assert _below(run_info(), unknown_reasons=same)[2:] == [
        "unknown: warm-up until step 1000 (2 layers)",
        "unknown: nonfinite (layers.2)",
    ]
    each = {f"layers.{k}": f"reason {k}" for k in range(9)}
    assert _below(run_info(), unknown_reasons=each)[2:] == [
        "unknown: reason 0 (layers.0)",
        "unknown: reason 1 (layers.1)",
        "unknown: 7 more reasons",
    ]
