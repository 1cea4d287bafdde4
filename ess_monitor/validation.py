"""Arguments of public functions, looked at where they come in.

Each function gives the value back, or raises with the argument's name, the value, what is allowed, and what to do. They
cost less than a microsecond and never read what a tensor holds.
"""

from __future__ import annotations

import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar

from ess_monitor.errors import ConfigError, EssMonitorError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_CREDENTIALS = re.compile(r"//[^/@\s]*@")
"""A user and a password in an address."""

LARGEST = 2**53
"""Largest whole number that is let through where no other end is named: above it float64 is not exact, and sizes, steps
and seeds never get there."""


def shown(value: Any) -> str:
    """`value` for an error message: short, and never an error itself. Of what may have settings in it, and with them an
    address with a password, only the type is told.

    Example:
        >>> import torch
        >>> shown(torch.zeros(2, 3)), shown("x" * 200)[-5:], shown(10**5000)
        ('a torch.float32 tensor of shape (2, 3)', 'xx...', 'a value of type int')
    """
    if _is_tensor(value):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    numbers_only = isinstance(value, (list, tuple)) and all(isinstance(item, numbers.Number) for item in value)
    if not (value is None or numbers_only or isinstance(value, (str, bytes, numbers.Number, type, slice))):
        return type_of(value)
    try:
        text = _CREDENTIALS.sub("//...@", repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def type_of(value: object) -> str:
    """What `value` is, without what is in it.

    Example:
        >>> type_of({"password": "x"}), type_of(dict), type_of(None)
        ('a dict', 'the class dict', 'None')
    """
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def whole(
    name: str,
    value: Any,
    low: int,
    high: int = LARGEST,
    *,
    hint: str = "",
    error: type[EssMonitorError] = ConfigError,
) -> int:
    """A whole number in low..high. NumPy's integers are; flags, and floats without a fraction, are not.

    Example:
        >>> whole("width", 0, 1)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: width=0 must be a whole number from 1 up.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except Exception:  # text, a float, a tensor of several elements or without memory
        number = None
    if number is None or not low <= number <= high:
        until = "up" if high == LARGEST and number is not None and number <= high else f"to {high}"
        raise error(_message(name, value, f"a whole number from {low} {until}", hint))
    return number


def real(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    hint: str = "",
    error: type[EssMonitorError] = ConfigError,
) -> float:
    """A finite number from `low` (or above `above`) up to `high`.

    Example:
        >>> real("beta", float("nan"), above=0, hint="the paper uses 16")
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: beta=nan must be a finite number above 0; the paper uses 16.
    """
    try:
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(value) if fits else math.nan
    except OverflowError:
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high and number > above):
        start = f" above {above:g}" if above > -math.inf else f" from {low:g} up" if low > -math.inf else ""
        raise error(
            _message(name, value, f"a finite number{start}" + (f" to {high:g}" if high < math.inf else ""), hint)
        )
    return number


def instance(
    name: str,
    value: Any,
    kind: type[T] | tuple[type[T], ...],
    *,
    hint: str = "",
    error: type[EssMonitorError] = ConfigError,
) -> T:
    """An object of class `kind`, or of one of several.

    Example:
        >>> instance("config", {}, int)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: config is a dict; it must be of type int.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = f"of type {' or '.join(each.__name__ for each in kinds)}"
        raise error(f"{name} is {type_of(value)}; it must be {wanted}{f', {hint}' if hint else ''}.")
    return value


def optional(
    name: str, value: Any, kind: type[T], *, hint: str = "", error: type[EssMonitorError] = ConfigError
) -> T | None:
    """An object of class `kind`, or None. What only counts as false is not None: an empty mapping is no settings."""
    return None if value is None else instance(name, value, kind, hint=hint or "or leave it out", error=error)


def flag(name: str, value: Any, *, hint: str = "", error: type[EssMonitorError] = ConfigError) -> bool:
    """True or False, and nothing that only counts as one of them."""
    if not isinstance(value, bool):
        raise error(_message(name, value, "True or False", hint))
    return value


def function(
    name: str, value: Any, *, hint: str = "", error: type[EssMonitorError] = ConfigError
) -> Callable[..., Any]:
    """Something that can be called. A class is taken for a mistake: it was meant to be made into an object first."""
    if not callable(value) or isinstance(value, type):
        raise error(_message(name, value, "a function", hint))
    given: Callable[..., Any] = value
    return given


def listed(name: str, values: Any, *, hint: str = "", error: type[EssMonitorError] = ConfigError) -> tuple[Any, ...]:
    """What is in a list, or in anything else that gives its items one by one; a text is one thing."""
    found = _one_by_one(values)
    if found is None:
        raise error(f"{name} is {type_of(values)}; it must be a list{f', {hint}' if hint else ''}.")
    return found


def several(
    name: str, values: Any, kind: type[T], *, hint: str = "", error: type[EssMonitorError] = ConfigError
) -> tuple[T, ...]:
    """Some objects of class `kind`, in a list or anything else that gives them one by one."""
    found = _one_by_one(values)
    wrong = [values] if found is None else [item for item in found if not isinstance(item, kind)]
    if found is None or wrong:
        place = "is" if found is None else "holds"
        wanted = f"a list of {kind.__name__}{f', {hint}' if hint else ''}"
        raise error(f"{name} {place} {type_of(wrong[0])}; it must be {wanted}.")
    return found


def wholes(
    name: str,
    values: Any,
    low: int,
    high: int = LARGEST,
    *,
    hint: str = "",
    error: type[EssMonitorError] = ConfigError,
) -> tuple[int, ...]:
    """Some whole numbers in low..high."""
    found = _one_by_one(values)
    if found is None:
        raise error(_message(name, values, "a list of whole numbers", hint))
    return tuple(whole(name, value, low, high, hint=hint, error=error) for value in found)


def tensor(
    name: str, value: Any, expected: str, dimensions: Iterable[int], *, error: type[EssMonitorError]
) -> torch.Tensor:
    """A real floating tensor with one of these numbers of dimensions."""
    if not _is_tensor(value):
        raise error(f"{name} is {shown(value)}; pass a floating tensor of shape {expected}.")
    if not value.is_floating_point():
        raise error(f"{name} has dtype {value.dtype}; pass a real floating tensor of shape {expected}.")
    if value.dim() not in dimensions:
        raise error(f"{name} has shape {tuple(value.shape)}, expected {expected}.")
    given: torch.Tensor = value
    return given


def has_long_integer(value: object) -> bool:
    """True where a whole number of more than 64 bits is in `value`, at any depth of mappings and lists.

    Python does not write out numbers of thousands of digits, so that neither an error nor a file could hold one.

    Example:
        >>> has_long_integer({"a": [1, (2**63,)]}), has_long_integer({"a": [1, 2.0**63]})
        (True, False)
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, int):
            if not -(2**63) <= item < 2**63:
                return True
        elif isinstance(item, (Mapping, list, tuple, set, frozenset)) and id(item) not in seen:
            seen.add(id(item))
            waiting += [*item, *item.values()] if isinstance(item, Mapping) else item
    return False


def _is_tensor(value: object) -> bool:
    """Rooms without a tensor check their arguments here too, and must not import torch for it."""
    torch_here = sys.modules.get("torch")
    return torch_here is not None and isinstance(value, torch_here.Tensor)


def _one_by_one(values: Any) -> tuple[Any, ...] | None:
    if isinstance(values, (str, bytes, type)) or _is_tensor(values):
        return None
    try:
        return tuple(values)
    except TypeError:
        return None


def _message(name: str, value: Any, allowed: str, hint: str) -> str:
    return f"{name}={shown(value)} must be {allowed}{f'; {hint}' if hint else ''}."
