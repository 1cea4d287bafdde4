"""Fixtures of the adapters' tests."""

from __future__ import annotations

import pytest

from ess_monitor.interventions import identity_pull as regularizer


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a long sequence: worked through in parts."""
    monkeypatch.setattr(regularizer, "_ELEMENTS_AT_ONCE", 200)
