"""`ess-monitor profile --lengths`: ESS and decay over the length of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ess_monitor.cli.analysis.output import add_without_result, put_out
from ess_monitor.cli.tables import capacity_text, plain_table
from ess_monitor.records import layer_title
from ess_monitor.report import render_length_profile

if TYPE_CHECKING:
    from ess_monitor.analysis import LengthProfile


def put_out_lengths(result: LengthProfile, title: str, *, as_json: bool, html: str | None) -> None:
    """Print a profile over lengths as a table or as JSON, and write its page where one is asked for."""
    columns = ("length", "ESS", "TSS", "ESS without decay", "norm of A's product", "entropy")
    table = plain_table(title, "layer", numbers=columns)
    for layer in result.layers:
        for at in layer.lengths:
            capacity = capacity_text(_number(at.state_capacity), grows=layer.capacity_grows)
            numbers = (at.undecayed_size, at.decay_product_norm, at.entropy_size)
            sizes = (str(at.length), _number(at.effective_size), capacity)
            table.add_row(layer_title(layer.layer), *sizes, *(_number(value) for value in numbers))
    caption = "At the midpoint of the first tokens of one input; means over samples and heads."
    add_without_result(table, result.layers, result.skipped, caption)
    page = render_length_profile(result) if html is not None else None
    put_out(result.model_dump(mode="json"), table, page, as_json=as_json, html=html)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
