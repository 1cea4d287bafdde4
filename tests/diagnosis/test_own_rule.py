"""A third rule is one function and one entry in a tuple."""

from __future__ import annotations

import pytest

from ess_monitor.diagnosis import Context, DiagnosisConfig, Tracker, Verdict, judge
from ess_monitor.diagnosis.rules import RULES
from ess_monitor.errors import ConfigError
from ess_monitor.records import Finding, Reading
from tests.diagnosis.helpers import TASK, reading


def forgotten(item: Reading, utilization: float, context: Context, config: DiagnosisConfig) -> Verdict | None:
    """The decay takes nearly all, whatever is in use."""
    if item.retention_ratio is None or item.retention_ratio >= 0.1:
        return None
    return Verdict("collapsed", f"retention {item.retention_ratio:.2f} is below 0.1", "raise alpha", patience=2)


def observe(tracker: Tracker, item: Reading, times: int, start: int = 2000) -> list[Finding]:
    found: list[Finding] = []
    for index in range(times):
        found += tracker.observe([item], {"accuracy": 0.3}, start + 100 * index)
    return found


def test_an_own_rule_is_driven_through_the_tracker_with_its_own_patience() -> None:
    item = reading(0.6, 0.05)
    assert observe(Tracker(TASK), item, 20) == []
    tracker = Tracker(TASK, rules=(forgotten, *RULES))
    [found] = observe(tracker, item, 20)
    assert (found.step, found.condition, found.advice) == (2100, "collapsed", "raise alpha")
    assert found.reason == "retention 0.05 is below 0.1, for 2 measurements"
    resumed = Tracker(TASK, rules=(forgotten, *RULES))
    resumed.load_state_dict(tracker.state_dict())
    assert observe(resumed, item, 20, start=4000) == []
    [over] = observe(resumed, reading(0.6, 0.95), 20, start=6000)
    assert (over.previous, over.condition) == ("collapsed", "healthy")


def test_rules_are_tried_in_order_and_those_of_the_package_still_apply() -> None:
    rules = (forgotten, *RULES)
    assert judge(reading(0.15, 0.54), Context(metrics=(0.2,)), TASK, rules).condition == "collapsed"  # type: ignore[union-attr]
    solved = Context(metrics=(0.99,))
    assert judge(reading(0.6, 0.05), solved, TASK, rules).condition == "collapsed"  # type: ignore[union-attr]
    assert judge(reading(0.6, 0.05), solved, TASK, (*RULES, forgotten)).condition == "healthy"  # type: ignore[union-attr]
    assert judge(reading(0.15, 0.54), solved, TASK, ()).condition == "healthy"  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [None, "collapsed", [None], [Verdict]])
def test_what_is_not_a_rule_is_refused_by_name(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"^rules"):
        Tracker(TASK, rules=wrong)  # type: ignore[arg-type]
