"""One layer of a run: what it remembers, how that is judged, whether its ranks agree."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ess_monitor.alerts.dashboards.boards import RUN, Section, board, run_of_job, values_of
from ess_monitor.alerts.dashboards.parts import (
    CONDITION_NAMES,
    GREEN,
    RED,
    Placed,
    Query,
    condition_of,
    lines,
    number,
    states,
)

_LAYER = f'{RUN}, layer="$layer"'


def layer() -> Dashboard:
    """The dashboard of one layer."""
    return board(
        "ess-monitor-layer",
        "ESS Monitor / Layer",
        "One layer of a training run: effective size against capacity, retention, and the lines it is judged by.",
        [
            run_of_job(),
            values_of(
                "layer",
                "Layer",
                f"label_values(ess_monitor_layer_condition{{{RUN}}}, layer)",
                "The layer to look into.",
            ),
        ],
        [Section("Now", _numbers()), Section("Over time", _curves())],
        runs=RUN,
    )


def _numbers() -> tuple[Placed, ...]:
    return (
        number(
            "Condition",
            "As the run judges the layer; the worst rank counts.",
            "short",
            Query(condition_of(_LAYER, "layer")),
            names=CONDITION_NAMES,
        ),
        number(
            "Utilization",
            "Effective size over capacity, ranks together.",
            "percentunit",
            Query(f"run_layer:ess_monitor_state_utilization:ratio{{{_LAYER}}}"),
        ),
        number(
            "Effective size",
            "State dimensions per head or channel that carry something, on the rank that has least.",
            "short",
            Query(f"min(ess_monitor_state_effective_size{{{_LAYER}}})"),
            decimals=1,
        ),
        number(
            "Capacity",
            "State dimensions per head or channel that the architecture provides. With softmax attention it grows with "
            "the position.",
            "short",
            Query(f"max(ess_monitor_state_capacity{{{_LAYER}}})"),
        ),
        number(
            "Retention",
            "Effective size over what it would be without decay. Low in a collapsed layer: pull A towards I. Near 1: a "
            "change of the decay will not help.",
            "percentunit",
            Query(f"min(ess_monitor_state_retention_ratio{{{_LAYER}}})"),
        ),
        number(
            "Non-finite measurements",
            "Measurements within the time range that met NaN or infinity, all ranks.",
            "short",
            Query(f"sum(round(increase(ess_monitor_nonfinite_states_total{{{_LAYER}}}[$__range])))"),
            colors=((None, GREEN), (1, RED)),
            decimals=0,
        ),
    )


def _curves() -> tuple[Placed, ...]:
    return (
        lines(
            "Utilization and the lines it is judged by",
            "Each rank. Below the upper line of collapsed, with an unsolved task, the layer is called collapsed after "
            "some patience, and recovers only above the recovery line. The lines are the run's own settings.",
            "percentunit",
            Query(f"ess_monitor_state_utilization_ratio{{{_LAYER}}}", "rank {{rank}}"),
            Query(
                f"max by (condition, bound) (ess_monitor_condition_threshold_ratio{{{RUN}}})",
                "{{condition}} {{bound}}",
                dashed=True,
            ),
            limits=(0, 1),
            height=9,
        ),
        lines(
            "Effective size against capacity",
            "Each rank, in state dimensions per head or channel; dashed is what the architecture provides.",
            "short",
            Query(f"ess_monitor_state_effective_size{{{_LAYER}}}", "rank {{rank}}"),
            Query(f"max(ess_monitor_state_capacity{{{_LAYER}}})", "capacity", dashed=True),
            limits=(0, None),
            height=9,
        ),
        states(
            "Condition over time",
            "As the run judges the layer, with warm-up, patience and hysteresis.",
            Query(condition_of(_LAYER, "layer"), "{{layer}}"),
            width=24,
            height=4,
        ),
        lines(
            "Retention by rank",
            "Each rank. It falls before utilization does where a decay closes.",
            "percentunit",
            Query(f"ess_monitor_state_retention_ratio{{{_LAYER}}}", "rank {{rank}}"),
            limits=(0, None),
        ),
        lines(
            "Among the other layers",
            "Utilization of all layers of the run. One that leaves the others behind has a cause of its own; all "
            "together have a common one.",
            "percentunit",
            Query(f"run_layer:ess_monitor_state_utilization:ratio{{{RUN}}}", "{{layer}}"),
            limits=(0, 1),
        ),
        lines(
            "Gap between ranks",
            "Highest utilization of a rank less the lowest. 0 with a single rank.",
            "percentunit",
            Query(f"run_layer:ess_monitor_state_utilization:range{{{_LAYER}}}", "gap"),
            limits=(0, None),
        ),
        lines(
            "Non-finite states",
            "Measurements that met NaN or infinity in this layer's tensors, by rank.",
            "short",
            Query(
                f"sum by (rank) (increase(ess_monitor_nonfinite_states_total{{{_LAYER}}}[$__rate_interval]))",
                "rank {{rank}}",
            ),
            limits=(0, None),
            bars=True,
        ),
    )
