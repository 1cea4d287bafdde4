"""Tracks which parts of a monitor work: a guard for each part, a breaker for the layers, a backoff for memory."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Container, Mapping

from ess_monitor.errors import PartError, format_error
from ess_monitor.records import PARTS, HealthData, Part
from ess_monitor.runtime import Breaker, Guard, SampleSizeBackoff
from ess_monitor.runtime.guard import logger


class Health:
    """Holds what has failed in a run, and what is off because of it.

    A part fails as a whole and is turned off as a whole. A layer that fails in capture or measurement is counted in
    that part, and turned off alone. A lack of memory turns nothing off: samples become smaller.

    Args:
        strict: failures are kept, to be raised by `raise_pending`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.guards: Mapping[Part, Guard] = {part: Guard(part, strict=strict) for part in PARTS}
        self.layers = Breaker()
        self.skipped: dict[str, str] = {}
        """Layers that are not causal, with the reason. They have not failed, and are not measured any more."""
        self.backoff = SampleSizeBackoff()
        self._process_id = os.getpid()

    @property
    def forked(self) -> bool:
        """True in a forked child: threads are not there, and locks may have been held by one of them."""
        return os.getpid() != self._process_id

    def layers_failed(self, errors: Mapping[str, str], succeeded: set[str]) -> dict[str, str]:
        """Take in how one sample went: the errors of the layers that failed, and the names of those that did not.

        Returns:
            For every layer that is off from now on, the message of its reading.
        """
        self.layers.succeeded(succeeded)
        off = {name: error for name, error in errors.items() if self.layers.failed(name, error)}
        if off:
            name, error = next(iter(off.items()))
            others = f" and {len(off) - 1} more" if len(off) > 1 else ""
            logger.warning(
                "ess_monitor: layer %s%s failed in %d samples in a row and is off for the rest of this run; the last "
                "error was: %s. The others go on. Attach a new monitor to turn it on again.",
                name,
                others,
                self.layers.limit,
                error,
            )
        limit = self.layers.limit
        return {
            name: f"off after {limit} failures in a row: {error}; attach a new monitor to turn it on again"
            for name, error in off.items()
        }

    @property
    def not_measured(self) -> Container[str]:
        """Names of the layers that are off or skipped, at any later time as well."""
        return ChainMap(self.layers.off, self.skipped)

    def skip(self, reasons: Mapping[str, str]) -> None:
        """Leave layers out from now on, and log why."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if name not in self.skipped:
                self.skipped[name] = reason
                by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            logger.warning("ess_monitor: %s is skipped from now on: %s", ", ".join(names), reason)

    def raise_pending(self, take_export_errors: Callable[[], Mapping[str, BaseException]]) -> None:
        """Raise the first failure since the last call, of a part or of an exporter, where failures are to be raised.

        Args:
            take_export_errors: returns the first error of each exporter since its last call.

        Raises:
            PartError: what failed, from its cause.
        """
        if not self.strict:
            return
        for guard in self.guards.values():
            guard.raise_pending()
        for name, error in take_export_errors().items():
            raise PartError("export", f"exporter {name!r} failed: {format_error(error)}") from error

    def data(self, exporters_off: tuple[str, ...]) -> HealthData:
        """Return it as it is shown in a snapshot."""
        return HealthData(
            part_failures_total={part: guard.failures for part, guard in self.guards.items()},
            parts_off=tuple(part for part, guard in self.guards.items() if not guard.open),
            layers_off=tuple(sorted(self.layers.off)),
            exporters_off=exporters_off,
        )
