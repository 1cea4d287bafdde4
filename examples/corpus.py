"""Reads a text corpus that every Python installation has: licenses and documentation of the installed packages."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
"""A token is a byte."""

_NAMES = ("LICEN", "COPYING", "NOTICE", "METADATA")
_ENDINGS = (".md", ".rst", ".txt")


def read_corpus(least_bytes: int = 400_000, most_bytes: int = 2_000_000) -> bytes:
    """Return the texts in the order of the packages' names, each once; exit if there is too little text to train on."""
    texts: dict[str, None] = {}  # an ordered set: licenses repeat
    size = 0
    for distribution in sorted(distributions(), key=lambda d: d.metadata["Name"] or ""):
        for file in distribution.files or ():
            if not (file.name.upper().startswith(_NAMES) or file.suffix in _ENDINGS):
                continue
            path = Path(str(file.locate()))
            if path.is_file() and 500 < path.stat().st_size < 200_000:
                text = path.read_text(encoding="utf-8", errors="ignore")
                if text not in texts:
                    texts[text] = None
                    size += len(text)
        if size > most_bytes:
            break
    if size < least_bytes:
        raise SystemExit(f"only {size} bytes of text found in the installed packages; {least_bytes} are needed")
    return "\n".join(texts).encode()[:most_bytes]


def windows(length: int) -> Tensor:
    """Return the text in windows, (windows, length) of bytes.

    `windows(length + 1)` gives inputs and targets of `length` bytes each.
    """
    data = torch.frombuffer(bytearray(read_corpus()), dtype=torch.uint8)
    return data[: len(data) // length * length].reshape(-1, length)
