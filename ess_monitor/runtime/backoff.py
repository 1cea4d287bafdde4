"""Reduces the size of the next samples after memory ran out."""

from __future__ import annotations

import logging

import torch

from ess_monitor import validation

logger = logging.getLogger("ess_monitor")

_SHARES = (1.0, 0.5, 0.0)
"""Shares of the configured samples and heads: all, half, and one sample and one head."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that an allocation failed. On the CPU torch has no class for it, only a text.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"))
    True
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class SampleSizeBackoff:
    """Takes smaller samples when memory runs out, pauses when the smallest fails, and grows back.

    The sizes are: full size, half of the samples and heads, one of each. Where one of each runs out of memory, `pause`
    samples are skipped before the next attempt with one of each. After `patience` samples in a row with enough memory
    the size grows by one level. A failed sample is not retried at once: that would take the memory that the training
    needs next.

    Args:
        pause: samples that are skipped when the smallest size fails.
        patience: samples in a row before the size grows.

    Examples:
        >>> backoff = SampleSizeBackoff(pause=2)
        >>> shares = []
        >>> for _ in range(6):
        ...     share = backoff.next_share()
        ...     shares.append(share)
        ...     if share is not None:
        ...         backoff.record_out_of_memory(share)
        >>> shares
        [1.0, 0.5, 0.0, None, None, 0.0]
    """

    def __init__(self, *, pause: int = 10, patience: int = 20) -> None:
        self._pause = validation.whole("pause", pause, 0)
        self._patience = validation.whole("patience", patience, 1)
        self._level = 0
        self._skips_left = 0
        self._successes = 0
        self._logged: set[str] = set()

    def next_share(self) -> float | None:
        """Return the share of samples and heads to take next, 0 for one of each; None to skip the sample."""
        if self._skips_left:
            self._skips_left -= 1
            return None
        return _SHARES[self._level]

    def record_out_of_memory(self, share: float) -> None:
        """Reduce the size after a sample of this share ran out of memory.

        Of several samples under way only the first counts: the others were taken before the reduction.
        """
        self._successes = 0
        if self._skips_left or share > _SHARES[self._level]:
            return
        if self._level + 1 < len(_SHARES):
            self._level += 1
            rest = "half of the samples and heads" if self._level == 1 else "one sample and one head"
            self._log_once(f"the next samples take {rest} of each layer")
        else:
            self._skips_left = self._pause
            self._log_once(f"{self._pause} samples are skipped before the next attempt")

    def record_success(self, share: float) -> None:
        """Count a sample of this share that had enough memory, and grow the size after `patience` of them."""
        if self._level == 0 or share < _SHARES[self._level]:
            return
        self._successes += 1
        if self._successes >= self._patience:
            self._level, self._successes = self._level - 1, 0

    def _log_once(self, consequence: str) -> None:
        if consequence not in self._logged:
            self._logged.add(consequence)
            logger.warning(
                "ess_monitor: no memory to measure a sample; %s. The training goes on. Lower capture.samples, "
                "capture.heads, capture.max_length or capture.max_bytes.",
                consequence,
            )
