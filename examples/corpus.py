"""Reads a text corpus that every Python installation has: the chapters of the language reference that `help()` prints.

It depends on the version of Python alone, not on the installed packages.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = 256
"""A token is a byte."""


def read_corpus() -> bytes:
    """Return the chapters in the order of their names, about 450 kB."""
    return "\n".join(text for _, text in sorted(topics.items())).encode()


def windows(length: int) -> Tensor:
    """Return the text in windows, (windows, length) of bytes.

    `windows(length + 1)` gives inputs and targets of `length` bytes each.
    """
    data = torch.frombuffer(bytearray(read_corpus()), dtype=torch.uint8)
    return data[: len(data) // length * length].reshape(-1, length)
