"""The verdict on results made by hand: what counts as an alarm, as harm, as a rescue, and who is named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.trust.tables import markdown, protocol, tables
from benchmarks.trust.verdict import (
    LEAST_NOISE,
    MOST_NOISE,
    SMALL_LOSS,
    Proportion,
    collapsed_at,
    judge,
    noise_by_kind,
    truth,
)
from tests.trust.stub import action, finding, result

AUTO = ("auto_metric", "auto")


def run(name: str, *, auto: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """Return control and both variants in mode auto; `auto` changes these two."""
    control = result(name, "control", **changes)
    return [control, *(result(name, variant, **{**changes, **(auto or {})}) for variant in AUTO)]


def collapse(name: str, control: float, remedy: float, auto: float, **changes: Any) -> list[dict[str, Any]]:
    """Return a candidate of a collapse with these final accuracies."""
    changes = {"kind": "collapse_wla", "label": "collapsed", **changes}
    rows = run(name, auto={"accuracy": auto}, accuracy=control, **changes)
    return [*rows, result(name, "remedy", accuracy=remedy, **changes)]


def row(results: list[dict[str, Any]], split: str = "seen") -> dict[str, Any]:
    """Return the row of mode auto with the metric."""
    return next(verdict for verdict in judge(results) if verdict.split == split).rows[0]


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_intervals_are_those_of_wilson(count: int, total: int, low: float, high: float) -> None:
    assert Proportion(count, total).interval == pytest.approx((low, high), abs=1e-4)
    assert Proportion(0, 0).interval == (0.0, 1.0)
    assert str(Proportion(0, 0)) == "-"
    assert str(Proportion(0, 10)) == "0 of 10 (0 to 28 %)"


def test_a_healthy_run_that_is_called_collapsed_is_a_false_alarm_and_named() -> None:
    alarmed = {"findings": [finding("healthy", 1000), finding("collapsed", 1400)], "actions": [action("rejected")]}
    verdict = judge([*run("calm"), *run("alarmed", auto=alarmed)])[0]
    assert verdict.rows[0]["false alarms"].startswith("1 of 2")
    assert verdict.rows[0]["healthy treated"].startswith("0 of 2")
    assert "alarmed: false alarm at step 1400 in blocks.1, loud" in verdict.misses[0]


def test_forgetting_by_choice_is_no_alarm() -> None:
    chosen = {"findings": [finding("forgets_by_choice", evidence="by_choice")]}
    assert row(run("chosen", auto=chosen))["false alarms"].startswith("0 of 1")
    assert collapsed_at(result("chosen", "auto", **chosen)) == ""


def test_only_what_was_applied_is_a_treatment() -> None:
    treated = {"actions": [action("applied"), action("rolled_back")]}
    results = [*run("told", auto={"actions": [action("dry_run")]}), *run("treated", auto=treated)]
    assert row(results)["healthy treated"].startswith("1 of 2")


def test_the_noise_of_a_kind_is_twice_the_change_between_controls_of_the_seen_half() -> None:
    def pair(name: str, change: float, **changes: Any) -> dict[str, dict[str, Any]]:
        controls = {"control": result(name, "control", **changes)}
        loss = math.exp(change) * (1 + SMALL_LOSS) - SMALL_LOSS
        return controls | {"repeat": result(name, "repeat", loss=loss, **changes)}

    pairs = [pair("a", 0.01), pair("b", -0.01), pair("c", 0.0, kind="text"), pair("d", 0.5, split="held_out")]
    pairs.append(pair("e", 0.7, kind="markov"))
    assert noise_by_kind(pairs) == pytest.approx({"copy": 0.02, "text": LEAST_NOISE, "markov": MOST_NOISE})


def test_losses_near_zero_are_compared_by_what_they_are_worth() -> None:
    treated = {"actions": [action("applied")]}
    assert row(run("solved", auto={"loss": 9e-5, **treated}, loss=1e-5))["harmed"].startswith("1 of 1")
    assert row(run("solved", auto={"loss": 3e-5, **treated}, loss=1e-5))["harmed"].startswith("0 of 1")


def test_a_task_that_the_control_solves_and_the_run_does_not_is_a_harm() -> None:
    lost = run("lost", auto={"accuracy": 0.89, "actions": [action("applied")]}, accuracy=0.95)
    assert row(lost)["harmed"].startswith("1 of 1")
    assert row(run("never", auto={"accuracy": 0.2}, accuracy=0.25))["harmed"].startswith("0 of 1")


def test_harm_is_a_loss_above_the_control_by_more_than_the_noise() -> None:
    treated = {"actions": [action("applied")]}
    results = [
        *run("noise"),
        result("noise", "repeat", loss=1.01),
        *run("within", auto={"loss": 1.015, **treated}, split="held_out"),
        *run("beyond", auto={"loss": 1.03, **treated}, split="held_out"),
        *run("broken", auto={"loss": None, **treated}, split="held_out"),
        *run("better", auto={"loss": 0.5, **treated}, split="held_out"),
    ]
    verdicts = judge(results)
    assert [verdict.split for verdict in verdicts] == ["held_out", "seen"]
    assert verdicts[0].rows[0]["harmed"].startswith("2 of 4")
    assert [text.split(": ")[1] for text in verdicts[0].misses[:2]] == ["beyond", "broken"]
    assert "loss 1 -> 1.03 (noise 1.9 %)" in verdicts[0].misses[0]
    assert "loss 1 -> not finite" in verdicts[0].misses[1]
    assert verdicts[0].kinds[0]["worse at all"] == 2 * 3
    assert judge(results, names={"beyond"})[0].rows[0]["harmed"].startswith("1 of 1"), "noise of all results"


def test_a_kind_without_repeats_has_the_least_noise() -> None:
    assert row(run("worse", auto={"loss": 1.002, "actions": [action("applied")]}))["harmed"].startswith("1 of 1")


def test_a_collapse_counts_only_if_the_control_fails_and_the_remedy_helps() -> None:
    results = [
        *collapse("rescued", 0.26, 0.98, 0.97),
        *collapse("missed", 0.27, 0.99, 0.30),
        *collapse("escaped", 0.95, 0.99, 0.96),
        *collapse("hopeless", 0.25, 0.30, 0.25),
        *run("unconfirmed", label="collapsed", kind="collapse_wla", accuracy=0.2),
    ]
    verdict = judge(results)[0]
    assert verdict.rows[0]["rescued"].startswith("1 of 2")
    assert verdict.rows[0]["median accuracy, control"] == "0.265"
    assert verdict.rows[0]["median accuracy"] == "0.635"
    assert "missed: not rescued, accuracy 0.300, not found" in verdict.misses[0]
    reasons = {text.split(": ")[0]: text for text in verdict.left_out}
    assert set(reasons) == {"escaped", "hopeless", "unconfirmed"}
    assert "the control solves it" in reasons["escaped"]
    assert "the remedy does not solve it either" in reasons["hopeless"]


def test_a_rescue_by_the_autopilot_confirms_a_collapse() -> None:
    treated = {"accuracy": 0.97, "actions": [action("applied")]}
    confirmed = run("rescued", auto=treated, label="collapsed", kind="collapse_wla", accuracy=0.2)
    assert row(confirmed)["rescued"].startswith("1 of 1")


def test_a_training_that_was_left_alone_is_its_own_control() -> None:
    calm = result("calm", "auto", stands_for=["control", "auto_metric"])
    assert [one["false alarms"][:6] for one in judge([calm])[0].rows] == ["0 of 1", "0 of 1"]
    other = judge([calm, result("calm", "auto_metric", loss=2.0, stands_for=["control"])])[0]
    assert any("which stood for it" in text for text in other.left_out)


def test_a_healthy_label_that_the_remedy_refutes_is_left_out() -> None:
    refuted = {
        "control": result("copy", "control", accuracy=0.5),
        "remedy": result("copy", "remedy", accuracy=0.95),
    }
    label, reason = truth(refuted)
    assert label is None
    assert "0.500 -> 0.950" in reason
    assert truth({"control": refuted["control"]}) == ("healthy", "")


def test_a_target_on_the_loss_is_reached_from_above() -> None:
    target = {"metric": "loss", "solved": 2.0}
    rows = {v: result("r", v, label="collapsed", target=target, loss=x) for v, x in (("control", 2.1), ("remedy", 1.9))}
    assert truth(rows) == ("collapsed", "")


def test_a_change_without_an_action_and_another_start_are_named() -> None:
    results = [*run("changed", auto={"loss": 0.999}), *run("moved", auto={"start": "1"})]
    left_out = judge(results)[0].left_out
    assert sum("ended with another loss than the control, and nothing was treated" in text for text in left_out) == 2
    assert sum("began with other data or weights" in text for text in left_out) == 2


def test_failed_jobs_have_no_verdict() -> None:
    failed = {"name": "lost", "variant": "control", "error": "OSError: lost"}
    assert judge([failed]) == []
    assert row([failed, *run("kept")])["false alarms"].startswith("0 of 1")


def test_tables_and_markdown_show_both_halves_and_the_protocol() -> None:
    results = [*run("a"), *run("b", split="held_out", auto={"findings": [finding("collapsed", evidence=None)]})]
    verdicts = judge(results)
    assert [shown.title.split(" (")[0] for shown in tables(verdicts)] == [
        "The autopilot on the held-out half",
        "By kind, held-out half",
        "The autopilot on the seen half",
        "By kind, seen half",
    ]
    text = markdown(verdicts)
    assert "| held-out half | false alarms |" in text
    assert "| auto, with the metric | 1 of 1 (21 to 100 %) |" in text
    assert "b: false alarm at step 1400 in blocks.1, without evidence" in text
    assert "Both halves were run with the same thresholds" in protocol(verdicts)
    other = [*results, *run("c", thresholds="other")]
    assert "NOT SO HERE" in protocol(judge(other))
    assert "Only one half" in protocol(judge(run("a")))
