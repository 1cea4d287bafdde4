"""Draws samples of a task by index, in batches, the same ones every time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from ess_monitor import validation
from ess_monitor.validation.settings import Settings

IGNORED = -100
"""Target of a position that is not asked: the `ignore_index` of torch's cross-entropy."""


class TaskConfig(Settings):
    """Sets what every task has."""

    model_config = ConfigDict(allow_inf_nan=False)

    takes_long_integers: ClassVar[bool] = True  # as a seed

    length: int = Field(default=64, ge=1, le=2**31 - 1)
    """Tokens per sample; 64 is the shortest of the paper's sweep."""
    samples: int = Field(default=128_000, ge=1, le=validation.LARGEST)
    """Size of the dataset. Samples are generated on access, so a large number costs nothing. Table 1 trains on 128 000
    and tests on 6 400."""
    seed: int = 0
    """Selects the stream of samples. Different seeds share none, so use another one for validation."""


class SyntheticTask(Dataset[tuple[Tensor, Tensor]], ABC):
    """Maps an index to (inputs, targets), both (length,) int64. Sample i depends on the config and i alone."""

    def __init__(self, samples: int) -> None:
        self._samples = validation.whole("samples", samples, 1)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one sample; a negative index counts from the end.

        Raises:
            IndexError: There is no such sample.
        """
        inputs_1L, targets_1L = self.batch([index])
        return inputs_1L[0], targets_1L[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the samples of a batch, drawn together. A DataLoader prefers this method to `__getitem__`."""
        return list(zip(*self.batch(indices), strict=True))

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return the samples stacked: (inputs, targets), both (batch, length) int64.

        Raises:
            IndexError: There is no such sample. Python's own error, by which a loop over a sequence ends.
            ConfigError: An index is not a whole number.
        """
        if isinstance(indices, Tensor) and indices.dim() == 1:
            indices = indices.tolist()
        indices = validation.wholes("indices", indices, -(2**63), 2**63 - 1)
        index_B = torch.tensor(indices, dtype=torch.int64)
        index_B = torch.where(index_B < 0, index_B + self._samples, index_B)
        wrong = (index_B < 0) | (index_B >= self._samples)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise IndexError(
                f"indices: index {indices[first]} is out of range for a dataset of {self._samples} samples."
            )
        return self._generate(index_B)

    @abstractmethod
    def _generate(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets) of these samples, both (B, L)."""
