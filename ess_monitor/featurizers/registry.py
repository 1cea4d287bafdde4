"""Builds featurizers by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.featurizers.head_mixers import GLA, GLAS6, LA, SA, WLA
from ess_monitor.featurizers.parts import LARGEST_SIZE
from ess_monitor.featurizers.s6 import S6

FEATURIZERS: dict[str, type[nn.Module]] = {"la": LA, "wla": WLA, "gla": GLA, "sa": SA, "s6": S6, "gla_s6": GLAS6}
"""The paper's featurizers by name."""

_SIZES = {"self", "width", "num_heads", "expand_k", "state_size"}


def build_mixer(name: str, width: int, num_heads: int, state_size: int, **options: Any) -> nn.Module:
    """Return a mixer whose state has `state_size` dimensions per channel, whichever featurizer it is.

    Args:
        name: key of `FEATURIZERS`.
        width: channels in and out.
        num_heads: heads of the head-based featurizers. S6 has one operator per channel and takes no heads.
        state_size: TSS per channel; for SA, whose TSS grows with the position, the dimensions of q and k per head.
        options: further arguments of that featurizer (`beta`, `alpha`, `rope_base`, ...).

    Raises:
        ConfigError: The name or an option is unknown, or a value is out of range.

    Examples:
        >>> [build_mixer(name, 32, 2, 8).state_capacity for name in ("la", "wla", "gla", "sa", "s6", "gla_s6")]
        [8, 8, 8, None, 8, 8]
    """
    options_of(name)
    check_options((name,), options)
    if name == "s6":
        return S6(width, state_size=state_size, **options)
    width = validation.whole("width", width, 1, LARGEST_SIZE)
    num_heads = validation.whole("num_heads", num_heads, 1, LARGEST_SIZE)
    state_size = validation.whole("state_size", state_size, 1, LARGEST_SIZE)
    return FEATURIZERS[name](width, num_heads, expand_k=state_size * num_heads / width, **options)


def options_of(name: str) -> frozenset[str]:
    """Return the options of a featurizer besides its sizes.

    Raises:
        ConfigError: There is no such featurizer.

    Examples:
        >>> sorted(options_of("wla"))
        ['beta', 'qk_bias_std']
    """
    if not isinstance(name, str) or name not in FEATURIZERS:
        raise ConfigError(f"featurizer {validation.shown(name)} is unknown; take one of {', '.join(FEATURIZERS)}.")
    return frozenset(inspect.signature(FEATURIZERS[name].__init__).parameters) - _SIZES


def check_options(names: Collection[str], options: Collection[str]) -> None:
    """Raise `ConfigError` unless every option belongs to at least one of the named featurizers.

    Examples:
        >>> check_options(("wla", "sa"), {"beta", "rope_base"})
        >>> check_options(("wla",), {"alpha"})
        Traceback (most recent call last):
        ...
        ess_monitor.errors.ConfigError: option 'alpha' is unknown to wla; their options are beta, qk_bias_std.
    """
    names = validation.several("names", names, str, hint="names of featurizers")
    if not names:
        raise ConfigError(f"names is empty; take at least one of {', '.join(FEATURIZERS)}.")
    options = validation.several("options", options, str, hint="names of options")
    known = frozenset[str]().union(*(options_of(name) for name in names))
    for option in sorted(options):
        if option not in known:
            listed = f"their options are {', '.join(sorted(known))}" if known else "they have no options"
            raise ConfigError(f"option {option!r} is unknown to {', '.join(names)}; {listed}.")
