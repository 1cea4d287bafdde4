"""Text and numbers as figures show them."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence

LABEL_CHARACTERS = 18
"""Longer names lose their beginning beside an axis, so that a telephone has room for the figure."""


def short_names(names: Sequence[str]) -> list[str]:
    """Return labels of layers, each once: without the parts that all names begin with, and short enough for an axis.

    >>> short_names(["model.layers.0.mixer", "model.layers.1.mixer"])
    ['0.mixer', '1.mixer']
    """
    start = len(shared_prefix(names))
    folded = [name[start:] or "root" for name in names]
    cut = [name if len(name) <= LABEL_CHARACTERS else f"…{name[1 - LABEL_CHARACTERS :]}" for name in folded]
    taken = Counter(cut)
    return [plain(f"{label} #{k}" if taken[label] > 1 else label) for k, label in enumerate(cut, start=1)]


def shared_prefix(names: Sequence[str]) -> str:
    """Return the parts that all of several names begin with, and the dot behind them; the last part is never folded.

    >>> shared_prefix(["model.layers.0.mixer", "model.layers.1.mixer"]), shared_prefix(["a.b"]), shared_prefix(["a"])
    ('model.layers.', '', '')
    """
    parts = [name.split(".")[:-1] for name in names] if len(names) > 1 else [[]]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "".join(f"{part}." for part in shared)


def plain(text: str) -> str:
    """Return text that Plotly, which reads some HTML, shows as it is."""
    return html.escape(printable(text), quote=False)


def printable(text: str) -> str:
    """Replace control characters, among them those that turn the direction of text."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def number(value: float) -> str:
    """Format a number for a label.

    >>> [number(value) for value in (0.0, 0.25, 1500.0, 25000.0, 1.5e6, 1.5e-5)]
    ['0', '0.25', '1500', '25k', '1.5M', '1.5e-05']
    """
    for smallest, power, sign in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= smallest:
            return f"{value / power:.4g}{sign}"
    return f"{value:.4g}"


def exact(value: float) -> float | None:
    """Return a number as JSON can hold it, a whole one as an int; None for what is not finite."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value


def rounded(value: float) -> float | None:
    """Return a number to four digits; None for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
