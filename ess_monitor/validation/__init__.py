"""Checks arguments of public functions.

Each check returns the value, or raises an error that names the argument, the value, what is allowed and what to do. A
check takes less than a microsecond and never reads the values of a tensor.
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
Error = type[EssMonitorError]

_CREDENTIALS = re.compile(r"//[^/@\s]*@")
"""User name and password in a URL."""

LARGEST = 2**53
"""Largest whole number that is allowed by default: above it float64 is not exact."""


def shown(value: Any) -> str:
    """Return `value` as short text for an error message; never raises.

    A container shows its type only: its settings may hold a URL with a password.

    Examples:
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
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown_version(version: object) -> str:
    """Return the version of a saved state for an error message; of what is not one, only the type.

    Examples:
        >>> shown_version(2), shown_version(None), shown_version("2")
        ('2', 'None', 'of type str')
    """
    plain = version is None or (isinstance(version, int) and abs(version) < 2**63)
    return str(version) if plain else f"of type {type(version).__name__}"


def type_of(value: object) -> str:
    """Return the type of `value` as text, without its content.

    Examples:
        >>> type_of({"password": "x"}), type_of(dict), type_of(None)
        ('a dict', 'the class dict', 'None')
    """
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def whole(name: str, value: Any, low: int, high: int = LARGEST, *, hint: str = "", error: Error = ConfigError) -> int:
    """Return a whole number in low..high. NumPy's integers are allowed; bools and floats are not.

    Examples:
        >>> whole("width", 0, 1)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: width=0 must be a whole number from 1 up.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except Exception:  # tensors of several elements or without memory raise various errors
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
    error: Error = ConfigError,
) -> float:
    """Return a finite number from `low` (or above `above`) up to `high`.

    Examples:
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
        end = f" to {high:g}" if high < math.inf else ""
        raise error(_message(name, value, f"a finite number{start}{end}", hint))
    return number


def instance(
    name: str, value: Any, kind: type[T] | tuple[type[T], ...], *, hint: str = "", error: Error = ConfigError
) -> T:
    """Return an object of class `kind`, or of one of several classes.

    Examples:
        >>> instance("config", {}, int)
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: config is a dict; it must be of type int.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise error(_type_message(name, value, f"of type {' or '.join(each.__name__ for each in kinds)}", hint))
    return value


def optional(name: str, value: Any, kind: type[T], *, hint: str = "or leave it out") -> T | None:
    """Return an object of class `kind`, or None. Other false values, an empty mapping for example, are refused."""
    return None if value is None else instance(name, value, kind, hint=hint)


def flag(name: str, value: Any) -> bool:
    """Return True or False; other true or false values are refused."""
    if not isinstance(value, bool):
        raise ConfigError(_message(name, value, "True or False"))
    return value


def function(name: str, value: Any, *, hint: str = "", error: Error = ConfigError) -> Callable[..., Any]:
    """Return something that can be called. A class is refused: most often its instance was meant."""
    if not callable(value) or isinstance(value, type):
        raise error(_message(name, value, "a function", hint))
    given: Callable[..., Any] = value
    return given


def listed(name: str, values: Any, *, hint: str = "") -> tuple[Any, ...]:
    """Return the items of a list or of another iterable; a string is refused."""
    found = _items(values)
    if found is None:
        raise ConfigError(_type_message(name, values, "a list", hint))
    return found


def several(name: str, values: Any, kind: type[T], *, hint: str = "") -> tuple[T, ...]:
    """Return the items of a list or of another iterable, all of class `kind`."""
    wanted = f"a list of {kind.__name__}"
    found = _items(values)
    if found is None:
        raise ConfigError(_type_message(name, values, wanted, hint))
    for item in found:
        if not isinstance(item, kind):
            raise ConfigError(_type_message(name, item, wanted, hint, verb="holds"))
    return found


def wholes(
    name: str, values: Any, low: int, high: int = LARGEST, *, hint: str = "", error: Error = ConfigError
) -> tuple[int, ...]:
    """Return whole numbers in low..high."""
    found = _items(values)
    if found is None:
        raise error(_message(name, values, "a list of whole numbers", hint))
    return tuple(whole(name, value, low, high, hint=hint, error=error) for value in found)


def tensor(name: str, value: Any, expected: str, dimensions: Iterable[int], *, error: Error) -> torch.Tensor:
    """Return a real floating tensor with one of these numbers of dimensions."""
    if not _is_tensor(value):
        raise error(f"{name} is {shown(value)}; pass a floating tensor of shape {expected}.")
    if not value.is_floating_point():
        raise error(f"{name} has dtype {value.dtype}; pass a real floating tensor of shape {expected}.")
    if value.dim() not in dimensions:
        raise error(f"{name} has shape {tuple(value.shape)}, expected {expected}.")
    given: torch.Tensor = value
    return given


def has_long_integer(value: object) -> bool:
    """Return whether `value` holds an integer of more than 64 bits, at any depth of mappings and lists.

    Python refuses to write integers of thousands of digits, so they break error messages and files.

    Examples:
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
    # Packages that never need torch use this module too, so it must not import torch.
    torch_here = sys.modules.get("torch")
    return torch_here is not None and isinstance(value, torch_here.Tensor)


def _items(values: Any) -> tuple[Any, ...] | None:
    if isinstance(values, (str, bytes, type)) or _is_tensor(values):
        return None
    try:
        return tuple(values)
    except TypeError:
        return None


def _message(name: str, value: Any, allowed: str, hint: str = "") -> str:
    return f"{name}={shown(value)} must be {allowed}{f'; {hint}' if hint else ''}."


def _type_message(name: str, value: Any, allowed: str, hint: str, *, verb: str = "is") -> str:
    return f"{name} {verb} {type_of(value)}; it must be {allowed}{f', {hint}' if hint else ''}."
