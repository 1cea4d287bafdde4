"""Lays out the custom-scalars page of TensorBoard, and makes the spikes that mark actions in its charts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ess_monitor.exporters.scalars import LOSS_RATIO_TAG, OVERHEAD_TAG, UTILIZATION_TAG, layer_tag, scalar_tag
from ess_monitor.records import CONDITIONS, layer_title

Layout = dict[str, dict[str, list[object]]]
"""category -> chart title -> [kind, tags], as `SummaryWriter.add_custom_scalars` takes it."""
_LAYER = "ESS layer: "

OPEN_LAYERS = 8
"""Most layers whose charts are open at first. A browser takes minutes to draw those of a hundred."""


def custom_scalars_layout(layers: Iterable[str], *, modulation: bool = False) -> Layout:
    """Return the layout for these layers, in this order; with charts of state modulation where it is measured.

    Charts of utilization also show the steps of actions, as spikes up to 1. The strengths stay on the scalars page: a
    lambda of 0.5, an alpha factor of 100 and a ratio do not fit one axis.

    Multiline charts take regular expressions; a margin chart takes the tags of value, lower and upper end.

    >>> sorted(custom_scalars_layout(["mixer"]))
    ['ESS and loss', 'ESS layer: mixer', 'ESS overview']
    """
    layout: Layout = {
        "ESS overview": {
            "Utilization of every layer (effective / capacity)": _lines(
                "ess_utilization_ratio/.*", "ess_intervention_steps/.*"
            ),
            "Utilization of the model": _lines(re.escape(UTILIZATION_TAG)),
            "Effective state-size of every layer": _lines("ess_effective_size/.*"),
            "Retention of every layer (below 1 the decay costs memory)": _lines("ess_retention_ratio/.*"),
            "Share of every layer's output that comes from afar": _lines("ess_far_share_ratio/.*"),
            "Layers in each condition": _lines(*(f"ess_layers/{name}" for name in CONDITIONS)),
            "Cost of the monitor (share of training time)": _lines(re.escape(OVERHEAD_TAG)),
        },
        "ESS and loss": {
            "Utilization against loss (loss as share of its highest)": _lines(
                re.escape(UTILIZATION_TAG), re.escape(LOSS_RATIO_TAG), "ess_intervention_steps/.*"
            ),
            "Metrics of the training at the measured steps": _lines("ess_metrics/.*"),
        },
    }
    if modulation:
        layout["ESS overview"] |= {"State modulation of every layer, by tau": _lines("ess_modulation_ratio_tau_.*/.*")}
    for layer in layers:

        def tags(*quantities: str, layer: str = layer) -> list[str]:
            return [scalar_tag(quantity, layer) for quantity in quantities]

        layout[f"{_LAYER}{layer_title(layer)}"] = {
            "Effective state-size over all positions, with certified bounds": [
                "Margin",
                tags("effective_size_between", "effective_size_lower", "effective_size_upper"),
            ],
            "Effective, entropy and theoretically realizable state-size": _lines(
                *map(re.escape, tags("effective_size", "entropy_size", "state_capacity"))
            ),
            "Utilization, retention, mean decay and far share": _lines(
                *map(re.escape, tags("utilization_ratio", "retention_ratio", "mean_decay", "far_share_ratio")),
                re.escape(spike_tag(layer)),
            ),
        }
    return layout


def add_layout(writer: Any, layout: Layout) -> None:
    """Add the layout to a `SummaryWriter`; the layers' charts are closed at first where there are many.

    `SummaryWriter.add_custom_scalars` itself cannot close any: they stay open with a writer that has no `file_writer`.
    """
    layers = sum(title.startswith(_LAYER) for title in layout)
    files = getattr(writer, "file_writer", None)
    if layers <= OPEN_LAYERS or files is None:
        writer.add_custom_scalars(layout)
        return
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout as Page  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import custom_scalars

    summary = custom_scalars(layout)  # type: ignore[no-untyped-call]
    (page,) = summary.value[0].tensor.string_val
    page = Page.FromString(page)
    for category in page.category:
        category.closed = category.title.startswith(_LAYER)
    summary.value[0].tensor.string_val[:] = [page.SerializeToString()]
    files.add_summary(summary)


def spike_tag(layer: str) -> str:
    """Return the tag of the spikes of one layer."""
    return f"ess_intervention_steps/{layer_tag(layer)}"


class Spikes:
    """Makes the points of a curve that is 1 at the steps of events and 0 right beside them.

    Examples:
        >>> spikes = Spikes()
        >>> spikes.at(100)
        [(99, 0.0), (100, 1.0), (101, 0.0)]
        >>> spikes.at(102)
        [(102, 1.0), (103, 0.0)]
    """

    def __init__(self) -> None:
        self._last_step = -1

    def at(self, step: int) -> list[tuple[int, float]]:
        """Return the points (step, height) to append for an event at `step`."""
        # TensorBoard takes a smaller step than the last for a restarted run and drops what came after it.
        foot = [(step - 1, 0.0)] if step - 1 > self._last_step else []
        self._last_step = step + 1
        return [*foot, (step, 1.0), (step + 1, 0.0)]


def _lines(*patterns: str) -> list[object]:
    # Without anchors an expression would also match longer tags.
    return ["Multiline", [f"^{pattern}$" for pattern in patterns]]
