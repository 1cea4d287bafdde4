from __future__ import annotations

from ess_monitor.runtime import Breaker


def test_only_what_fails_often_enough_in_a_row_is_turned_off() -> None:
    breaker = Breaker(limit=3)
    turned_off = []
    for _ in range(5):
        turned_off.append(breaker.failed("a", "no"))
        breaker.succeeded(["b"])
    assert turned_off == [False, False, True, False, False]
    assert breaker.off == {"a": "no"}


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker(limit=2)
    for _ in range(5):
        breaker.failed("a", "no")
        breaker.succeeded(["a"])
    assert breaker.off == {}


def test_what_is_off_stays_off() -> None:
    breaker = Breaker(limit=1)
    breaker.failed("a", "first")
    breaker.succeeded(["a"])
    breaker.failed("a", "second")
    assert breaker.off == {"a": "first"}
