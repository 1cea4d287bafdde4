"""`ess-monitor modulation --shots`: ESS at a question over the number of solved examples before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ess_monitor.cli.analysis.output import add_without_result, put_out
from ess_monitor.cli.analysis.text import TextTokenizer, read_text
from ess_monitor.cli.tables import plain_table
from ess_monitor.errors import ConfigError
from ess_monitor.records import layer_title
from ess_monitor.report import render_shots_profile

if TYPE_CHECKING:
    from ess_monitor.analysis import ShotsProfile


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


def put_out_shots(result: ShotsProfile, *, as_json: bool, html: str | None) -> None:
    """Print a profile over shots as a table or as JSON, and write its page where one is asked for."""
    title = f"{result.model}: ESS at a question of {result.question} tokens, tau {result.tolerance:g}"
    table = plain_table(title, "layer", numbers=("shots", "tokens", "ESS", "entropy-ESS"))
    for layer in result.layers:
        for at in layer.at:
            sizes = (f"{at.effective_size:.3g}", f"{at.entropy_size:.3g}")
            table.add_row(layer_title(layer.layer), str(at.shots), str(at.tokens), *sizes)
    caption = (
        "Means over the tokens of the question and over heads; what follows is the same behind any number of shots."
    )
    add_without_result(table, result.layers, result.skipped, caption)
    page = render_shots_profile(result) if html is not None else None
    put_out(result.model_dump(mode="json"), table, page, as_json=as_json, html=html)
