"""Runs that are dropped with a regularizer attached leave the compiler's settings to nobody else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ess_monitor.capture.hooks import compiler as eager


@pytest.fixture(autouse=True)
def _compiler_as_it_was() -> Iterator[None]:
    yield
    for holder in tuple(eager._SEEN_BY_COMPILER):
        eager.compile_without(holder)
