"""One run: is its memory in use, what did the autopilot do, do the ranks agree."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from ess_monitor.alerts.dashboards.boards import LAYER_LINK, RUN, Section, board, run_of_job
from ess_monitor.alerts.dashboards.parts import (
    BLUE,
    GRAY,
    GREEN,
    RED,
    YELLOW,
    Column,
    Placed,
    Query,
    condition_of,
    lines,
    number,
    rows_of,
    states,
)
from ess_monitor.alerts.dashboards.upkeep import ranks, upkeep

_LINK = ("Open layer", LAYER_LINK)


def run() -> Dashboard:
    """The dashboard of one run."""
    return board(
        "ess-monitor-run",
        "ESS Monitor / Run",
        "One training run: how much of its state is in use, which layers are collapsed or saturated, what the "
        "autopilot did about it, and what the monitor costs.",
        [run_of_job()],
        [
            Section("Now", _numbers()),
            Section("Memory", _memory()),
            Section("Autopilot and alerts", _autopilot()),
            Section("Training and ranks", ranks(RUN)),
            Section("The monitor itself", upkeep(RUN)),
        ],
        runs=RUN,
    )


def _numbers() -> tuple[Placed, ...]:
    bad = ((None, GREEN), (1, RED))
    return (
        number(
            "Status",
            "What the run says of itself. A killed process says nothing: look at the time since the last step.",
            "short",
            Query(f"max by (status) (ess_monitor_run_status{{{RUN}}} == 1)", "{{status}}"),
            show_name=True,
        ),
        number(
            "State in use",
            "Effective size over capacity, both summed over layers and ranks.",
            "percentunit",
            Query(f"run:ess_monitor_state_utilization:ratio{{{RUN}}}"),
        ),
        number(
            "Collapsed layers",
            "Memory is there and not used. The panel of conditions says since when.",
            "short",
            Query(f"run:ess_monitor_layers_collapsed:count{{{RUN}}}"),
            colors=bad,
        ),
        number(
            "Saturated layers",
            "Memory is full while the task metric stands still. Only a larger state helps, or less to remember.",
            "short",
            Query(f'sum(run_layer:ess_monitor_layer_condition:max{{{RUN}, condition="saturated"}})'),
            colors=((None, GREEN), (1, YELLOW)),
        ),
        number(
            "Since the last step",
            "Of the rank that stepped last. Grows during validation and checkpoints, and for ever in a run that hangs.",
            "s",
            Query(f"time() - max(ess_monitor_last_step_timestamp_seconds{{{RUN}}})"),
        ),
        number(
            "Firing alerts",
            "Alerts on this run, of all severities.",
            "short",
            Query(f'count(ALERTS{{{RUN}, alertstate="firing"}}) or vector(0)'),
            colors=bad,
        ),
    )


def _memory() -> tuple[Placed, ...]:
    return (
        lines(
            "Utilization by layer",
            "Effective size over capacity, ranks together; dashed is the run as a whole. Falls at the start of healthy "
            "runs, then rises with learning. A layer that stays low is a candidate for collapse.",
            "percentunit",
            Query(f"run_layer:ess_monitor_state_utilization:ratio{{{RUN}}}", "{{layer}}"),
            Query(f"run:ess_monitor_state_utilization:ratio{{{RUN}}}", "whole run", dashed=True),
            limits=(0, 1),
            height=9,
            link=_LINK,
        ),
        states(
            "Condition by layer",
            "As the run judges its layers, with warm-up, patience and hysteresis; the worst rank counts.",
            Query(condition_of(RUN, "layer"), "{{layer}}"),
            height=9,
        ),
        lines(
            "Effective size by layer",
            "State dimensions per head or channel that carry something, on the rank that has least.",
            "short",
            Query(f"min by (layer) (ess_monitor_state_effective_size{{{RUN}}})", "{{layer}}"),
            width=8,
            limits=(0, None),
            link=_LINK,
        ),
        lines(
            "Retention by layer",
            "Effective size over what it would be without decay. Well below 1 in a collapsed layer: the decay empties "
            "the memory. Near 1: features or data do. Layers without a decay have none.",
            "percentunit",
            Query(f"min by (layer) (ess_monitor_state_retention_ratio{{{RUN}}})", "{{layer}}"),
            width=8,
            limits=(0, None),
            link=_LINK,
        ),
        lines(
            "Non-finite states",
            "Measurements that met NaN or infinity in a layer's tensors. Anything above zero: look at the loss.",
            "short",
            Query(
                f"sum by (layer) (increase(ess_monitor_nonfinite_states_total{{{RUN}}}[$__rate_interval]))", "{{layer}}"
            ),
            width=8,
            limits=(0, None),
            link=_LINK,
            bars=True,
        ),
    )


def _autopilot() -> tuple[Placed, ...]:
    counted = f"ess_monitor_interventions_total{{{RUN}}}"
    return (
        number(
            "Autopilot",
            "Whether it may change the model (mode auto) or only says what it would do.",
            "short",
            Query(f"max(ess_monitor_autopilot_enabled{{{RUN}}})"),
            names={"0": ("advises or off", GRAY), "1": ("acts", BLUE)},
        ),
        number(
            "Budget left",
            "Actions that the autopilot may still take. At 0 a collapsed layer needs a person.",
            "short",
            Query(f"min(ess_monitor_intervention_budget_remaining{{{RUN}}})"),
            colors=((None, RED), (1, GREEN)),
        ),
        lines(
            "Outcomes of interventions",
            "When the autopilot acted, would have acted, gave up or took something back. Every rank counts the same "
            "action; one of them is shown.",
            "short",
            Query(
                f"max by (outcome) (sum by (outcome, rank) (round(increase({counted}[$__rate_interval]))))",
                "{{outcome}}",
            ),
            width=16,
            limits=(0, None),
            bars=True,
        ),
        lines(
            "Treatments under way",
            "Layers that are being treated, by action.",
            "short",
            Query(f"max by (action) (ess_monitor_interventions_active{{{RUN}}})", "{{action}}"),
            width=8,
            limits=(0, None),
        ),
        rows_of(
            "Interventions in this time range",
            "How often each action had each outcome. What the outcomes ask of you is in the table of outcomes in the "
            "documentation.",
            [f"max by (action, outcome) (round(increase({counted}[$__range]))) > 0"],
            [Column("action", "Action"), Column("outcome", "Outcome"), Column("Value", "Times")],
            width=8,
            height=8,
        ),
        rows_of(
            "Alerts on this run",
            "What fires now; each has a runbook of its name.",
            [f'max by (alertname, severity, rank, layer, exporter, part) (ALERTS{{{RUN}, alertstate="firing"}})'],
            [
                Column("severity", "Severity"),
                Column("alertname", "Alert"),
                Column("rank", "Rank"),
                Column("layer", "Layer"),
                Column("exporter", "Exporter"),
                Column("part", "Part"),
            ],
            hidden=("Value", "Value #A"),
            width=8,
            height=8,
        ),
    )
