"""What `Monitor` is given, looked at before a run begins: a mistake is said where it was made, not hours later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.records import RunStatus


def check_run(
    strategy: str, world_size: int | None, precision: str, agreement: object, functions: Mapping[str, object]
) -> None:
    """Raise `ConfigError` unless these are facts of a run; `functions` by the names of their arguments."""
    validation.instance("strategy", strategy, str, hint='for example "ddp"')
    validation.instance("precision", precision, str, hint='for example "bf16-mixed"')
    if world_size is not None:
        validation.whole("world_size", world_size, 1)
    if agreement is not None and (isinstance(agreement, type) or not hasattr(agreement, "exchange")):
        raise ConfigError(
            f"agreement: {validation.type_of(agreement)} is not a StoreConsensus; leave it out to have one built"
        )
    for name, given in functions.items():
        validation.function(name, given)


def check_end(status: RunStatus, timeout_seconds: float) -> float:
    """The time limit, or `ConfigError` where it or the status is none."""
    if not isinstance(status, str) or status not in get_args(RunStatus):
        raise ConfigError(
            f"status: {validation.shown(status)} given; it must be one of {', '.join(get_args(RunStatus))}"
        )
    return check_timeout(timeout_seconds)


def check_timeout(timeout_seconds: float) -> float:
    """The time limit, or `ConfigError` where it is no number of seconds."""
    return validation.real("timeout_seconds", timeout_seconds, low=0, hint="seconds to wait at most")
