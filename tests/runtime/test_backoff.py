from __future__ import annotations

import logging

import pytest
import torch

from ess_monitor.runtime import SampleSizeBackoff, is_out_of_memory


def shares(backoff: SampleSizeBackoff, lacking: str) -> list[float | None]:
    """The shares of as many samples as `lacking` has letters: x lacked memory, o had enough; a pause takes none."""
    taken = []
    for letter in lacking:
        share = backoff.next_share()
        taken.append(share)
        if share is not None:
            (backoff.record_out_of_memory if letter == "x" else backoff.record_success)(share)
    return taken


def test_down_the_ladder_into_a_pause_and_on_with_one_of_each() -> None:
    assert shares(SampleSizeBackoff(pause=3), "xxxxxxxxx") == [1.0, 0.5, 0.0, None, None, None, 0.0, None, None]


def test_one_step_up_after_enough_good_samples_in_a_row() -> None:
    assert shares(SampleSizeBackoff(patience=2), "xxoxxooooo") == [1.0, 0.5, 0.0, 0.0] + [None] * 6
    assert shares(SampleSizeBackoff(patience=2, pause=1), "xxooooo") == [1.0, 0.5, 0.0, 0.0, 0.5, 0.5, 1.0]
    assert shares(SampleSizeBackoff(patience=3), "xooxoooo") == [1.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5]


def test_of_several_samples_under_way_only_the_first_leads_a_step_down() -> None:
    backoff = SampleSizeBackoff()
    under_way = [backoff.next_share() for _ in range(3)]
    for share in under_way:
        backoff.record_out_of_memory(share)
    assert backoff.next_share() == 0.5


def test_a_small_sample_that_is_late_does_not_count_for_a_larger_size() -> None:
    backoff = SampleSizeBackoff(patience=1)
    backoff.record_out_of_memory(1.0)
    backoff.record_success(0.0)
    assert backoff.next_share() == 0.5


def test_each_step_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ess_monitor"):
        shares(SampleSizeBackoff(pause=1, patience=1), "xxxxxxxoxxxx")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 3
    assert "half of the samples and heads" in said[0]
    assert "capture.samples" in said[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("can't allocate memory"), False),
        (None, False),
    ],
    ids=repr,
)
def test_what_counts_as_a_lack_of_memory(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_this_machine_is_understood() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
