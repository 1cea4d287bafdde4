"""How many inputs a fuzz test gets, and the values that break readers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

LONG = hypothesis.settings.get_current_profile_name() == "long"
"""`HYPOTHESIS_PROFILE=long`, which `make fuzz` sets."""


RAN: Counter[str] = Counter()
"""Inputs that each test was given in this process."""


def _counted(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def counted(*args: Any, **kwargs: Any) -> None:
        RAN[test.__name__] += 1
        test(*args, **kwargs)

    return counted


def fuzz(usual: int, long: int) -> Callable[[Any], Any]:
    """Give the test `usual` inputs in the suite, and `long` in the long profile."""

    def decorate(test: Any) -> Any:
        test.hypothesis.inner_test = _counted(test.hypothesis.inner_test)
        limit = pytest.mark.timeout(3600 if LONG else 120)  # a reader that hangs is found by the clock
        return limit(hypothesis.settings(max_examples=long if LONG else usual)(test))

    return decorate


def is_short(message: str, limit: int) -> None:
    """An error says something, and does not repeat all that it was given."""
    assert 0 < len(message) < limit


ODD_TEXT = st.sampled_from(
    [
        "",
        "\0",
        "\ud800",
        "\x1b[2J",
        "\u202e",
        "\ufeff",
        "<script>",
        "a" * 300,
        "__class__",
        "1e999",
        "９９",
        "é",
        "\x85",
    ]
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, True]),
    st.sampled_from([5000]).map(lambda digits: 10**digits),  # too long to be written out, here as elsewhere
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ODD_TEXT, st.text(max_size=8), st.binary(max_size=4))


def nested(scalars: st.SearchStrategy[Any] = SCALARS, names: st.SearchStrategy[Any] | None = None) -> Any:
    """Values as JSON has them, and some that only Python has."""
    keys = ODD_TEXT if names is None else names
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=6,
    )


@st.composite
def damaged(draw: st.DrawFn, whole: Any, anything: st.SearchStrategy[Any]) -> Any:
    """`whole` with one to three of its values, at any depth, replaced, removed or moved into each other."""
    for _ in range(draw(st.integers(1, 3))):
        whole = _damage_one(draw, whole, anything)
    return whole


def _damage_one(draw: st.DrawFn, value: Any, anything: st.SearchStrategy[Any]) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 7)):
        name = draw(st.sampled_from(list(value)))
        if not draw(st.integers(0, 9)):
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: _damage_one(draw, value[name], anything)}
    if isinstance(value, list) and value and draw(st.integers(0, 7)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _damage_one(draw, value[place], anything), *value[place + 1 :]]
    return draw(anything)


@st.composite
def mutated(draw: st.DrawFn, whole: bytes, pieces: list[bytes]) -> bytes:
    """`whole` after a few cuts, repetitions and insertions of `pieces` or of any bytes."""
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(whole)))
        end = min(len(whole), start + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.sampled_from(pieces), st.binary(max_size=6)))
        times = draw(st.sampled_from([0, 1, 1, 1, 2, 200]))
        whole = whole[:start] + piece * times + whole[end:]
    return whole
