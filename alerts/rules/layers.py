"""Rules on the memory of the layers: sizes, conditions, non-finite states, ranks that differ."""

from __future__ import annotations

from ess_monitor.alerts.config import AlertsConfig
from ess_monitor.alerts.rules.base import PREFIX, Alert, Group, Record, duration, percent

CONDITION = "run_layer:ess_monitor_layer_condition:max"
COLLAPSED_COUNT = "run:ess_monitor_layers_collapsed:count"
COLLAPSED_RATIO = "run:ess_monitor_layers_collapsed:ratio"
RANGE = "run_layer:ess_monitor_state_utilization:range"


def layers(config: AlertsConfig) -> Group:
    """The group of rules on the memory of the layers."""
    return Group("ess_monitor.layers", (*_utilization(config), *_conditions(config), *_alerts(config)))


def _utilization(config: AlertsConfig) -> tuple[Record, ...]:
    job = f'job="{config.job}"'

    def ratio(labels: str) -> str:
        return f"""
            sum by ({labels}) (ess_monitor_state_effective_size{{{job}}})
            /
            sum by ({labels}) (ess_monitor_state_capacity{{{job}}})
        """

    return (
        Record(
            "run:ess_monitor_state_utilization:ratio",
            ratio("job, run_id"),
            "Share of the run's state that is in use. Ratios are never averaged: a mean would count a small layer as "
            "much as a large one.",
        ),
        Record(
            "rank:ess_monitor_state_utilization:ratio",
            ratio("job, instance, run_id, rank"),
            "The same for each rank by itself.",
        ),
        Record(
            "run_layer:ess_monitor_state_utilization:ratio",
            ratio("job, run_id, layer"),
            "The same for each layer, all ranks together.",
        ),
        Record(
            RANGE,
            f"""
            max by (job, run_id, layer) (ess_monitor_state_utilization_ratio{{{job}}})
            -
            min by (job, run_id, layer) (
              ess_monitor_state_utilization_min_ratio{{{job}}} or ess_monitor_state_utilization_ratio{{{job}}}
            )
            """,
            "How far apart the ranks are in a layer, at least. Ranks that exchange their readings export the mean and "
            "the smallest, from which the largest is not less than the mean; others export their own.",
        ),
    )


def _conditions(config: AlertsConfig) -> tuple[Record, ...]:
    job = f'job="{config.job}"'
    return (
        Record(
            CONDITION,
            f"max by (job, run_id, layer, condition) (ess_monitor_layer_condition{{{job}}})",
            "1 where the layer is in the condition on any rank. The condition is the process's own, hysteresis and "
            "patience included; no threshold is repeated here, so that alerts, curves and the autopilot agree.",
        ),
        Record(
            COLLAPSED_COUNT,
            f'sum by (job, run_id) ({CONDITION}{{{job}, condition="collapsed"}})',
            "Collapsed layers of the run.",
        ),
        Record(
            COLLAPSED_RATIO,
            f"""
            {COLLAPSED_COUNT}{{{job}}}
            /
            count by (job, run_id) (
              max by (job, run_id, layer) ({CONDITION}{{{job}, condition!="unknown"}}) == 1
            )
            """,
            "Their share of the layers that a rank has judged. Layers of which nothing can be said, those of softmax "
            "attention and a first one that is spared, say nothing here either; a model of two layers or a hybrid one "
            "could else never pass one half.",
        ),
    )


def _alerts(config: AlertsConfig) -> tuple[Alert, ...]:
    job = f'job="{config.job}"'

    def url(name: str) -> str:
        return f"{config.runbook_base_url}/{PREFIX}{name}.md"

    return (
        Alert(
            "StateSaturated",
            f'{CONDITION}{{{job}, condition="saturated"}} == 1',
            "warning",
            "Layer {{ $labels.layer }} of run {{ $labels.run_id }} is saturated",
            f"For {duration(config.condition_for_seconds)} the state of layer {{{{ $labels.layer }}}} has been full on "
            "at least one rank while the task metric stands still. Only a larger state, or less to remember, helps.",
            "A full state is never acted on by the autopilot: somebody has to decide on the size.",
            url("StateSaturated"),
            config.condition_for_seconds,
            config.condition_keep_firing_seconds,
        ),
        Alert(
            "StateCollapsed",
            f'{CONDITION}{{{job}, condition="collapsed"}} == 1',
            "warning",
            "Layer {{ $labels.layer }} of run {{ $labels.run_id }} has collapsed",
            f"For {duration(config.condition_for_seconds)} layer {{{{ $labels.layer }}}} has left most of its state "
            "unused on at least one rank, and use does not rise. Look at its retention: low, the decay empties the "
            "memory; high, features or data do.",
            "Long enough for a first answer of the autopilot.",
            url("StateCollapsed"),
            config.condition_for_seconds,
            config.condition_keep_firing_seconds,
        ),
        Alert(
            "MostLayersCollapsed",
            f"{COLLAPSED_RATIO}{{{job}}} > {config.most_layers_ratio:g}",
            "critical",
            "Most layers of run {{ $labels.run_id }} have collapsed",
            "{{ $value | humanizePercentage }} of the judged layers of run {{ $labels.run_id }} are collapsed, more "
            f"than {percent(config.most_layers_ratio)}. The cause is common to them: data, learning rate, "
            "initialization or precision.",
            "Takes the place of the alerts on single layers (inhibition in alertmanager.yml).",
            url("MostLayersCollapsed"),
            config.most_layers_for_seconds,
        ),
        Alert(
            "NonFiniteState",
            f"increase(ess_monitor_nonfinite_states_total{{{job}}}[5m]) > 0",
            "critical",
            "NaN or infinity in layer {{ $labels.layer }} of run {{ $labels.run_id }}",
            "Rank {{ $labels.rank }} met NaN or infinity in the tensors of layer {{ $labels.layer }} within the last "
            "5 minutes. The loss is broken, or about to break.",
            "Counted by the process, as a NaN in a gauge would make every comparison false and silence its alert.",
            url("NonFiniteState"),
        ),
        Alert(
            "RankDivergence",
            f"{RANGE}{{{job}}} > {config.divergence_ratio:g}",
            "warning",
            "Ranks of run {{ $labels.run_id }} disagree about layer {{ $labels.layer }}",
            "The utilization of layer {{ $labels.layer }} differs by at least {{ $value | humanizePercentage }} "
            f"between two ranks, more than {percent(config.divergence_ratio)}. Replicas of one model should agree: "
            "compare their data and their weights.",
            "Replicas hold the same weights, so a lasting gap is one of data, or of weights that parted ways.",
            url("RankDivergence"),
            config.divergence_for_seconds,
        ),
    )
