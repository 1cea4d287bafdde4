"""One valid call of a public callable, from which wrong ones are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """`call(**arguments())` succeeds."""

    call: Callable[..., Any]
    """The public callable, and a use of what it gives where a wrong value could hide until then."""
    arguments: Callable[[], dict[str, Any]] = dict
    """Fresh valid arguments; those that are not given keep their default, and are made wrong all the same."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Argument -> what messages call it, where that is something else; alternatives stand between bars."""
    exempt: Mapping[str, str] = field(default_factory=dict)
    """Argument -> why it is not made wrong."""
    allowed: Mapping[str, tuple[type[BaseException], str]] = field(default_factory=dict)
    """Argument -> an error that is not ours and may be raised all the same, and why."""
