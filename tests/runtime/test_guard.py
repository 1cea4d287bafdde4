from __future__ import annotations

import logging
import pickle

import pytest

from ess_monitor import EssMonitorError, PartError
from ess_monitor.runtime import Guard


def fail(guard: Guard) -> None:
    with guard:
        raise ValueError("boom")


def test_an_exception_inside_is_counted_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("capture")
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(3):
            fail(guard)
    assert guard.failures == 3
    assert [r.message for r in caplog.records if "boom" in r.message and "goes on" in r.message] != []
    assert len(caplog.records) == 1, "only the first failure is logged"


def test_repeated_failures_turn_the_part_off_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("capture", limit=3)
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(5):
            fail(guard)
    assert not guard.open
    assert sum("is off for the rest of this run" in r.message for r in caplog.records) == 1


def test_a_success_in_between_keeps_the_part_on() -> None:
    guard = Guard("capture", limit=2)
    for bad in (True, False, True, False, True):
        with guard:
            if bad:
                raise ValueError("boom")
    assert guard.open
    assert guard.failures == 3


def test_a_good_beginning_is_no_success() -> None:
    guard = Guard("capture", limit=2)
    for _ in range(2):
        with guard.beginning():
            pass
        fail(guard)
    assert not guard.open


def test_a_beginning_that_fails_counts_like_any_block() -> None:
    guard = Guard("capture", limit=2)
    for _ in range(2):
        with guard.beginning():
            raise ValueError("boom")
    assert not guard.open
    assert guard.last_error == "ValueError: boom"


def test_a_block_inside_another_that_ends_well_is_no_success_of_the_unit() -> None:
    guard = Guard("capture", limit=2)
    for _ in range(2):
        with guard:
            with guard:
                pass
            raise ValueError("boom")
    assert not guard.open


def test_a_failure_of_a_block_inside_another_is_not_forgotten_at_the_end_of_the_unit() -> None:
    guard = Guard("capture", limit=2)
    for _ in range(2):
        with guard:
            fail(guard)
    assert not guard.open


def test_after_a_unit_that_failed_a_good_one_starts_the_count_anew() -> None:
    guard = Guard("capture", limit=2)
    for bad in (True, False, True):
        with guard, guard:
            if bad:
                raise ValueError("boom")
    assert guard.open


def test_what_is_only_counted_turns_nothing_off(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("measurement", limit=2)
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(9):
            guard.count("layer a: in the worker")
    assert guard.open
    assert guard.failures == 9
    assert len(caplog.records) == 1


def test_a_part_that_is_off_stays_off_whatever_comes_after(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("measurement", limit=2)
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        for _ in range(2):
            fail(guard)
            fail(guard)
            with guard:
                pass  # a sample that was still under way
            assert not guard.open
    assert sum("is off for the rest of this run" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_by_the_user_is_never_swallowed(error: type[BaseException]) -> None:
    with pytest.raises(error), Guard("capture"):
        raise error
    with pytest.raises(error), Guard("capture").beginning():
        raise error


class TestStrict:
    def test_the_first_failure_waits_to_be_raised_with_its_cause_once(self) -> None:
        guard = Guard("capture", strict=True)
        fail(guard)
        guard.count("another")
        with pytest.raises(PartError, match=r"^capture: ValueError: boom; fix the cause") as raised:
            guard.raise_pending()
        assert raised.value.part == "capture"
        assert isinstance(raised.value.__cause__, ValueError)
        assert isinstance(raised.value, EssMonitorError)
        guard.raise_pending()

    def test_without_it_nothing_is_kept(self) -> None:
        guard = Guard("capture")
        fail(guard)
        guard.raise_pending()

    def test_the_error_can_be_sent_to_another_process(self) -> None:
        error = PartError("capture", "no memory")
        copied = pickle.loads(pickle.dumps(error))
        assert (type(copied), copied.part, str(copied)) == (PartError, "capture", str(error))


class Untellable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def test_an_error_without_a_text_is_told_by_its_type() -> None:
    guard = Guard("capture")
    with guard:
        raise Untellable
    assert guard.last_error == "Untellable"
