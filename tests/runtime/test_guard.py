from __future__ import annotations

import logging

import pytest

from ess_monitor.runtime import Guard


def test_an_exception_inside_is_counted_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("capture")
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(3):
            with guard:
                raise ValueError("boom")
    assert guard.failures == 3
    assert [r.message for r in caplog.records if "boom" in r.message and "goes on" in r.message] != []
    assert len(caplog.records) == 1, "only the first failure is logged"


def test_repeated_failures_turn_the_part_off_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("capture", limit=3)
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(5):
            with guard:
                raise ValueError("boom")
    assert not guard.open
    assert sum("is off for the rest of this run" in r.message for r in caplog.records) == 1


def test_a_failure_met_elsewhere_inside_a_block_counts_as_one_of_the_block() -> None:
    guard = Guard("measurement", limit=2)
    for _ in range(2):
        with guard:
            guard.failed("in the worker")
    assert not guard.open


def test_a_success_in_between_keeps_the_part_on() -> None:
    guard = Guard("capture", limit=2)
    for fail in (True, False, True, False, True):
        with guard:
            if fail:
                raise ValueError("boom")
    assert guard.open
    assert guard.failures == 3


def test_a_part_that_is_off_stays_off_whatever_comes_after(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("measurement", limit=2)
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(2):
            guard.failed("in the worker")
            guard.failed("in the worker")
            with guard:
                pass  # a sample that was still under way
            assert not guard.open
    assert sum("is off for the rest of this run" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_by_the_user_is_never_swallowed(error: type[BaseException]) -> None:
    with pytest.raises(error), Guard("capture"):
        raise error
