"""How much of a forward pass is taken when there was no memory to measure all of it."""

from __future__ import annotations

import logging

import torch

from ess_monitor import validation

logger = logging.getLogger("ess_monitor")

_SHARES = (1.0, 0.5, 0.0)
"""Everything that the configuration asks for, half of the samples and half of the heads, one of each."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that an allocation failed. On the CPU torch has no class for it, only a text.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"))
    True
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class SampleSizeBackoff:
    """Steps down when memory runs out, pauses at the end, and comes back.

    Full size, then half of the samples and heads, then one of each, then a pause of `pause` samples, after which it is
    tried again with one of each. After `patience` samples in a row that had enough memory it goes one step up. It
    works from sample to sample and not within one: an attempt made at once would take what the training needs next.

    Args:
        pause: samples that are skipped at the end of the ladder.
        patience: samples before a step up.

    Example:
        >>> portion = SampleSizeBackoff(pause=2)
        >>> shares = []
        >>> for _ in range(6):
        ...     share = portion.next()
        ...     shares.append(share)
        ...     if share is not None:
        ...         portion.lacked(share)
        >>> shares
        [1.0, 0.5, 0.0, None, None, 0.0]
    """

    def __init__(self, *, pause: int = 10, patience: int = 20) -> None:
        self._pause = validation.whole("pause", pause, 0)
        self._patience = validation.whole("patience", patience, 1)
        self._rung = 0
        self._skip = 0
        self._enough = 0
        self._said: set[str] = set()

    def next(self) -> float | None:
        """Share of samples and heads to take of the next sample, 0 for one of each; None: none, it is skipped."""
        if self._skip:
            self._skip -= 1
            return None
        return _SHARES[self._rung]

    def lacked(self, share: float) -> None:
        """A sample of this share found no memory. Only the first of several that were under way counts."""
        self._enough = 0
        if self._skip or share > _SHARES[self._rung]:
            return
        if self._rung + 1 < len(_SHARES):
            self._rung += 1
            rest = "half of the samples and heads" if self._rung == 1 else "one sample and one head"
            self._say(f"the next samples take {rest} of each layer")
        else:
            self._skip = self._pause
            self._say(f"{self._pause} samples are skipped before the next attempt")

    def sufficed(self, share: float) -> None:
        """A sample of this share had enough memory."""
        if self._rung == 0 or share < _SHARES[self._rung]:
            return
        self._enough += 1
        if self._enough >= self._patience:
            self._rung, self._enough = self._rung - 1, 0

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(
                "ess_monitor: no memory to measure a sample; %s. The training goes on. Lower capture.samples, "
                "capture.heads or capture.max_length.",
                what,
            )
