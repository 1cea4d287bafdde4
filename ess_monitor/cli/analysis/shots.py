"""`ess-monitor modulation --shots`: ESS at a question over the number of solved examples before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from ess_monitor.cli.analysis.text import TextTokenizer, read_text
from ess_monitor.errors import ConfigError


def prompts_of(shots: Sequence[Path], text: Path, tokenizer: TextTokenizer) -> tuple[list[list[int]], int]:
    """Return the ids of the text behind 0, 1, ... shots, and how many of their last tokens are the same in all.

    Raises:
        ConfigError: a file cannot be read, or the text has fewer than two tokens.
    """
    question = read_text(text)
    before = ["", *map(read_text, shots)]
    prompts = [tokenizer.encode("".join(before[: k + 1]) + question) for k in range(len(before))]
    columns = zip(*(reversed(ids) for ids in prompts), strict=False)  # from the end, as far as the shortest
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    asked = min(shared, len(tokenizer.encode(question)))
    if asked < 2:
        raise ConfigError(f"text: {text} has {asked} tokens of its own; at least 2 are needed, give a longer text")
    return prompts, asked
